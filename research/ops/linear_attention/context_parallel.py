"""The recurrence over a sequence that is sharded on a mesh axis, for use inside ``jax.shard_map``.

What a shard does to the state is affine, S ← M S + N, and its outputs are affine in the state it receives. So each shard
runs on its own tokens from a zero state, the shards exchange (M, N) in float32 [K, K + V] a head, and each one adds
what its true initial state contributes. For the delta rule M is what the shard makes of the identity: K more value
columns with zero values in the same call. For additive writes M is the shard's total decay.
"""

from typing import Any

import jax
import jax.numpy as jnp

from research.axes import Array, Float, Int
from research.ops.linear_attention.dispatch import check_arguments, check_scale, linear_attention, state_dtype
from research.ops.linear_attention.segments import fold
from research.ops.segments import real_and_reset, select
from research.ops.sequence_shards import compose, previous_id


def context_parallel(
    q_BTGK: Float[Array, "B T G K"],
    k_BTGK: Float[Array, "B T G K"],
    v_BTHV: Float[Array, "B T H V"],
    *,
    axis_name: str,
    log_decay: Float[Array, "..."] | None = None,
    beta: Float[Array, "B T H"] | None = None,
    scale: float = 1.0,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """``linear_attention`` where T is this shard's part of a sequence sharded over the mesh axis ``axis_name``.

    Arguments, result and errors are those of ``linear_attention``; ``initial_state`` is that of the whole sequence and the
    returned state is the one after its last token, both the same on every shard. Segments may cross shards.
    """
    check_arguments(q_BTGK, k_BTGK, v_BTHV, log_decay, beta, initial_state, segment_ids)
    scale = check_scale(scale)
    B, T, H, V = v_BTHV.shape
    K = k_BTGK.shape[-1]
    dtype = state_dtype(q_BTGK, k_BTGK, v_BTHV, log_decay, beta, initial_state)
    state_BHKV = jnp.zeros((B, H, K, V), dtype) if initial_state is None else initial_state.astype(dtype)
    g = None if log_decay is None else log_decay.astype(dtype)
    if g is not None and g.ndim == 1:
        g = jnp.broadcast_to(g, (B, T, H))
    real_BT = None
    if segment_ids is not None:
        real_BT, reset_BT = real_and_reset(segment_ids, previous_id(segment_ids, axis_name))
        q_BTGK, k_BTGK, v_BTHV, g, beta = fold(real_BT, reset_BT, q_BTGK, k_BTGK, v_BTHV, g, beta, dtype)
    options: dict[str, Any] = dict(log_decay=g, scale=scale, implementation=implementation, chunk_size=chunk_size)
    if beta is None:
        o_BTHV, N_BHKV = linear_attention(q_BTGK, k_BTGK, v_BTHV, **options)
        to_BTHK = jnp.repeat(q_BTGK.astype(dtype), H // q_BTGK.shape[2], axis=2) * scale
        M = None
        if g is not None:
            decay = jnp.exp(jnp.cumsum(g if g.ndim == 4 else g[..., None], axis=1))
            to_BTHK = decay * to_BTHK
            M = decay[:, -1, :, :, None]
        incoming_BHKV, final_BHKV = compose(lambda M, S: S if M is None else M * S, M, N_BHKV, state_BHKV, axis_name)
    else:
        wide_BTHV = jnp.concatenate([v_BTHV.astype(dtype), jnp.zeros((B, T, H, K), dtype)], axis=-1)
        eye = jnp.broadcast_to(jnp.eye(K, dtype=dtype), (B, H, K, K))
        start = jnp.concatenate([jnp.zeros((B, H, K, V), dtype), eye], axis=-1)
        wide_BTHV, end = linear_attention(q_BTGK, k_BTGK, wide_BTHV, beta=beta, initial_state=start, **options)
        o_BTHV, to_BTHK = wide_BTHV[..., :V], wide_BTHV[..., V:]
        incoming_BHKV, final_BHKV = compose(_matmul, end[..., V:], end[..., :V], state_BHKV, axis_name)
    carried_BTHV = jnp.einsum("BTHK,BHKV->BTHV", to_BTHK, incoming_BHKV)
    o_BTHV = (o_BTHV.astype(dtype) + carried_BTHV).astype(v_BTHV.dtype)
    return o_BTHV if real_BT is None else select(real_BT, o_BTHV), final_BHKV


def _matmul(M_BHKK, S_BHKV):
    return jnp.einsum("BHij,BHjv->BHiv", M_BHKK, S_BHKV, precision=jax.lax.Precision.HIGHEST)
