"""The language model: tokens in, logits, cache and auxiliaries out."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from research.axes import Array, Bool, Float, Int
from research.layers.context import Context, without_padding
from research.layers.parameters import normal, project, read
from research.models.config import ModelConfig
from research.models.multi_token import MultiToken
from research.models.stages import build_stages, factorise, init_states, run_stages
from research.ops.losses import cross_entropy, projected_cross_entropy
from research.ops.segments import real_and_reset
from research.sharding.mesh import P, look_up, on_mesh, per_shard

# A GiB of float32: as many as a loss may hold at once.
_LOGITS = 1 << 28


class Cache(NamedTuple):
    """What a model remembers of its rows: tokens seen, and every layer's state (stacked over repeats, by stage)."""

    length_B: Int[Array, " B"]
    stages: tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Logits, the cache after the call (None without one), and each stage's auxiliaries, stacked over repeats."""

    logits_BTV: Float[Array, "B T V"]
    cache: Cache | None
    aux: tuple[Any, ...]


class LanguageModel(nnx.Module):
    """A model of ``config``; a stateless pytree: pass it through ``jax.jit`` like any array."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, V, dtype = config.width, config.vocab_size, jnp.dtype(config.param_dtype)
        self.config = config
        self.plan = factorise(config.layers)
        # Unit entries for the residual stream; unit rows where the head shares them, so that logits start of order one.
        self.embedding_VD = normal(rngs, (V, D), dtype, P(None, "fsdp"), fan_in=D if config.tie_embeddings else 1)
        stages, place = build_stages(self.plan, D, depth=len(config.layers), rngs=rngs, param_dtype=dtype)
        self.stages = nnx.List(stages)
        self.final_norm = config.final_norm.build(D, param_dtype=dtype)
        self.head_DV = None if config.tie_embeddings else normal(rngs, (D, V), dtype, P("fsdp", None), fan_in=D)
        self.mtp = None if config.mtp is None else MultiToken(config, place=place, rngs=rngs, param_dtype=dtype)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        *,
        key: Array | None = None,
    ) -> Output:
        """Logits of the next token at every place.

        Args:
          tokens_BT: token ids.
          segment_ids: document of each token, 0 for padding; None is one document a row. With a cache every row is one
            right-padded document, ids 1 then 0.
          positions: place of each token in its document; restarts at each segment, or continues from the cache, if None.
          cache: from ``init_cache`` or an earlier call; the call then reads and extends it.
          key: for layers that draw at random while training; None is deterministic.
        """
        x_BTD, cache, aux = self.hidden(tokens_BT, segment_ids, positions, cache, key=key)
        return Output(self.logits(x_BTD), cache, aux)

    def hidden(
        self, tokens_BT, segment_ids=None, positions=None, cache: Cache | None = None, *, key=None
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        """The normalised last hidden states [B, T, D] with the cache and auxiliaries (see ``__call__``)."""
        cached_B = None if cache is None else cache.length_B
        positions_BT = positions_of(tokens_BT, segment_ids, cached_B) if positions is None else positions
        options = {
            "deterministic": key is None,
            "remat": self.config.remat_keeps if self.config.remat else None,
            # One token of each row, and every row on one device: caches are written at the end, all layers' at once.
            "deferred": cached_B is not None and tokens_BT.shape[1] == 1 and not on_mesh(),
        }
        context = Context(positions_BT, segment_ids, tokens_BT, cached_B, key, **options)
        x_BTD = without_padding(self.embed(tokens_BT), context)  # padding may hold any id, out of range included
        before = None if cache is None else cache.stages
        x_BTD, states, auxes = run_stages(self.stages, x_BTD, before, context, unroll=self.config.unroll)
        if cache is not None:
            B, T = tokens_BT.shape
            new_B = jnp.full(B, T) if segment_ids is None else jnp.sum(segment_ids > 0, axis=1)
            cache = Cache(cache.length_B + new_B.astype(cache.length_B.dtype), states)
        return self.final_norm(x_BTD), cache, auxes

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x_BTD = look_up(read(self.embedding_VD, self.config.compute_dtype), tokens_BT)
        return x_BTD if self.config.embedding_scale == 1 else x_BTD * self.config.embedding_scale

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The head on normalised hidden states; float32 or wider."""
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        logits_BTV = project(x_BTD, self._read_head(x_BTD.dtype), dtype=wide)
        return logits_BTV if self.config.logit_scale == 1 else logits_BTV * self.config.logit_scale

    def cross_entropy(
        self, x_BTD: Float[Array, "B T D"], targets_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """``cross_entropy`` of ``logits(x_BTD)``: of all of them at once, or where they are many of a block of tokens at a time."""
        if targets_BT.size * self.config.vocab_size <= _LOGITS:
            return cross_entropy(self.logits(x_BTD), targets_BT, mask_BT)

        def run(batched, head_DV):
            x_BTD, targets_BT, mask_BT = batched
            scale = self.config.logit_scale
            return (), projected_cross_entropy(x_BTD, head_DV, targets_BT, mask_BT, scale=scale)

        return per_shard(run, (x_BTD, targets_BT, mask_BT), self._read_head(x_BTD.dtype), summed=True)[1]

    def _read_head(self, dtype) -> Float[Array, "D V"]:
        return read(self.embedding_VD, dtype).T if self.head_DV is None else read(self.head_DV, dtype)

    def init_cache(self, batch: int, max_length: int, dtype=None) -> Cache:
        """An empty cache for ``batch`` rows of up to ``max_length`` tokens; attention's keys and values are stored in
        ``dtype`` (the compute dtype by default), recurrent states in float32 or wider."""
        dtype = self.config.compute_dtype if dtype is None else dtype
        states = tuple(
            init_states(stacked, stage.repeats, batch, max_length, dtype)
            for stacked, stage in zip(self.stages, self.plan, strict=True)
        )
        return Cache(jnp.zeros(batch, jnp.int32), states)


def positions_of(tokens_BT, segment_ids_BT=None, cached_B=None) -> Int[Array, "B T"]:
    """Place of each token in its document: restarts at each segment, continues from the cached length.

    Padding takes no place; its own position is that of the last real token before it (0 where there is none).
    """
    B, T = tokens_BT.shape
    if segment_ids_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    else:
        real_BT, reset_BT = real_and_reset(segment_ids_BT)
        rank_BT = jnp.cumsum(real_BT, axis=1) - 1
        start_BT = jax.lax.cummax(jnp.where(reset_BT, rank_BT, 0), axis=1)
        positions_BT = jnp.maximum(rank_BT - start_BT, 0)
    return positions_BT if cached_B is None else positions_BT + cached_B[:, None]
