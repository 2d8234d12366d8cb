"""Inside a chunk, with no gate or one gate a token and head: what ``state`` needs, and the way back by hand.

    E_ij = e^{span(j, i]}        P = tril(q kᵀ) ⊙ E        A = β_i (k kᵀ)_ij E_ij  (i > j)
    a_i = e^{span[0, i]}         z_j = e^{span(j, C)}      Z = e^{span[0, C)}

Products of q and k are made once a key head; only what meets a state is repeated to value heads. Axes: J chunks, N = B·G
key-head rows, M = B·H value-head rows, C tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.axes import Array
from research.ops.linear_attention.solve import unit_lower_inverse
from research.ops.linear_attention.spans import ERASE
from research.ops.linear_attention.state import Chunk, ChunkGradient, gram, nn, nt, total


class Inside(NamedTuple):
    """What the way back reuses: decay within, from the start of and to the end of the chunk; q kᵀ and k kᵀ faded."""

    E: Array
    a: Any  # or None
    z: Any  # or None
    P: Array
    kk: Any  # or None


def prepare(q_JNCK, k_JNCK, g_JMC, beta_JMC, rows, X_JMCC=None) -> tuple[Chunk, Inside]:
    """The chunk as ``state`` wants it. ``rows`` is M; ``X_JMCC`` skips the solve."""
    C = k_JNCK.shape[2]
    r = rows // k_JNCK.shape[1]
    lower_CC = jnp.tril(jnp.ones((C, C), k_JNCK.dtype))
    a = z = Z = kk = k_in = None
    E = lower_CC
    if g_JMC is not None:
        g = jnp.maximum(g_JMC, ERASE)
        # Every span summed directly: D_ij = Σ_l [l ≤ i] g_l [l > j].
        D = _spans(jnp.where(lower_CC > 0, g[..., None, :], 0), jnp.tril(lower_CC, -1))
        E = jnp.where(lower_CC > 0, jnp.exp(D), 0)
        a = jnp.exp(g[..., :1] + D[..., 0])[..., None]
        z = E[..., -1, :, None]
        Z = a[..., -1:, :]
    P = _heads(nt(q_JNCK, k_JNCK), E, r)
    q, k = _repeat(q_JNCK, r), _repeat(k_JNCK, r)
    if beta_JMC is not None:
        kk = _heads(gram(k_JNCK), E, r)
        k_in = _scale(a, k)
        if X_JMCC is None:
            X_JMCC = unit_lower_inverse(beta_JMC[..., None] * kk)
    return Chunk(P, X_JMCC, _scale(a, q), k_in, _scale(z, k), Z), Inside(E, a, z, P, kk)


def backward(q_JNCK, k_JNCK, g_JMC, beta_JMC, chunk: Chunk, inside: Inside, d: ChunkGradient):
    """Cotangents of (q, k, g, beta through A) from those of the chunk's arrays."""
    C = k_JNCK.shape[2]
    r = d.P.shape[1] // k_JNCK.shape[1]
    lower_CC = jnp.tril(jnp.ones((C, C), k_JNCK.dtype))
    dP_E = d.P * inside.E
    dq = _scale(inside.a, d.q_in)
    dk = _scale(inside.z, d.k_out)
    dA_kk: Any = None
    dbeta = dg = None
    pairs = jnp.swapaxes(_sum(dP_E, r), 2, 3)
    dk_N = nn(pairs, q_JNCK)
    if beta_JMC is not None:
        beta = beta_JMC[..., None]
        dA = d.A * jnp.tril(lower_CC, -1)
        dA_kk = dA * inside.kk
        dbeta = total(dA_kk)
        W = _sum(beta * dA * inside.E, r)
        dk_N = dk_N + nn(W + jnp.swapaxes(W, 2, 3), k_JNCK)
        dk = dk + _scale(inside.a, d.k_in)
    if g_JMC is not None:
        # dg_l: over every span that holds l, factor times its cotangent: in Q for E, c for a, e for z, f for Z.
        Q = d.P * inside.P
        c = total(chunk.q_in * d.q_in)
        e = total(chunk.k_out * d.k_out)
        f = chunk.Z[..., 0, 0] * total(d.Z)
        if beta_JMC is not None:
            Q = Q + beta_JMC[..., None] * dA_kk
            c = c + total(chunk.k_in * d.k_in)
        last_C = jnp.arange(C) == C - 1
        Q = Q + jnp.where(last_C[:, None], e[..., None, :], 0)
        c = c + jnp.where(last_C, f[..., None], 0)
        holding = c[..., None] + _spans(Q, jnp.triu(lower_CC.T, 1))
        dg = jnp.sum(jnp.where(lower_CC > 0, holding, 0), axis=-2)
    dq_N = _sum(dq, r) + nn(_sum(dP_E, r), k_JNCK)
    return dq_N, dk_N + _sum(dk, r), dg, dbeta


def _spans(x_JMCC, mask_CC):
    flat = jax.lax.dot(x_JMCC.reshape(-1, mask_CC.shape[0]), mask_CC, precision=jax.lax.Precision.HIGHEST)
    return flat.reshape(x_JMCC.shape)


def _scale(factor, x):
    return x if factor is None else factor * x


def _repeat(x_JN, r):
    return x_JN if r == 1 else jnp.repeat(x_JN, r, axis=1)


def _sum(x_JM, r):
    return x_JM if r == 1 else jnp.sum(x_JM.reshape(x_JM.shape[0], -1, r, *x_JM.shape[2:]), axis=2)


def _heads(x_JNCC, E, r):
    """``x`` of each key head times ``E`` of each of its value heads."""
    if r == 1 or E.ndim == 2:
        return _repeat(x_JNCC * E, r)
    J, N, C, _ = x_JNCC.shape
    return (x_JNCC[:, :, None] * E.reshape(J, N, r, C, C)).reshape(J, N * r, C, C)
