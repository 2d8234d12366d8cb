"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, §2.2): heads that share the model's embedding and its head.

Head k makes its hidden state at place i from head k−1's there (the model's normalised last one for k = 1) and from token i+k:
``h^k_i = norm(layers(W [norm(embed(t_{i+k})) ; norm(h^{k−1}_i)]))`` (eq. 21 and 22), and predicts token i+k+1 (eq. 23).
"""

from __future__ import annotations

import typing
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from research.axes import Array, Float
from research.layers.context import Context
from research.layers.parameters import normal, project, read
from research.layers.place import Place
from research.models.auxiliaries import MultiTokenSums, reward_policies
from research.models.config import ModelConfig
from research.models.stages import Unit
from research.sharding.mesh import P

if typing.TYPE_CHECKING:
    from research.models.language_model import LanguageModel


class Head(nnx.Module):
    """One head, up to the normalised hidden states that the model's own head reads."""

    def __init__(self, config: ModelConfig, *, place: Place, rngs: nnx.Rngs, param_dtype):
        assert config.mtp is not None
        D, named = config.width, {branch.name: branch for branch in config.branches}
        branches = tuple(named[name] for name in config.mtp.pattern)
        norm = config.final_norm
        self.embedding_norm = norm.build(D, param_dtype=param_dtype)
        self.hidden_norm = norm.build(D, param_dtype=param_dtype)
        # [embedding | hidden]
        self.w_merge_ND = normal(rngs, (2 * D, D), param_dtype, P("fsdp", None), fan_in=2 * D)
        depth = len(config.layers)
        self.unit = Unit(branches, D, depth=depth, place=place, rngs=rngs, param_dtype=param_dtype)
        self.norm = norm.build(D, param_dtype=param_dtype)

    def __call__(self, hidden_BTD, embedding_BTD, states, context: Context):
        """(hidden, states, auxiliaries); the last two are tuples with an entry a branch."""
        both_BTN = jnp.concatenate([self.embedding_norm(embedding_BTD), self.hidden_norm(hidden_BTD)], axis=-1)
        x_BTD = project(both_BTN, read(self.w_merge_ND, hidden_BTD.dtype))
        x_BTD, _, states, auxes = self.unit(x_BTD, states, context)
        return self.norm(x_BTD), states, auxes

    def init_states(self, batch: int, max_length: int, dtype) -> tuple[Any, ...]:
        return tuple(branch.mixer.init_state(batch, max_length, dtype) for branch in self.unit.branches)


class MultiToken(nnx.Module):
    """The heads of a model: ``depth`` of them, or one that takes the place of all."""

    def __init__(self, config: ModelConfig, *, place: Place, rngs: nnx.Rngs, param_dtype):
        assert config.mtp is not None
        self.config = config.mtp
        heads = 1 if config.mtp.shared else config.mtp.depth
        self.heads = nnx.List([Head(config, place=place, rngs=rngs, param_dtype=param_dtype) for _ in range(heads)])

    def head(self, depth: int) -> Head:
        """The head that predicts the token ``depth`` places after the next, from 1."""
        return self.heads[0 if self.config.shared else depth - 1]


def multi_token_sums(
    model: LanguageModel, hidden_BTD, tokens_BT, targets_BT, mask_BT, segment_ids_BT, positions_BT, key=None
) -> tuple[MultiTokenSums, tuple[Any, ...]]:
    """Losses of every head on rows whose next-token targets are ``targets_BT``, and the auxiliaries of the heads' layers (sums
    as well): an entry for each of ``MultiToken.heads``, added up over depths where these share one.

    A place counts for head k where the k tokens after it are of its document and the target after them counts. To the
    heads' layers the others are padding, which changes nothing: they come last in their document.

    Args:
      hidden_BTD: the model's normalised last hidden states (``LanguageModel.hidden``).
      mask_BT: which targets count.
      key: as in ``LanguageModel.hidden``.
    """
    assert model.mtp is not None
    nats, counts, auxes = [], [], []
    for depth in range(1, model.mtp.config.depth + 1):
        ahead_BT = _shifted(tokens_BT, depth)
        within_BT = (segment_ids_BT > 0) & (_shifted(segment_ids_BT, depth) == segment_ids_BT)
        ids_BT = jnp.where(within_BT, segment_ids_BT, 0)
        context = Context(positions_BT, ids_BT, ahead_BT, None, key, deterministic=key is None)
        head = model.mtp.head(depth)
        empty = (None,) * len(head.unit.branches)
        hidden_BTD, _, aux = head(hidden_BTD, model.embed(ahead_BT), empty, context)
        counted_BT, wanted_BT = within_BT & _shifted(mask_BT, depth), _shifted(targets_BT, depth)
        sums = model.cross_entropy(hidden_BTD, wanted_BT, counted_BT)
        nats.append(sums[0])
        counts.append(sums[1])
        auxes.append(reward_policies(aux, model.logits(hidden_BTD), wanted_BT, counted_BT))
    if model.mtp.config.shared:
        auxes = [jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *auxes)]
    return MultiTokenSums(jnp.stack(nats), jnp.stack(counts)), tuple(auxes)


def multi_token_loss(model: LanguageModel, sums: MultiTokenSums) -> Float[Array, ""]:
    """The coefficient times the mean of the heads' mean losses (eq. 25), from sums over the whole batch."""
    assert model.mtp is not None
    return model.mtp.config.loss * jnp.mean(sums.nats_N / jnp.maximum(sums.count_N, 1))


def _shifted(x_BT, places: int):
    """x of so many places later; zeros past the end."""
    return jnp.pad(x_BT[:, places:], [(0, 0), (0, min(places, x_BT.shape[1]))])
