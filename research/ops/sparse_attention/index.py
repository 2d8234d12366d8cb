"""The lightning indexer: scores in few heads and low precision, and the top-k of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.sparse_attention import tpu_select
from research.axes import Array, Float, Int, UInt32
from research.ops.attention import Tokens, visible
from research.ops.attention.masks import chosen, words
from research.ops.explicit_mesh import vary_alike
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
    q_BTHK, k_BSK = rounded(q_BTHK, precision), rounded(k_BSK, precision)
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


def select_mask(
    q_BTHK: Float[Array, "B T H K"],
    k_BSK: Float[Array, "B S K"],
    w_BTH: Float[Array, "B T H"],
    query: Tokens,
    source: Tokens,
    *,
    top_k: int,
    precision: str = "float32",
    implementation: str | None = None,
) -> UInt32[Array, "B T W"]:
    """The keys that ``select`` selects, as one bit each, for ``attention(..., selected_BTN=...)``. No gradient passes.

    Args:
      implementation: 'xla', 'pallas_tpu', 'pallas_tpu_interpret'; never falls back. None chooses for the platform when the
        call is lowered.

    Raises:
      ValueError: as ``select``; an unknown implementation.
      NotImplementedError: the named implementation cannot serve the call.
    """
    if implementation not in (None, "xla", "pallas_tpu", "pallas_tpu_interpret"):
        raise ValueError(
            f"implementation must be None, xla, pallas_tpu or pallas_tpu_interpret; got {implementation!r}"
        )
    arrays = jax.lax.stop_gradient((q_BTHK, k_BSK, w_BTH))
    xla = functools.partial(_xla_mask, top_k=top_k, precision=precision)
    if implementation == "xla":
        return xla(*arrays, query, source)
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    why = tpu_select.refuses(q_BTHK, k_BSK.shape[1])
    if why and implementation is not None:
        raise NotImplementedError(f"implementation={implementation!r} cannot serve this call: {why}")
    kernel = functools.partial(_kernel_mask, top_k=top_k, precision=precision)
    if implementation is not None:
        return kernel(*arrays, query, source, interpret=implementation.endswith("interpret"))
    if why:
        return xla(*arrays, query, source)
    return jax.lax.platform_dependent(*arrays, query, source, default=xla, tpu=kernel)


def few_words(slots: int, top_k: int) -> bool:
    """Whether one bit for each of ``slots`` keys takes no more memory than ``top_k`` slots do."""
    return tpu_select.LANES * -(-slots // tpu_select.GROUP) <= top_k


def select_words(index_BTN: Int[Array, "B T N"], slots: int) -> UInt32[Array, "B T W"]:
    """What ``select`` returned, of so many ``slots``, as ``select_mask`` says it."""
    block = queries_per_block(index_BTN.shape[0] * slots)
    return map_queries(lambda index_BCN: words(chosen(index_BCN, slots)), (index_BTN,), block)


def _xla_mask(q_BTHK, k_BSK, w_BTH, query, source, **options):
    return select_words(select(q_BTHK, k_BSK, w_BTH, query, source, **options), k_BSK.shape[1])


def _kernel_mask(q_BTHK, k_BSK, w_BTH, query, source, *, top_k, precision, interpret=False):
    factors = rounded(q_BTHK, precision), rounded(k_BSK, precision)
    if precision == "float8":  # exact: few bits, and powers of two
        factors = tuple(x.astype(jnp.bfloat16) for x in factors)
    tokens = [jnp.stack(tokens, axis=-1) for tokens in (query, source)]
    words_BTW = tpu_select.select(*vary_alike((*factors, w_BTH, *tokens)), top_k=top_k, interpret=interpret)
    return jax.lax.bitcast_convert_type(words_BTW, jnp.uint32)


def rounded(x: Float[Array, "*batch K"], precision: str) -> Float[Array, "*batch K"]:
    """A factor of the scores in its ``precision``.

    Raises:
      ValueError: an unknown precision, or 'float8' with a width that is no power of two.
    """
    if precision == "bfloat16":
        return x.astype(jnp.bfloat16)
    if precision == "float8":
        return round_float8(hadamard(x))
    if precision != "float32":
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    return x


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
