"""Softmax attention to selected keys: gathered, or all of them under a mask."""

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
    form: str = "gathered",
) -> Float[Array, "B T H V"]:
    """Attention of each query to the keys in its slots ``index_BTN`` alone; slot S is none, and a query of none outputs 0.

    Args:
      index_BTN: distinct slots of each query, from ``select``.
      v_BSGV: values; None where the keys are the values too (MLA's latents): gathered once.
      scale: of the scores; K^-1/2 by default.
      form: 'gathered' reads N keys a query; 'masked' scores all S and leaves out the others, which is cheaper until S is
        several times N. Equal but for rounding.

    Raises:
      ValueError: H is not a multiple of G; an unknown form.
    """
    B, _, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    if H % G:
        raise ValueError(f"query heads must be a multiple of key heads, got {H} over {G}")
    if form not in ("gathered", "masked"):
        raise ValueError(f"form must be 'gathered' or 'masked', got {form!r}")
    q_BTHK = q_BTHK * jnp.asarray(K**-0.5 if scale is None else scale, q_BTHK.dtype)
    gathered = form == "gathered"

    def block(q_BCHK, index_BCN):
        keys, mask_BCN = k_BSGK, chosen(index_BCN, S)
        if gathered:
            keys, mask_BCN = gather(k_BSGK, index_BCN), index_BCN < S
        values = keys if v_BSGV is None else gather(v_BSGV, index_BCN) if gathered else v_BSGV
        weight_BCHN = masked_softmax(scores(q_BCHK, keys), mask_BCN[:, :, None])
        return read(jnp.where(mask_BCN[:, :, None], weight_BCHN, 0).astype(values.dtype), values)

    N, V = index_BTN.shape[-1], 0 if v_BSGV is None else v_BSGV.shape[-1]
    elements = N * max(G * (K + V), H) if gathered else S * H
    return map_queries(block, (q_BTHK, index_BTN), queries_per_block(B * elements))


def scores(q_BCHK, keys):
    """Products of queries with keys [B, S, G, K], or with keys of each query's own [B, C, N, G, K]; float32 or wider."""
    wide = jnp.promote_types(q_BCHK.dtype, jnp.float32)
    equation = "BCGRK,BSGK->BCGRS" if keys.ndim == 4 else "BCGRK,BCNGK->BCGRN"
    score = jnp.einsum(equation, _grouped(q_BCHK, keys.shape[-2]), keys, preferred_element_type=wide)
    return score.reshape(*q_BCHK.shape[:3], -1)


def read(weight_BCHN, values):
    """Means of values [B, S, G, V], or of each query's own [B, C, N, G, V]."""
    equation = "BCGRS,BSGV->BCGRV" if values.ndim == 4 else "BCGRN,BCNGV->BCGRV"
    o_BCGRV = jnp.einsum(equation, _grouped(weight_BCHN, values.shape[-2]), values)
    return o_BCGRV.reshape(*weight_BCHN.shape[:3], -1)


def gather(x_BS, index_BCN):
    """[B, S, …] at each query's slots: [B, C, N, …]; slot S reads the last one, for a mask to leave out."""
    rows_B11 = jnp.arange(x_BS.shape[0])[:, None, None]
    return x_BS[rows_B11, jnp.minimum(index_BCN, x_BS.shape[1] - 1)]


def chosen(index_BCN, slots: int):
    """[B, C, S]: whether a slot is among the query's."""
    B, C, _ = index_BCN.shape
    rows_B11, queries_1C1 = jnp.arange(B)[:, None, None], jnp.arange(C)[None, :, None]
    return jnp.zeros((B, C, slots), bool).at[rows_B11, queries_1C1, index_BCN].set(True, mode="drop")


def _grouped(x_BCHK, groups: int):
    B, C, H, K = x_BCHK.shape
    return x_BCHK.reshape(B, C, groups, H // groups, K)
