"""Decay over spans of tokens, each span summed directly.

The decay from token j to token i is exp of the sum of the log-decays over (j, i]. Log-decays are ≤ 0, so sums of them lose
nothing; the difference of two running sums loses everything once a gate is strong (and is NaN once a gate is −inf).
"""

import jax.numpy as jnp

# For masked sums made as matrix products, where −inf · 0 must not arise: e^−10⁴ is 0 in float64 too.
ERASE = -1e4


def token_spans(g_xC):
    """``D_xCC[i, j]`` = Σ g over (j, i] for i ≥ j, −inf for i < j. One gate a token: ``g_xC`` [..., C]."""
    C = g_xC.shape[-1]
    i, j = jnp.arange(C)[:, None], jnp.arange(C)[None, :]
    sums = jnp.cumsum(jnp.where(i > j, g_xC[..., :, None], 0), axis=-2)
    return jnp.where(i >= j, sums, -jnp.inf)


def prefix_spans(g_xC, axis):
    """Σ g over tokens 0..i, i included."""
    return jnp.cumsum(g_xC, axis=axis)


def suffix_spans(g_xC, axis):
    """Σ g over the tokens after j, j excluded."""
    shifted = jnp.concatenate([_take(g_xC, 1, None, axis), jnp.zeros_like(_take(g_xC, 0, 1, axis))], axis=axis)
    return jnp.flip(jnp.cumsum(jnp.flip(shifted, axis), axis=axis), axis)


def _take(x, start, stop, axis):
    index = [slice(None)] * x.ndim
    index[axis] = slice(start, stop)
    return x[tuple(index)]


def channel_products(q_xCK, k_xCK, g_xCK):
    """``P_xCC[i, j]`` = Σ_K q_i k_j exp(Σ g over (j, i]) for i ≥ j, else 0, with one gate a token and channel.

    Dyadic split: with blocks of s = 1, 2, 4, … tokens, a pair is served at the one s where i lies in an odd block and j in
    the even block before it; the end of j's block is the reference, so that both factors are exponentials of sums ≤ 0.
    C is a power of two.
    """
    *batch, C, K = q_xCK.shape
    i, j = jnp.arange(C)[:, None], jnp.arange(C)[None, :]
    flat = lambda x: x.reshape(-1, C, K)  # noqa: E731
    q, k, g = flat(q_xCK), flat(k_xCK), flat(g_xCK)
    P = jnp.where(i == j, jnp.einsum("nik,njk->nij", q, k), 0)
    s = 1
    while s < C:
        blocks = g.reshape(-1, C // s, s, K)
        to_here = prefix_spans(blocks, 2).reshape(-1, C, K)
        to_end = suffix_spans(blocks, 2).reshape(-1, C, K)
        odd_C1 = (jnp.arange(C) // s % 2 == 1)[:, None]
        factor = jnp.exp(jnp.where(odd_C1, to_here, to_end))
        served = (i // s % 2 == 1) & (j // s == i // s - 1)
        P = P + jnp.where(served, jnp.einsum("nik,njk->nij", q * factor, k * factor), 0)
        s *= 2
    return P.reshape(*batch, C, C)
