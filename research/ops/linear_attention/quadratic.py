"""The masked full matrix: the same map as the recurrence, as one T × T matrix a head (state-space duality, Dao and Gu
2024). Time and memory are quadratic in T; it is here to show the duality and to check the other forms. With strong writes
of correlated keys (β 1.9, cosine 0.9) A is ill-conditioned and errors grow with T, which they don't in the other forms: 6e-6
of a value at T = 256 in float32, 2e-5 at 1024.

    P_ij = ⟨q_i, k_j⟩ e^{span(j, i]}  (i ≥ j)        A_ij = β_i ⟨k_i, k_j⟩ e^{span(j, i]}  (i > j)
    R = v, or β (v − e^{span[0, i]} k S₀)             U = R, or (I + A)⁻¹ R
    O = scale · (e^{span[0, i]} q S₀ + P U)           S = e^{span[0, T)} S₀ + Σ_j e^{span(j, T)} k_j U_jᵀ
"""

import jax
import jax.numpy as jnp

from research.ops.linear_attention.spans import channel_products, prefix_spans, suffix_spans, token_spans
from research.ops.linear_attention.state import gram

_PIECE = 64
"""Tokens, a power of two, that are summed in one go."""


def quadratic(q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, state_BHKV, scale):
    """One block over the whole sequence, padded to a power of two."""
    T = v_BTHV.shape[1]
    length = 1 << (T - 1).bit_length()
    dtype = state_BHKV.dtype

    def heads_first(x):
        x = jnp.pad(x.astype(dtype), [(0, 0), (0, length - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x, 1, 2)

    q, k, v = heads_first(q_BTGK), heads_first(k_BTGK), heads_first(v_BTHV)
    g = None if g_BTH is None else heads_first(g_BTH)
    beta = None if beta_BTH is None else heads_first(beta_BTH)
    o_BHTV, state_BHKV = block(q, k, v, g, beta, state_BHKV, scale)
    return jnp.moveaxis(o_BHTV[:, :, :T], 2, 1).astype(v_BTHV.dtype), state_BHKV


def block(q_BGCK, k_BGCK, v_BHCV, g_BHC, beta_BHC, state_BHKV, scale):
    """The map above for one block of C tokens (a power of two), heads before tokens."""
    C = v_BHCV.shape[2]
    heads_per_group = v_BHCV.shape[1] // k_BGCK.shape[1]
    repeat = lambda x: jnp.repeat(x, heads_per_group, axis=1)  # noqa: E731
    q_BHCK, k_BHCK = repeat(q_BGCK), repeat(k_BGCK)
    kk_BHCC = None
    if g_BHC is None or g_BHC.ndim == 3:
        mask_CC = jnp.tril(jnp.ones((C, C), bool))
        decay_BHCC = mask_CC if g_BHC is None else jnp.exp(token_spans(g_BHC))
        qk_BHCC = repeat(_dot_t(q_BGCK, k_BGCK)) * decay_BHCC
        if beta_BHC is not None:
            kk_BHCC = repeat(gram(k_BGCK)) * decay_BHCC
    else:
        qk_BHCC = channel_products(q_BHCK, k_BHCK, g_BHC)
        if beta_BHC is not None:
            kk_BHCC = channel_products(k_BHCK, k_BHCK, g_BHC)
    q_in, k_in, k_out, total = q_BHCK, k_BHCK, k_BHCK, None
    if g_BHC is not None:
        g_BHCK = g_BHC if g_BHC.ndim == 4 else g_BHC[..., None]
        prefix = prefix_spans(g_BHCK, 2)
        q_in, k_in = q_BHCK * jnp.exp(prefix), k_BHCK * jnp.exp(prefix)
        k_out = k_BHCK * jnp.exp(suffix_spans(g_BHCK, 2))
        total = jnp.exp(prefix[:, :, -1, :, None])
    u_BHCV = v_BHCV
    if beta_BHC is not None:
        A_BHCC = beta_BHC[..., None] * kk_BHCC
        rest_BHCV = beta_BHC[..., None] * (v_BHCV - _dot(k_in, state_BHKV))
        u_BHCV = _solve(A_BHCC, rest_BHCV)
    o_BHCV = scale * (_dot(q_in, state_BHKV) + _dot(qk_BHCC, u_BHCV))
    kept_BHKV = state_BHKV if total is None else total * state_BHKV
    return o_BHCV, kept_BHKV + _dot(jnp.swapaxes(k_out, -1, -2), u_BHCV)


def _solve(A_BHCC, rest_BHCV):
    """(I + A)⁻¹ rest by substitution, at most eight blocks of rows one after the other; A strictly lower triangular, and
    nothing else of it is read."""
    C = A_BHCC.shape[-1]
    length, solved = max(_PIECE, C // 8), []
    for start in range(0, C, length):
        rows, block = slice(start, start + length), rest_BHCV[:, :, start : start + length]
        if solved:
            block = block - _dot(A_BHCC[:, :, rows, :start], jnp.concatenate(solved, axis=2))
        triangle = A_BHCC[:, :, rows, rows]
        solved.append(jax.scipy.linalg.solve_triangular(triangle, block, lower=True, unit_diagonal=True))
    return jnp.concatenate(solved, axis=2)


@jax.custom_vjp
def _dot(x_BHIJ, y_BHJK):
    """x y, with long sums taken in pieces, forwards and backwards: one float32 sum over a thousand tokens loses a digit."""
    return _in_pieces(x_BHIJ, y_BHJK)


def _in_pieces(x, y):
    J, K = y.shape[-2:]
    if J <= _PIECE or J % _PIECE:
        return jnp.einsum("BHij,BHjk->BHik", x, y)
    x, y = x.reshape(*x.shape[:-1], -1, _PIECE), y.reshape(*y.shape[:-2], -1, _PIECE, K)
    return jnp.sum(jnp.einsum("BHinj,BHnjk->nBHik", x, y), axis=0)


_dot.defvjp(
    lambda x, y: (_in_pieces(x, y), (x, y)),
    lambda xy, d: (_in_pieces(d, jnp.swapaxes(xy[1], -1, -2)), _in_pieces(jnp.swapaxes(xy[0], -1, -2), d)),
)


def _dot_t(x, y):
    return jnp.einsum("BHik,BHjk->BHij", x, y)
