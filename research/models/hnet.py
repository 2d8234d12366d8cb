"""H-Net (Hwang, Wang & Gu 2025, arXiv 2507.07955): a mixer that is a model of its own, over chunks that it learns to cut.

The layers around it in the residual stream are its encoder and decoder; put it behind their norm and without a skip:
``Residual("chunks", HNetConfig(...), skip_scale=0.0)``. Its own layers may hold another: two stages.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from research.axes import Array, Float, Int
from research.layers.context import Context, Nested, without_padding
from research.layers.parameters import constant, normal, project, read
from research.models.config import HNetConfig
from research.models.stages import build_stages, factorise, init_states, run_stages
from research.ops.attention import tokens_of
from research.ops.dynamic_chunking import (
    chunk_statistics,
    gather_chunks,
    route,
    spread_chunks,
    straight_through,
)
from research.sharding.mesh import P, per_shard


class HNetState(NamedTuple):
    """The last token's query, chunks so far and their running mean, and the states of the layers over chunks."""

    last_q_BK: Float[Array, "B K"]
    chunks_B: Int[Array, " B"]
    mean_BD: Float[Array, "B D"]
    stages: tuple[Any, ...]


class HNet(nnx.Module):
    """Auxiliary: ``Nested``, whose own are ``ChunkStatistics``."""

    def __init__(self, config: HNetConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        D, W = width, config.width or width
        if W < D:
            raise ValueError(f"width over chunks must be at least the width around them, {D}, got {W}")
        self.config, self.width = config, W
        self.plan = factorise(config.layers)
        # Both start as the identity: a chunk begins where neighbours differ.
        self.w_query_DK = constant(jnp.eye(D), param_dtype, P("fsdp", None))
        self.w_key_DK = constant(jnp.eye(D), param_dtype, P("fsdp", None))
        self.w_residual_DD = constant(jnp.zeros((D, D)), jnp.float32, P("fsdp", None))
        self.residual_bias_D = constant(jnp.zeros(D), jnp.float32, P(None)) if config.residual_bias else None
        self.pad_D = normal(rngs, (W - D,), param_dtype, P(None), fan_in=W) if W > D else None
        inside = depth + len(config.layers)
        stages, _ = build_stages(self.plan, W, depth=inside, rngs=rngs, param_dtype=param_dtype)
        self.stages = nnx.List(stages)
        self.norm = config.final_norm.build(W, param_dtype=param_dtype)

    def __call__(self, x_BTD, state: HNetState | None, context: Context):
        dtype, ids_BT = x_BTD.dtype, context.segment_ids_BT
        if ids_BT is not None:
            x_BTD = jnp.where((ids_BT > 0)[..., None], x_BTD, 0)
        q_BTK, k_BTK = project(x_BTD, read(self.w_query_DK, dtype)), project(x_BTD, read(self.w_key_DK, dtype))
        last = None
        if state is not None and context.cached_B is not None:
            last = (state.last_q_BK, context.cached_B > 0, state.chunks_B)
        out: Any = per_shard(self._cut, (x_BTD, q_BTK, k_BTK, ids_BT, last), summed=True)
        (routing, x_BMD, p_BM, ids_BM, place_BM, last_q_BK), statistics = out

        h_BMD, states, auxes = self._over_chunks(x_BMD, ids_BM, place_BM, state, context)

        mean_BD = None if state is None else state.mean_BD
        z_BTD, mean_BD = per_shard(self._spread, (h_BMD, p_BM, ids_BM, routing, ids_BT, mean_BD))
        wide = jnp.promote_types(dtype, jnp.float32)
        skip_BTD = project(x_BTD.astype(wide), read(self.w_residual_DD, wide))
        if self.residual_bias_D is not None:
            skip_BTD = without_padding(skip_BTD + read(self.residual_bias_D, wide), context)
        y_BTD = z_BTD.astype(wide) * straight_through(routing)[..., None] + skip_BTD
        if state is not None:
            count_B = jnp.sum(ids_BM > 0, axis=1, dtype=state.chunks_B.dtype)
            last_q_BK = last_q_BK.astype(state.last_q_BK.dtype)
            state = HNetState(last_q_BK, state.chunks_B + count_B, mean_BD, states)
        return y_BTD.astype(dtype), state, Nested(statistics, auxes)

    def init_state(self, batch: int, max_length: int, dtype) -> HNetState:
        D, wide = self.w_query_DK[...].shape[-1], jnp.promote_types(dtype, jnp.float32)
        states = tuple(
            init_states(stacked, stage.repeats, batch, max_length, dtype)
            for stacked, stage in zip(self.stages, self.plan, strict=True)
        )
        return HNetState(jnp.zeros((batch, D), dtype), jnp.zeros(batch, jnp.int32), jnp.zeros((batch, D), wide), states)

    def _cut(self, batched, _):
        x_BTD, q_BTK, k_BTK, ids_BT, last = batched
        last_q_BK, continues_B, chunks_B = last or (None, None, None)
        T = x_BTD.shape[1]
        # A cached call may begin a chunk at every token: what it drops would depend on where the calls are cut.
        slots = T if last else max(1, min(T, round(self.config.capacity * T)))
        routing, last_q_BK = route(q_BTK, k_BTK, ids_BT, last_q_BK=last_q_BK, continues_B=continues_B)
        x_BMD, p_BM, ids_BM = gather_chunks(x_BTD, routing, ids_BT, slots=slots)
        place_BM = jnp.maximum(tokens_of(ids_BM, (len(ids_BM), slots), chunks_B).place_BT, 0)
        return (routing, x_BMD, p_BM, ids_BM, place_BM, last_q_BK), chunk_statistics(routing, ids_BT)

    def _over_chunks(self, x_BMD, ids_BM, place_BM, state: HNetState | None, context: Context):
        if self.pad_D is not None:
            # Added behind zeros: on a mesh one vector and split rows don't concatenate.
            pad_D = read(self.pad_D, x_BMD.dtype)
            pad_W = jnp.pad(pad_D, (x_BMD.shape[-1], 0))
            x_BMD = jnp.pad(x_BMD, [(0, 0), (0, 0), (0, len(pad_D))]) + pad_W
        inner = Context(
            place_BM,
            ids_BM,
            cached_B=None if state is None else state.chunks_B,
            key=context.key,
            deterministic=context.deterministic,
            remat=context.remat,
        )
        before = None if state is None else state.stages
        x_BMD, states, auxes = run_stages(self.stages, x_BMD, before, inner, unroll=1)
        width = self.w_query_DK[...].shape[-1]
        return self.norm(x_BMD)[..., :width], states, auxes

    def _spread(self, batched, _):
        h_BMD, p_BM, ids_BM, routing, ids_BT, mean_BD = batched
        z_BTD, mean_BD = spread_chunks(h_BMD, p_BM, ids_BM, routing, ids_BT, last_BD=mean_BD)
        return z_BTD, mean_BD
