"""Inside a chunk, with one gate a token and key channel (GLA, KDA): what ``state`` needs, and the way back by hand.

    P_ij = Σ_K q_i k_j e^{span(j, i]}  (i ≥ j)        A_ij = β_i Σ_K k_i k_j e^{span(j, i]}  (i > j)

The dyadic split: with blocks of s = 1, 2, 4, … C/2 tokens, the pair (i, j) is served at the one s where i lies in an odd
block and j in the even block before it. There ``e^{span(j, i]}`` is the product of two factors, one from j to the end of its
block and one from the start of i's block to i. Both are exponentials of sums ≤ 0, so nothing overflows, however strong
the gate. So every token has one factor F a level; level L is the span from the chunk's start (a), level L+1 the span to
its end (z). All spans come from one product of g with a constant 0/1 matrix, and their gradients go back through it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.axes import Array
from research.ops.linear_attention.solve import unit_lower_inverse
from research.ops.linear_attention.spans import ERASE
from research.ops.linear_attention.state import Chunk, ChunkGradient, nn, nt, total


class Inside(NamedTuple):
    """What the way back reuses: the factors [J, M, L+2, C, K], the faded rows and columns, and k kᵀ faded."""

    F: Array
    q: Array
    k: Array
    rows: Any  # or None
    cols: Any  # or None
    kk: Any  # or None


def prepare(q_JNCK, k_JNCK, g_JMCK, beta_JMC, rows, X_JMCC=None) -> tuple[Chunk, Inside]:
    """The chunk as ``state`` wants it. ``rows`` is M; ``X_JMCC`` skips the solve."""
    J, _, C, K = k_JNCK.shape
    r = rows // k_JNCK.shape[1]
    spans, masks = _levels(C)
    L = len(masks)
    q, k = (x if r == 1 else jnp.repeat(x, r, axis=1) for x in (q_JNCK, k_JNCK))
    g = jnp.maximum(g_JMCK, ERASE)
    sums = jnp.einsum("lc,nck->nlk", spans.astype(g.dtype), g.reshape(-1, C, K), precision=jax.lax.Precision.HIGHEST)
    F = jnp.exp(sums).reshape(J, rows, L + 2, C, K)
    # Not eye * (q kᵀ): XLA:CPU (jax 0.11.2) fuses that product, with k broadcast to value heads, into P u, and at C = 64 the
    # fused kernel is wrong.
    P = jnp.where(np.eye(C, dtype=bool), total(q * k)[..., None], 0)
    kk = faded = cols = None
    if L:
        cols = k[:, :, None] * F[:, :, :L]
        faded = q[:, :, None] * F[:, :, :L]
        if beta_JMC is not None:
            faded = jnp.concatenate([faded, cols], axis=3)
        low = nt(faded, cols)
        P = P + jnp.sum(jnp.where(masks, low[:, :, :, :C], 0), axis=2)
        if beta_JMC is not None:
            kk = jnp.sum(jnp.where(masks, low[:, :, :, C:], 0), axis=2)
    elif beta_JMC is not None:
        kk = jnp.zeros_like(P)
    a, z = F[:, :, L], F[:, :, L + 1]
    k_in = None
    if beta_JMC is not None:
        k_in = a * k
        if X_JMCC is None:
            X_JMCC = unit_lower_inverse(beta_JMC[..., None] * kk)
    chunk = Chunk(P, X_JMCC, a * q, k_in, z * k, a[:, :, -1, :, None])
    return chunk, Inside(F, q, k, faded, cols, kk)


def backward(q_JNCK, k_JNCK, g_JMCK, beta_JMC, chunk: Chunk, inside: Inside, d: ChunkGradient):
    """Cotangents of (q, k, g, beta through A) from those of the chunk's arrays."""
    J, N, C, K = k_JNCK.shape
    r = d.P.shape[1] // N
    spans, masks = _levels(C)
    L = len(masks)
    F, q, k = inside.F, inside.q, inside.k
    a, z = F[:, :, L], F[:, :, L + 1]
    diagonal = jnp.sum(jnp.eye(C, dtype=k.dtype) * d.P, axis=-1)[..., None]
    dbeta = None
    hq_a, hk_a, hk_z = a * d.q_in, None, z * d.k_out
    dq = hq_a + diagonal * k
    dk = hk_z + diagonal * q
    d_a = hq_a * q
    if beta_JMC is not None:
        dbeta = total(d.A * inside.kk)
        hk_a = a * d.k_in
        dk = dk + hk_a
        d_a = d_a + hk_a * k
    d_spans = jnp.stack([d_a, hk_z * k], axis=2)
    if L:
        both = d.P if beta_JMC is None else jnp.concatenate([d.P, beta_JMC[..., None] * d.A], axis=2)
        tall = np.concatenate([masks] * (both.shape[2] // C), axis=1)
        dlow = jnp.where(tall, both[:, :, None], 0)
        dlow_t = jnp.where(tall.swapaxes(1, 2), jnp.swapaxes(both, 2, 3)[:, :, None], 0)
        drows, dcols = nn(dlow, inside.cols), nn(dlow_t, inside.rows)
        hq = drows[:, :, :, :C] * F[:, :, :L]
        hk = (dcols if beta_JMC is None else drows[:, :, :, C:] + dcols) * F[:, :, :L]
        dq = dq + jnp.sum(hq, axis=2)
        dk = dk + jnp.sum(hk, axis=2)
        d_spans = jnp.concatenate([hq * q[:, :, None] + hk * k[:, :, None], d_spans], axis=2)
    flat = d_spans.reshape(-1, (L + 2) * C, K)
    dg = jnp.einsum("cl,nlk->nck", spans.T.astype(flat.dtype), flat, precision=jax.lax.Precision.HIGHEST)
    dg = dg.reshape(g_JMCK.shape) + (chunk.Z[..., 0] * d.Z)[:, :, None]
    if r > 1:
        dq, dk = (jnp.sum(x.reshape(J, N, r, C, K), axis=2) for x in (dq, dk))
    return dq, dk, dg, dbeta


def _levels(C):
    """(spans [(L+2)·C, C]: which gates each factor sums; masks [L, C, C]: which pairs each level serves)."""
    i, l = np.arange(C)[:, None], np.arange(C)[None, :]
    spans, masks = [], []
    s = 1
    while s < C:
        odd, block = (i // s) % 2 == 1, i // s * s
        spans.append(np.where(odd, (l >= block) & (l <= i), (l > i) & (l < block + s)))
        masks.append(odd & (l // s == i // s - 1))
        s *= 2
    spans += [l <= i, l > i]
    return np.concatenate(spans), np.array(masks)
