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

    Dyadic split: the chunk is halved again and again; a pair (i, j) is served where its halves part, with the last token
    of the left half as reference, so that both factors are exponentials of sums ≤ 0. C is a power of two.
    """
    *batch, C, K = q_xCK.shape
    if C == 1:
        return jnp.sum(q_xCK * k_xCK, axis=-1)[..., None]
    half = C // 2
    split = lambda x: jnp.moveaxis(x.reshape(*batch, 2, half, K), -3, 0)  # noqa: E731
    (q1, q2), (k1, k2), (g1, g2) = split(q_xCK), split(k_xCK), split(g_xCK)
    right = q2 * jnp.exp(prefix_spans(g2, -2))
    left = k1 * jnp.exp(suffix_spans(g1, -2))
    low = jnp.einsum("nik,njk->nij", right.reshape(-1, half, K), left.reshape(-1, half, K)).reshape(*batch, half, half)
    both = channel_products(jnp.stack([q1, q2]), jnp.stack([k1, k2]), jnp.stack([g1, g2]))
    top = jnp.concatenate([both[0], jnp.zeros_like(low)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([low, both[1]], axis=-1)], axis=-2)
