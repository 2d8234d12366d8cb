"""Softmax attention to selected keys, gathered."""

import jax.numpy as jnp

from research.axes import Array, Float, Int
from research.ops.attention.dense import masked_softmax
from research.ops.sparse_attention.blocks import map_queries, queries_per_block


def attend_selected(
    q_BTHK: Float[Array, "B T H K"],
    k_BSGK: Float[Array, "B S G K"],
    v_BSGV: Float[Array, "B S G V"] | None,
    index_BTN: Int[Array, "B T N"],
    *,
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """Attention of each query to the keys in its slots ``index_BTN`` alone; slot S is none, and a query of none outputs 0.

    N keys a query are read. Until S is many times N it is cheaper to score them all under a mask, which is
    ``attention(..., selected_BTN=index_BTN)``; the two are equal but for rounding.

    Args:
      index_BTN: distinct slots of each query, from ``select``.
      v_BSGV: values; None where the keys are the values too (MLA's latents): gathered once.
      scale: of the scores; K^-1/2 by default.

    Raises:
      ValueError: H is not a multiple of G.
    """
    B, _, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    if H % G:
        raise ValueError(f"query heads must be a multiple of key heads, got {H} over {G}")
    q_BTHK = q_BTHK * jnp.asarray(K**-0.5 if scale is None else scale, q_BTHK.dtype)

    def block(q_BCHK, index_BCN):
        keys_BCNGK, mask_BC1N = gather(k_BSGK, index_BCN), (index_BCN < S)[:, :, None]
        values_BCNGV = keys_BCNGK if v_BSGV is None else gather(v_BSGV, index_BCN)
        weight_BCHN = masked_softmax(scores(q_BCHK, keys_BCNGK), mask_BC1N)
        return read(jnp.where(mask_BC1N, weight_BCHN, 0).astype(values_BCNGV.dtype), values_BCNGV)

    N, V = index_BTN.shape[-1], 0 if v_BSGV is None else v_BSGV.shape[-1]
    return map_queries(block, (q_BTHK, index_BTN), queries_per_block(B * N * max(G * (K + V), H)))


def scores(q_BCHK, keys):
    """Products of queries with keys [B, S, G, K], or with keys of each query's own [B, C, N, G, K]; float32 or wider."""
    wide = jnp.promote_types(q_BCHK.dtype, jnp.float32)
    equation = "BCGRK,BSGK->BCGRS" if keys.ndim == 4 else "BCGRK,BCNGK->BCGRN"
    score = jnp.einsum(equation, _grouped(q_BCHK, keys.shape[-2]), keys, preferred_element_type=wide)
    return score.reshape(*q_BCHK.shape[:3], -1)


def read(weight_BCHN, values_BCNGV):
    """Means of each query's own values."""
    o_BCGRV = jnp.einsum("BCGRN,BCNGV->BCGRV", _grouped(weight_BCHN, values_BCNGV.shape[-2]), values_BCNGV)
    return o_BCGRV.reshape(*weight_BCHN.shape[:3], -1)


def gather(x_BS, index_BCN):
    """[B, S, …] at each query's slots: [B, C, N, …]; slot S reads the last one, for a mask to leave out."""
    rows_B11 = jnp.arange(x_BS.shape[0])[:, None, None]
    return x_BS[rows_B11, jnp.minimum(index_BCN, x_BS.shape[1] - 1)]


def _grouped(x_BCHK, groups: int):
    B, C, H, K = x_BCHK.shape
    return x_BCHK.reshape(B, C, groups, H // groups, K)
