"""Softmax attention over packed documents and caches (Vaswani et al. 2017, arXiv 1706.03762)."""

import jax
import jax.numpy as jnp

from research.axes import Array, Float, Int


def attention(
    q_BTHK: Float[Array, "B T H K"],
    k_BSGK: Float[Array, "B S G K"],
    v_BSGV: Float[Array, "B S G V"],
    *,
    scale: float | None = None,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    source_segment_ids_BS: Int[Array, "B S"] | None = None,
    slots_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H V"]:
    """Causal softmax attention, eq. 1: query head i reads key head ``i // (H // G)``.

    A query sees the keys of its own segment at slots up to its own. Id 0 is padding: it sees nothing, nothing sees it,
    and its output is 0 (NaN in it reaches nothing).

    Args:
      scale: of the scores; K^-1/2 by default.
      segment_ids_BT: document of each query; None is one document a row.
      source_segment_ids_BS: document of each key; the queries' own by default, and required where S ≠ T and ids are given.
      slots_BT: the slot of S in which each query's own key lies (a cache's fill); 0 … T-1 by default.

    Raises:
      ValueError: H is not a multiple of G, or S ≠ T without ``source_segment_ids_BS``.
    """
    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    if H % G:
        raise ValueError(f"query heads must be a multiple of key heads, got {H} over {G}")
    if source_segment_ids_BS is None:
        if segment_ids_BT is not None and S != T:
            raise ValueError(f"source_segment_ids_BS is needed where keys ({S}) and queries ({T}) differ in number")
        source_segment_ids_BS = segment_ids_BT
    slots_BT = jnp.broadcast_to(jnp.arange(T), (B, T)) if slots_BT is None else slots_BT
    mask_BTS = jnp.arange(S) <= slots_BT[:, :, None]
    if source_segment_ids_BS is not None:
        segment_ids_BT = jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT
        mask_BTS &= segment_ids_BT[:, :, None] == source_segment_ids_BS[:, None, :]
        q_BTHK = _zero_padding(q_BTHK, segment_ids_BT)
        k_BSGK = _zero_padding(k_BSGK, source_segment_ids_BS)
        v_BSGV = _zero_padding(v_BSGV, source_segment_ids_BS)
    wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K) * jnp.asarray(K**-0.5 if scale is None else scale, q_BTHK.dtype)
    score_BGRTS = jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=wide)
    score_BGRTS = jnp.where(mask_BTS[:, None, None], score_BGRTS, jnp.finfo(wide).min)
    weight_BGRTS = jax.nn.softmax(score_BGRTS, axis=-1).astype(v_BSGV.dtype)
    o_BTGRV = jnp.einsum("BGRTS,BSGV->BTGRV", weight_BGRTS, v_BSGV)
    o_BTHV = o_BTGRV.reshape(B, T, H, v_BSGV.shape[-1])
    return o_BTHV if segment_ids_BT is None else _zero_padding(o_BTHV, segment_ids_BT)


def _zero_padding(x_BTHK, segment_ids_BT):
    return jnp.where((segment_ids_BT > 0)[:, :, None, None], x_BTHK, 0)
