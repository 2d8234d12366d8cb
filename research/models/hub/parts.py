"""What many published families have in common: how their config.json spells it, and how their checkpoints name it."""

from collections.abc import Callable, Iterator
from typing import Any

from research.layers.attention import AttentionConfig
from research.layers.mla import MLAConfig
from research.layers.mlp import MLPConfig
from research.layers.moe import MoEConfig
from research.layers.norms import RMSNormConfig
from research.models.config import ModelConfig, Residual
from research.models.hub.keys import Keys
from research.models.hub.tensors import BranchViews, ModelViews, PartViews, Tensor, View, joined
from research.ops.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

# Tensors of one branch, their names behind a prefix.
Describe = Callable[[str, BranchViews], Iterator[Tensor]]


def language_model(
    keys: Keys,
    layers: list[tuple[Residual, ...]],
    norm: RMSNormConfig,
    *,
    tied: bool = False,
    depth: str = "num_hidden_layers",
    width: str = "hidden_size",
    **others,
) -> ModelConfig:
    """A model of these layers, each a tuple of branches; branches that are equal share a name.

    Args:
      tied: whether the head is the embedding where config.json doesn't say.
      depth, width: what config.json calls them.
      others: fields of ``ModelConfig``.
    """
    said = keys.get(depth, len(layers))
    if len(layers) != said:
        keys.refuse(f"{depth} is {said}, other keys describe {len(layers)} layers")
    period = next(n for n in range(1, len(layers) + 1) if layers == layers[:n] * (len(layers) // n))
    pattern = [branch for layer in layers[:period] for branch in layer]
    return ModelConfig(
        vocab_size=keys["vocab_size"],
        width=keys[width],
        branches=tuple(dict.fromkeys(branch for layer in layers for branch in layer)),
        pattern=tuple(branch.name for branch in pattern),
        repeats=len(layers) // period,
        final_norm=norm,
        tie_embeddings=keys.get("tie_word_embeddings", tied),
        **others,
    )


def rms_norm(keys: Keys, *, centred: bool = False, eps: float = 1e-6) -> RMSNormConfig:
    return RMSNormConfig(eps=keys.get("rms_norm_eps", eps), centred=centred)


def rope(keys: Keys, *, theta: float = 10_000.0, fraction: float = 1.0) -> dict[str, Any]:
    """The rotary fields of ``AttentionConfig``, as transformers 5 writes them (``rope_parameters``) or as it did before."""
    inner = keys.inside("rope_parameters" if "rope_parameters" in keys else "rope_scaling")
    keys.inert("rope_scaling", "rope_parameters")
    # Sections of a position in time, height and width, which are the same in text.
    inner.inert("mrope_section", "mrope_interleaved")
    return {
        "rope_theta": float(inner.get("rope_theta", keys.get("rope_theta", theta))),
        "rotary_fraction": inner.get("partial_rotary_factor", keys.get("partial_rotary_factor", fraction)),
        "rope_scaling": _scaling(inner, keys.get("max_position_embeddings", 2048)),
    }


def _scaling(keys: Keys, length: int) -> RopeScaling | None:
    kind = keys.either("rope_type", "type", default="default")
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(float(keys["factor"]))
    if kind == "llama3":
        original = keys["original_max_position_embeddings"]
        return Llama3Scaling(keys["factor"], keys["low_freq_factor"], keys["high_freq_factor"], original)
    if kind == "yarn":
        return YarnScaling(
            factor=float(keys["factor"]),
            original_length=keys.get("original_max_position_embeddings", length),
            beta_fast=float(keys.get("beta_fast", 32)),
            beta_slow=float(keys.get("beta_slow", 1)),
            truncate=keys.get("truncate", True),
            mscale=float(keys.get("mscale", 1.0)),
            mscale_all_dim=float(keys.get("mscale_all_dim", 0.0)),
            attention_factor=keys.get("attention_factor"),
        )
    keys.refuse(f"rope_type must be 'default', 'linear', 'llama3' or 'yarn', got {kind!r}")
    return None


def sparse_layers(keys: Keys) -> list[bool]:
    """Which layers have experts, as Qwen's configurations say."""
    step, dense = keys.get("decoder_sparse_step", 1), keys.get("mlp_only_layers", [])
    return [i not in dense and (i + 1) % step == 0 for i in range(keys["num_hidden_layers"])]


def linear(name: str, view: View) -> Tensor:
    """A matrix that is stored [out, in]."""
    return joined(name, view.T)


def ends(
    model: ModelViews, *, prefix: str = "model.", embedding: str = "embed_tokens", norm: str = "norm"
) -> Iterator[Tensor]:
    """Embedding, last norm, head."""
    yield joined(f"{prefix}{embedding}.weight", model["embedding_VD"])
    yield joined(f"{prefix}{norm}.weight", model["final_norm.scale_D"])
    if "head_DV" in model:
        yield linear("lm_head.weight", model["head_DV"])


def decoder(model: ModelViews, mixer: Describe, feed_forward: Describe, *, inner: str = "mlp.") -> Iterator[Tensor]:
    """The usual decoder: its ends, and under ``model.layers.N`` a norm and ``self_attn``, a norm and ``inner``."""
    yield from ends(model)
    for n in range(len(model.branches) // 2):
        mixes, feeds = model.branches[2 * n : 2 * n + 2]
        prefix = f"model.layers.{n}."
        yield joined(f"{prefix}input_layernorm.weight", mixes["pre_norm.scale_D"])
        yield from mixer(f"{prefix}self_attn.", mixes)
        yield joined(f"{prefix}post_attention_layernorm.weight", feeds["pre_norm.scale_D"])
        yield from feed_forward(f"{prefix}{inner}", feeds)


def backbone(model: ModelViews, mixer: Describe) -> Iterator[Tensor]:
    """Mamba's naming: under ``backbone.layers.N`` a norm and a mixer, whatever it is."""
    yield from ends(model, prefix="backbone.", embedding="embeddings", norm="norm_f")
    for n, branch in enumerate(model.branches):
        yield joined(f"backbone.layers.{n}.norm.weight", branch["pre_norm.scale_D"])
        yield from mixer(f"backbone.layers.{n}.mixer.", branch)


def attention(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    """``q_proj`` (each head's gate behind it), ``k_proj``, ``v_proj``, ``o_proj``, and norms on queries and keys."""
    c = branch.mixer(AttentionConfig)
    query, key = c.heads * c.head_width * (2 if c.gated else 1), c.key_heads * c.head_width
    names = ("q_proj", "k_proj", "v_proj")
    for name, view in zip(names, branch["mixer.w_in_DN"].cut(1, query, key, key), strict=True):
        yield linear(f"{prefix}{name}.weight", view)
    if c.bias:
        for name, view in zip(names, branch["mixer.bias_N"].cut(0, query, key, key), strict=True):
            yield joined(f"{prefix}{name}.bias", view)
    yield linear(f"{prefix}o_proj.weight", branch["mixer.w_out_ND"])
    if c.out_bias:
        yield joined(f"{prefix}o_proj.bias", branch["mixer.out_bias_D"])
    if c.qk_norm is not None:
        yield joined(f"{prefix}q_norm.weight", branch["mixer.q_norm.scale_D"])
        yield joined(f"{prefix}k_norm.weight", branch["mixer.k_norm.scale_D"])


def gated_mlp(
    prefix: str,
    part: PartViews,
    into: str = "mixer.w_in_DF",
    out: str = "mixer.w_out_FD",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[Tensor]:
    """Gate and up, which lie side by side here, and down."""
    w_in_DF = part[into]
    half = w_in_DF.shape[-1] // 2
    for name, view in zip(names, w_in_DF.cut(-1, half, half), strict=False):
        yield linear(f"{prefix}{name}.weight", view)
    yield linear(f"{prefix}{names[2]}.weight", part[out])


def experts(
    prefix: str, branch: BranchViews, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Iterator[Tensor]:
    """``gate`` (the router), and each expert on its own under ``experts``."""
    w_in_EDF, w_out_EFD = branch["mixer.w_in_EDF"], branch["mixer.w_out_EFD"]
    half = w_in_EDF.shape[-1] // 2
    yield linear(f"{prefix}gate.weight", branch["mixer.w_router_DE"])
    for e in range(w_in_EDF.shape[0]):
        for name, view in zip(names, w_in_EDF[e].cut(-1, half, half), strict=False):
            yield linear(f"{prefix}experts.{e}.{name}.weight", view)
        yield linear(f"{prefix}experts.{e}.{names[2]}.weight", w_out_EFD[e])


def fused_experts(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    """All experts' gate and up, and down, each stored [expert, out, in], as transformers 5 holds them."""
    yield joined(f"{prefix}experts.gate_up_proj", branch["mixer.w_in_EDF"].T)
    yield joined(f"{prefix}experts.down_proj", branch["mixer.w_out_EFD"].T)


def shared_expert(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    """The expert that every token visits."""
    yield from gated_mlp(prefix, branch, "mixer.w_shared_in_DF", "mixer.w_shared_out_FD")


def feed_forward(prefix: str, branch: BranchViews, shared: str = "shared_expert") -> Iterator[Tensor]:
    """A gated MLP, or experts with the selection bias, the shared expert and its gate where the model has them."""
    if isinstance(branch.residual.mixer, MLPConfig):
        yield from gated_mlp(prefix, branch)
        return
    c = branch.mixer(MoEConfig)
    yield from experts(prefix, branch)
    if c.selection_bias:
        yield joined(f"{prefix}gate.e_score_correction_bias", branch["mixer.bias_E"])
    if c.shared_hidden:
        yield from shared_expert(f"{prefix}{shared}.", branch)
    if c.shared_gate:
        yield linear(f"{prefix}{shared}_gate.weight", branch["mixer.w_shared_gate_D1"])


def latent_attention(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    """``kv_a_proj_with_mqa`` and ``kv_b_proj``, whose every head is [key | value]; ``q_proj``, or ``q_a_proj`` and
    ``q_b_proj``."""
    c = branch.mixer(MLAConfig)
    if c.query_latent is None:
        yield linear(f"{prefix}q_proj.weight", branch["mixer.w_query_RN"])
    else:
        yield linear(f"{prefix}q_a_proj.weight", branch["mixer.w_query_down_DR"])
        yield joined(f"{prefix}q_a_layernorm.weight", branch["mixer.query_norm.scale_D"])
        yield linear(f"{prefix}q_b_proj.weight", branch["mixer.w_query_RN"])
    yield linear(f"{prefix}kv_a_proj_with_mqa.weight", branch["mixer.w_down_DK"])
    yield joined(f"{prefix}kv_a_layernorm.weight", branch["mixer.latent_norm.scale_D"])
    spread = branch["mixer.w_key_HKN"].T, branch["mixer.w_value_HVK"]
    yield joined(f"{prefix}kv_b_proj.weight", *spread, axis=1, shape=(-1, c.latent))
    yield linear(f"{prefix}o_proj.weight", branch["mixer.w_out_ND"])
