"""Dense models into mixtures of experts that compute the same at first (Komatsuzaki et al. 2023, arXiv 2212.05055)."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from research.layers.mlp import MLP, MLPConfig
from research.layers.moe import MoE, MoEConfig, TopKRouter
from research.models.config import ModelConfig
from research.models.language_model import LanguageModel


def upcycled_config(
    config: ModelConfig,
    names: Sequence[str],
    *,
    copies: int,
    active: int = 1,
    granularity: int = 1,
    like: MoEConfig | None = None,
) -> ModelConfig:
    """``config`` with the MLPs named made mixtures of experts; see `upcycle`."""
    like = MoEConfig() if like is None else like
    router = like.router
    if not isinstance(router, TopKRouter) or not router.renormalise or not router.gated:
        raise ValueError(
            "like.router must be a TopKRouter whose weights are renormalised, so that copies add up to one"
        )
    if not 1 <= active <= copies:
        raise ValueError(f"active must be from 1 to the {copies} copies, got {active}")
    if router.weight_on == "input" and active > 1:
        raise ValueError(
            f"active must be 1 where like.router weights inputs, which an activation does not add up over; got {active}"
        )
    known = {branch.name: branch.mixer for branch in config.branches}
    for name in names:
        mixer = known.get(name)
        if not isinstance(mixer, MLPConfig):
            raise ValueError(
                f"names must name MLPs, got {name!r}, which is {type(mixer).__name__ if mixer else 'no branch'}"
            )
        if granularity < 1 or mixer.hidden % granularity:
            raise ValueError(f"granularity must divide the hidden width {mixer.hidden} of {name!r}, got {granularity}")

    def experts_of(mixer: MLPConfig) -> MoEConfig:
        return dataclasses.replace(
            like,
            experts=copies * granularity,
            per_token=active * granularity,
            hidden=mixer.hidden // granularity,
            activation=mixer.activation,
            shared_hidden=0,
            shared_gate=False,
            latent=0,
            biases=False,
            router_hidden=0,
            # A token's weights add up to one over `granularity` parts of each copy, whose sum is that copy.
            router=dataclasses.replace(router, scale=router.scale * granularity),
        )

    branches = tuple(
        dataclasses.replace(b, mixer=experts_of(b.mixer)) if b.name in names and isinstance(b.mixer, MLPConfig) else b
        for b in config.branches
    )
    return dataclasses.replace(config, branches=branches)


def upcycle(
    model: LanguageModel,
    names: Sequence[str],
    *,
    copies: int,
    active: int = 1,
    granularity: int = 1,
    noise: float = 0.0,
    like: MoEConfig | None = None,
    seed: int = 0,
) -> LanguageModel:
    """The same model with the MLPs of the branches ``names`` made mixtures of experts.

    Every MLP is copied ``copies`` times, of which a token visits ``active``. With ``granularity`` G each copy is split
    along its hidden width into G experts that start with one router column, so that a token visits a copy's parts
    together ("virtual groups", He et al. 2024, arXiv 2410.07524); training then tells them apart. Without noise, and as
    long as no capacity drops anything, the output is the dense model's: what ``like.router.scale`` multiplies, the
    matrices next to it are divided by. Everything else is taken over as it is.

    Args:
      noise: normal noise on experts, in units of each matrix's own root mean square (OLMoE found no use in it).
      like: router, balance, dispatch and exchange of the new layers; sizes are those of the MLPs.
      seed: of routers and noise.

    Raises:
      ValueError: a name that is no MLP's, a granularity that doesn't divide its hidden width, active above copies (or
        above 1 where weights act on the input), or a router whose weights aren't renormalised.
    """
    config = upcycled_config(model.config, names, copies=copies, active=active, granularity=granularity, like=like)
    new = jax.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(params=seed)))()
    for name in ("embedding_VD", "final_norm", "head_DV"):
        setattr(new, name, getattr(model, name))
    keys = jax.random.split(jax.random.key(seed), 3)
    units = list(zip(model.stages, new.stages, strict=True))
    if model.mtp is not None and new.mtp is not None:
        for dense_head, head in zip(model.mtp.heads, new.mtp.heads, strict=True):
            for name in ("embedding_norm", "hidden_norm", "w_merge_ND", "norm"):
                setattr(head, name, getattr(dense_head, name))
            units.append((dense_head.unit, head.unit))
    for index, (dense_unit, unit) in enumerate(units):
        for place, (dense, branch) in enumerate(zip(dense_unit.branches, unit.branches, strict=True)):
            if isinstance(dense.mixer, MLP) and isinstance(branch.mixer, MoE):
                branch.pre_norm, branch.post_norm = dense.pre_norm, dense.post_norm
                own = [jax.random.fold_in(key, index * 1000 + place) for key in keys]
                _fill(branch.mixer, dense.mixer, copies, granularity, noise, own)
            else:
                unit.branches[place] = dense
    return new


def _fill(moe: MoE, mlp: MLP, copies: int, parts: int, noise: float, keys) -> None:
    """Writes a stack of MLPs, [L, …], into a fresh stack of mixtures; or one MLP into one (a head's)."""
    gates = moe.config.activation.matrices
    w_in_LDN, w_out_LFD = (w[...].reshape(-1, *w[...].shape[-2:]) for w in (mlp.w_in_DF, mlp.w_out_FD))
    L, D, _ = w_in_LDN.shape
    in_LDGPF = w_in_LDN.reshape(L, D, gates, parts, -1)
    w_in_LEDN = jnp.transpose(in_LDGPF, (0, 3, 1, 2, 4)).reshape(L, parts, D, -1)
    w_out_LEFD = w_out_LFD.reshape(L, parts, -1, D)
    router = moe.config.router
    assert isinstance(router, TopKRouter)
    scale, on_input = router.scale / parts, router.weight_on == "input"
    w_in_LEDN, w_out_LEFD = (w_in_LEDN / scale, w_out_LEFD) if on_input else (w_in_LEDN, w_out_LEFD / scale)
    for variable, part, key in ((moe.w_in_EDF, w_in_LEDN, keys[0]), (moe.w_out_EFD, w_out_LEFD, keys[1])):
        copied = jnp.tile(part, (1, copies, 1, 1))
        if noise:
            size = jnp.sqrt(jnp.mean(jnp.square(copied), axis=(-2, -1), keepdims=True))
            copied = copied + (noise * size * jax.random.normal(key, copied.shape)).astype(copied.dtype)
        variable.set_value(copied.astype(variable[...].dtype).reshape(variable[...].shape))
    router_LDE = moe.w_router_DE[...]
    moe.w_router_DE.set_value(jnp.repeat(router_LDE[..., ::parts], parts, axis=-1))
