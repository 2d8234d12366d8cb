"""DeepSeek sparse attention: latent attention to the tokens that a lightning indexer chooses (DeepSeek-V3.2-Exp, 2025).

The recipe has two stages, from a dense checkpoint of the same ``MLAConfig``. ``stage='warm_up'`` attends to everything and trains the
indexer on where attention looks; ``stage='sparse'`` attends to the selected tokens, the indexer learns from those alone, and
the rest of the model from the language loss alone: the indexer's inputs are detached and the selection passes no gradient.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from research.axes import Array, Float
from research.layers import caches
from research.layers.context import Context, HandedOn, without_padding
from research.layers.mla import MLA, MLAConfig, absorb, read_out, spread
from research.layers.parameters import constant, normal, project, read
from research.ops.attention import attention, tokens_of
from research.ops.norms import layer_norm
from research.ops.rope import RopeLayout, rope
from research.ops.sparse_attention import (
    IndexStatistics,
    attend_selected,
    few_words,
    index_divergence,
    select,
    select_mask,
    select_words,
)
from research.sharding.mesh import P, per_shard

# Keys for each that is selected up to which a prefill is faster that scores them all under a mask.
MASKED = 64


@dataclasses.dataclass(frozen=True)
class DSAConfig(MLAConfig):
    """``MLAConfig`` with an indexer of ``index_heads`` heads of ``index_width``, whose first ``rope_width`` channels turn.

    Attributes:
      top_k: tokens each token attends to; rows no longer than that are dense attention exactly.
      index_layout: of the indexer's RoPE (V3.2 'halves', GLM-5 'pairs').
      precision: of the indexer's products while it selects ('float32', 'bfloat16', 'float8').
      indices: 'own'; 'given' also hands its selection to later layers, and 'shared' takes the last one handed on and has
        no indexer (GLM-5.2).
      stage: 'warm_up' or 'sparse' (see above).
      index_loss: coefficient of the mean divergence, per layer.
      prefill: attention to the selection 'masked' or 'gathered'; None masks while keys are up to ``MASKED``·top_k.
    """

    index_heads: int = 4
    index_width: int = 64
    top_k: int = 256
    index_layout: RopeLayout = "halves"
    precision: Literal["float32", "bfloat16", "float8"] = "float32"
    indices: Literal["own", "given", "shared"] = "own"
    stage: Literal["warm_up", "sparse"] = "sparse"
    index_loss: float = 1.0
    prefill: Literal["masked", "gathered"] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("index_heads", "index_width", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.index_width < self.rope_width:
            raise ValueError(f"index_width must be at least rope_width, {self.rope_width}, got {self.index_width}")
        if self.rope_theta is None and self.indices != "shared":
            raise ValueError("rope_theta must be a number where there is an indexer, which turns its keys; got None")
        if self.precision == "float8" and self.index_width & (self.index_width - 1):
            raise ValueError(f"precision='float8' needs index_width to be a power of two, got {self.index_width}")

    def flops(self, width: int, context: float) -> float:
        """Of attention to the selected tokens in the unabsorbed form, as ``MLAConfig`` counts, and of the indexer."""
        dense = self.stage == "warm_up"
        attention = super().flops(width, context if dense else min(context, self.top_k))
        if self.indices == "shared":
            return attention
        query = (self.query_latent or width) * self.index_heads * self.index_width
        return attention + 2 * (
            query + width * (self.index_width + self.index_heads) + self.index_heads * self.index_width * context
        )

    def losses(self, statistics: IndexStatistics) -> dict[str, Array]:
        """The indexer's loss, coefficient included, from sums over the whole batch."""
        return {"index_loss": self.index_loss * statistics.divergence / jnp.maximum(statistics.queries, 1)}

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "DSA":
        return DSA(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)


class SparseCache(NamedTuple):
    """``LatentCache`` with the indexer's keys of the same tokens (width 0 in a layer without an indexer)."""

    latent_BSK: Float[Array, "B S K"]
    index_BSK: Float[Array, "B S K"]


class Indexer(nnx.Module):
    """Queries from the latent of the layer's own queries, one key a token, and a weight a head."""

    def __init__(self, config: DSAConfig, width: int, *, rngs: nnx.Rngs, param_dtype):
        c, D, R = config, width, config.query_latent or width
        self.config = config
        self.w_query_RN = normal(rngs, (R, c.index_heads * c.index_width), param_dtype, P("fsdp", None), fan_in=R)
        self.w_key_DK = normal(rngs, (D, c.index_width), param_dtype, P("fsdp", None), fan_in=D)
        self.scale_K = constant(jnp.ones(c.index_width), param_dtype, P(None))
        self.bias_K = constant(jnp.zeros(c.index_width), param_dtype, P(None))
        self.w_head_DH = normal(rngs, (D, c.index_heads), param_dtype, P("fsdp", None), fan_in=D)

    def __call__(self, x_BTD, latent_BTR, context: Context):
        """(q_BTHK, k_BTK, w_BTH), detached from what they are made from."""
        c, dtype = self.config, x_BTD.dtype
        x_BTD, latent_BTR = jax.lax.stop_gradient((x_BTD, latent_BTR))
        q_BTN = project(latent_BTR, read(self.w_query_RN, dtype))
        q_BTHK = q_BTN.reshape(*x_BTD.shape[:2], c.index_heads, c.index_width)
        k_BTK = layer_norm(project(x_BTD, read(self.w_key_DK, dtype)), eps=1e-6)
        k_BTK = k_BTK * read(self.scale_K, dtype) + read(self.bias_K, dtype)
        turn = {"theta": c.rope_theta, "layout": c.index_layout, "scaling": c.rope_scaling, "rotary_dim": c.rope_width}
        q_BTHK = rope(q_BTHK, context.positions_BT, **turn)
        k_BTK = rope(k_BTK[:, :, None], context.positions_BT, **turn)[:, :, 0]
        w_BTH = project(x_BTD, read(self.w_head_DH, dtype), dtype=jnp.promote_types(dtype, jnp.float32))
        return q_BTHK, k_BTK, w_BTH * (c.index_heads * c.index_width) ** -0.5


class DSA(MLA):
    """Auxiliary: ``IndexStatistics`` while training without a cache, None otherwise and in a layer without an indexer."""

    config: DSAConfig

    def __init__(self, config: DSAConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        super().__init__(config, width, depth=depth, rngs=rngs, param_dtype=param_dtype)
        own = config.indices != "shared"
        self.indexer = Indexer(config, width, rngs=rngs, param_dtype=param_dtype) if own else None

    def __call__(self, x_BTD, state: Any, context: Context) -> tuple[Any, Any, Any]:
        c = self.config
        x_BTD = without_padding(x_BTD, context)
        q_BTHK, latent_BTR = self.queries(x_BTD, context)
        index = None if self.indexer is None else self.indexer(x_BTD, latent_BTR, context)
        batched = (
            q_BTHK, self.latents(x_BTD, context), index, context.selected_BTN, state, context.segment_ids_BT, context.cached_B
        )  # fmt: skip
        learns = not context.deterministic and state is None and index is not None

        def run(batched, weights):
            *out, statistics = self._mix(batched, weights, learns)
            return tuple(out), statistics

        out: Any = per_shard(run, batched, self.spreading(x_BTD.dtype), summed=True)
        (o_BTHV, state, selected_BTN), statistics = out
        if c.indices == "given":
            return self.output(o_BTHV), state, HandedOn(statistics, selected_BTN)
        return self.output(o_BTHV), state, statistics

    @property
    def hands_on(self) -> bool:
        return self.config.indices == "given"

    def init_state(self, batch: int, max_length: int, dtype) -> Any:
        index_width = 0 if self.indexer is None else self.config.index_width
        latent_BSK = super().init_state(batch, max_length, dtype).latent_BSK
        return SparseCache(latent_BSK, jnp.zeros((batch, max_length, index_width), dtype))

    def _mix(self, batched: Any, weights, learns: bool):
        """(output, state, selection or None where all is selected, statistics or None)."""
        q_BTHK, latent_BSK, index, selected_BTN, cache, segment_ids_BT, cached_B = batched
        c, (B, T) = self.config, q_BTHK.shape[:2]
        w_key_HKN, w_value_HVK = weights
        parts: Any = index or (None, None, None)
        index_q_BTHK, index_k_BSK, w_BTH = parts
        if cache is None:
            query = source = tokens_of(segment_ids_BT, (B, T))
            mask, absorbed = {"segment_ids_BT": segment_ids_BT}, c.form == "absorbed"
        else:
            slots = caches.whole(segment_ids_BT, cached_B, T, cache.latent_BSK.shape[1])
            index_BSK = cache.index_BSK if index_k_BSK is None else caches.write(cache.index_BSK, index_k_BSK, slots)
            cache = SparseCache(caches.write(cache.latent_BSK, latent_BSK, slots), index_BSK)
            query, source, mask, absorbed = slots.query, slots.source, slots.mask, c.absorbs(T)
            latent_BSK, index_k_BSK = (x.astype(q_BTHK.dtype) for x in cache)
        S = latent_BSK.shape[1]
        dense = c.top_k >= S or c.stage == "warm_up"
        prefill = c.prefill or ("masked" if T > 8 and MASKED * c.top_k >= S else "gathered")
        gathered = not dense and prefill == "gathered"
        if dense:
            selected_BTN = None
        elif index is not None:
            # The loss and later layers want slots; a mask takes one bit a key, where that is less.
            slots_wanted = gathered or learns or self.hands_on or not few_words(S, c.top_k)
            choose = select if slots_wanted else select_mask
            selected_BTN = choose(index_q_BTHK, index_k_BSK, w_BTH, query, source, top_k=c.top_k, precision=c.precision)
        elif selected_BTN is None:
            raise ValueError("indices='shared' needs a layer with indices='given' before it, got none")
        statistics = None
        if learns:
            statistics = index_divergence(
                index_q_BTHK, index_k_BSK, w_BTH, absorb(q_BTHK, w_key_HKN), latent_BSK[:, :, None], query, source,
                scale=c.score_scale, index_BTN=selected_BTN, top_k=c.top_k if c.stage == "warm_up" else None,
            )  # fmt: skip
        if absorbed or gathered:
            # Gathered latents are read by all heads: keys and values of each would be made for every query anew.
            q_BTHK, k_BSGK = absorb(q_BTHK, w_key_HKN), latent_BSK[:, :, None]
            v_BSGV = k_BSGK
        else:
            k_BSGK, v_BSGV = spread(latent_BSK, *weights)
        if gathered:
            assert selected_BTN is not None
            o_BTHV = attend_selected(q_BTHK, k_BSGK, None, selected_BTN, scale=c.score_scale)
        else:
            own: dict[str, Any] = {"implementation": c.implementation}
            if selected_BTN is not None:
                slots = selected_BTN.dtype != jnp.uint32
                as_words = slots and few_words(S, c.top_k)
                own = {"selected_BTN": select_words(selected_BTN, S) if as_words else selected_BTN}
            options: dict[str, Any] = {"scale": c.score_scale, **mask, **own}
            o_BTHV = attention(q_BTHK, k_BSGK, v_BSGV, **options)
        if absorbed or gathered:
            o_BTHV = read_out(o_BTHV[..., : c.latent], w_value_HVK)
        return o_BTHV, cache, selected_BTN, statistics
