"""The lightning indexer: scores in few heads and low precision, and the top-k of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from research.axes import Array, Float, Int
from research.ops.attention import Tokens, visible
from research.ops.sparse_attention.blocks import map_queries, queries_per_block

PRECISIONS = ("float32", "bfloat16", "float8")
_FLOAT8 = jnp.float8_e4m3fn
# Channels that share one scale, and the largest number of e4m3.
_BLOCK, _MOST = 128, 448.0


def index_scores(
    q_BTHK: Float[Array, "B T H K"],
    k_BSK: Float[Array, "B S K"] | Float[Array, "B T S K"],
    w_BTH: Float[Array, "B T H"],
    *,
    precision: str = "float32",
) -> Float[Array, "B T S"]:
    """``I_ts = Σ_h w_th · ReLU(q_th · k_s)`` (DeepSeek-V3.2-Exp, eq. 1): one key head, weights of either sign; float32 or wider.

    Args:
      k_BSK: keys that all queries meet, or with an axis T those of each query's own.
      precision: of the products' factors; sums are float32. 'float8' turns both by a Hadamard matrix (which changes no
        product) and rounds to e4m3 with one power of two as the scale of each 128 channels.

    Raises:
      ValueError: an unknown precision, or 'float8' with a width that is no power of two.
    """
    wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
    if precision == "bfloat16":
        q_BTHK, k_BSK = q_BTHK.astype(jnp.bfloat16), k_BSK.astype(jnp.bfloat16)
    elif precision == "float8":
        q_BTHK, k_BSK = round_float8(hadamard(q_BTHK)), round_float8(hadamard(k_BSK))
    elif precision != "float32":
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    equation = "BTHK,BSK->BTHS" if k_BSK.ndim == 3 else "BTHK,BTSK->BTHS"
    product_BTHS = jnp.einsum(equation, q_BTHK, k_BSK, preferred_element_type=wide)
    return jnp.einsum("BTHS,BTH->BTS", jax.nn.relu(product_BTHS), w_BTH.astype(wide))


def select(
    q_BTHK: Float[Array, "B T H K"],
    k_BSK: Float[Array, "B S K"],
    w_BTH: Float[Array, "B T H"],
    query: Tokens,
    source: Tokens,
    *,
    top_k: int,
    precision: str = "float32",
) -> Int[Array, "B T N"]:
    """The slots of the ``min(top_k, S)`` visible keys of the highest score, for each query, best first.

    Among equal scores the lowest slot comes first (zeros of either sign are equal). Where a query sees fewer keys than that,
    the rest hold S: none. No gradient passes.

    Raises:
      ValueError: top_k below 1; as ``index_scores``.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    S, most = k_BSK.shape[1], min(top_k, k_BSK.shape[1])
    q_BTHK, k_BSK, w_BTH = jax.lax.stop_gradient((q_BTHK, k_BSK, w_BTH))

    def block(q_BCHK, w_BCH, query):
        score_BCS = index_scores(q_BCHK, k_BSK, w_BCH, precision=precision)
        score_BCS = jnp.where(visible(query, source), one_zero(score_BCS), -jnp.inf)
        top_BCN, slot_BCN = jax.lax.top_k(score_BCS, most)
        return jnp.where(top_BCN > -jnp.inf, slot_BCN.astype(jnp.int32), S)

    B, _, H, _ = q_BTHK.shape
    return map_queries(block, (q_BTHK, w_BTH, query), queries_per_block(B * (H + 2) * S))


def one_zero(score: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Scores whose zeros are alike, so that the lowest slot wins: a negative weight makes −0 of a key no head answers to."""
    return jnp.where(score == 0, 0, score)


def hadamard(x: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    """``x H / √K`` with Sylvester's matrix: orthogonal, and spreads one large channel over all.

    Raises:
      ValueError: K is no power of two.
    """
    K = x.shape[-1]
    if K & (K - 1):
        raise ValueError(f"the width of a Hadamard matrix must be a power of two, got {K}")
    return x @ jnp.asarray(_sylvester(K), x.dtype)


def round_float8(x: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
    """x rounded to e4m3 with a power of two as the scale of each 128 channels (the last block may be shorter)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    K = x.shape[-1]
    blocks = jnp.pad(x.astype(wide), [(0, 0)] * (x.ndim - 1) + [(0, -K % _BLOCK)]).reshape(*x.shape[:-1], -1, _BLOCK)
    largest = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1, keepdims=True), 1e-4)
    # From the bits: exp2 and log2 are off by a rounding or two, and the scale would be no power of two.
    fraction, exponent = jnp.frexp(largest / _MOST)
    scale = jnp.ldexp(jnp.ones_like(largest), exponent - (fraction == 0.5))
    rounded = (blocks / scale).astype(_FLOAT8).astype(wide) * scale
    return rounded.reshape(*x.shape[:-1], -1)[..., :K]


@functools.cache
def _sylvester(K: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < K:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix * K**-0.5
