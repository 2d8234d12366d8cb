"""What chunks do to the state: one core for every mechanism.

A chunk is six arrays, which ``token_gates`` or ``channel_gates`` prepare (all decays already in them):

    P [C, C]      lower triangular: ⟨q_i, k_j⟩ faded from j to i
    X [C, C]      (I + A)⁻¹, or None for additive writes
    q_in, k_in    queries and keys faded from the chunk's start (k_in only for the delta rule)
    k_out         keys faded to the chunk's end
    Z             decay across the chunk

    U = v − k_in S        u = X β U   or   v        o = q_in S + P u        S ← Z S + k_outᵀ u

J chunks of M rows (a row is a batch entry and a value head) go through at once: what does not wait for the state is one
product over J·M, and only what does is scanned.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.axes import Array


class Chunk(NamedTuple):
    """J chunks of M rows; every array leads with [J, M]. ``Z`` is [J, M, 1, 1] or [J, M, K, 1], or None for no decay."""

    P: Array
    X: Any  # or None
    q_in: Array
    k_in: Any  # or None
    k_out: Array
    Z: Any  # or None


def states(chunk: Chunk, v_JMCV, beta_JMC, S_MKV):
    """Walk the chunks forward: (u_JMCV, U_JMCV or None, the J states before each chunk, the state after the last)."""
    if chunk.X is None:
        S_MKV, S_JMKV = _additive(chunk.Z, tn(chunk.k_out, v_JMCV), S_MKV)
        return v_JMCV, None, S_JMKV, S_MKV

    def body(S_MKV, x):
        k_in, k_out, X, Z, v, beta = x
        U = v - nn(k_in, S_MKV)
        u = nn(X, beta[..., None] * U)
        return _fade(Z, S_MKV) + tn(k_out, u), (u, U, S_MKV)

    xs = (chunk.k_in, chunk.k_out, chunk.X, chunk.Z, v_JMCV, beta_JMC)
    S_MKV, (u_JMCV, U_JMCV, S_JMKV) = jax.lax.scan(body, S_MKV, xs, unroll=_unroll(v_JMCV))
    return u_JMCV, U_JMCV, S_JMKV, S_MKV


def states_again(chunk: Chunk, v_JMCV, beta_JMC, S_IMKV):
    """(u_JMCV, U_JMCV or None, S_JMKV) of chunks whose states are known at every (J / I)th: those go through together."""
    I, J, M = S_IMKV.shape[0], *v_JMCV.shape[:2]

    def apart(x):
        return jnp.swapaxes(x.reshape(I, J // I, *x.shape[1:]), 0, 1).reshape(J // I, I * M, *x.shape[2:])

    def together(x):
        return jnp.swapaxes(x.reshape(J // I, I, M, *x.shape[2:]), 0, 1).reshape(J, M, *x.shape[2:])

    chunk, v, beta = jax.tree.map(apart, (chunk, v_JMCV, beta_JMC))
    u, U, S, _ = states(chunk, v, beta, S_IMKV.reshape(I * M, *S_IMKV.shape[2:]))
    return jax.tree.map(together, (u, U, S))


def read(chunk: Chunk, u_JMCV, S_JMKV):
    """o_JMCV = q_in S + P u."""
    return nn(chunk.q_in, S_JMKV) + nn(chunk.P, u_JMCV)


class ChunkGradient(NamedTuple):
    """Cotangents of a Chunk's arrays, of A instead of X; ``Z`` is summed over V, [J, M, K]."""

    P: Array
    A: Any  # or None
    q_in: Array
    k_in: Any  # or None
    k_out: Array
    Z: Any  # or None


def backward(chunk: Chunk, u_JMCV, U_JMCV, beta_JMC, S_JMKV, do_JMCV, dS_MKV):
    """Walk the chunks back: (ChunkGradient, dv_JMCV, a function of A's part that gives dbeta_JMC, the cotangent of the first
    state)."""
    du_JMCV = tn(chunk.P, do_JMCV)
    qdo_JMKV = tn(chunk.q_in, do_JMCV)

    def body(dS_MKV, x):
        k_in, k_out, X, Z, beta, du, qdo = x
        dR = tn(X, du + nn(k_out, dS_MKV))
        dv = beta[..., None] * dR
        return _fade(Z, dS_MKV) + qdo - tn(k_in, dv), (dv, dR, dS_MKV)

    dA = dk_in = dbeta = dZ = None
    if chunk.X is None:
        dS_MKV, dS_JMKV = _additive(chunk.Z, qdo_JMKV, dS_MKV, reverse=True)
        dv_JMCV = du_JMCV + nn(chunk.k_out, dS_JMKV)
    else:
        xs = (chunk.k_in, chunk.k_out, chunk.X, chunk.Z, beta_JMC, du_JMCV, qdo_JMKV)
        dS_MKV, (dv_JMCV, dR_JMCV, dS_JMKV) = jax.lax.scan(body, dS_MKV, xs, reverse=True, unroll=_unroll(do_JMCV))
        dA = -nt(dR_JMCV, u_JMCV)
        dk_in = -nt(dv_JMCV, S_JMKV)
        # dβ = dR · (U − Σ_j kk_ij u_j), and that bracket is u / β: with correlated keys the sum cancels and the quotient
        # does not, but the quotient wants a β to divide by.
        usable = jnp.abs(beta_JMC) > 1e-3
        quotient = total(dR_JMCV * u_JMCV) / jnp.where(usable, beta_JMC, 1)
        direct = total(dR_JMCV * U_JMCV)
        dbeta = lambda of_A: jnp.where(usable, quotient, direct + of_A)  # noqa: E731
    if chunk.Z is not None:
        dZ = total(S_JMKV * dS_JMKV)
    gradient = ChunkGradient(nt(do_JMCV, u_JMCV), dA, nt(do_JMCV, S_JMKV), dk_in, nt(u_JMCV, dS_JMKV), dZ)
    return gradient, dv_JMCV, dbeta, dS_MKV


def _additive(Z_J, write_JMKV, S_MKV, reverse=False):
    """S ← Z S + write, chunk after chunk: (the state after the last, the states before each)."""

    def body(S_MKV, x):
        Z, write_MKV = x
        return _fade(Z, S_MKV) + write_MKV, S_MKV

    return jax.lax.scan(body, S_MKV, (Z_J, write_JMKV), reverse=reverse, unroll=_unroll(write_JMKV))


def _unroll(x_JMC):
    # A loop would copy every chunk in and out: up to 40 % of the time on CPU. Chunks chosen tiny stay a loop.
    return x_JMC.shape[0] if x_JMC.shape[0] <= 8 else 1


def _fade(Z, S_MKV):
    return S_MKV if Z is None else Z * S_MKV


def total(x):
    """The sum over the last axis, in an order that depends on its length alone. XLA:CPU's own order depends on the other axes
    too, and a row's last bits would depend on its batch."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        tail = x[..., 2 * half :]
        x = x[..., :half] + x[..., half : 2 * half]
        x = jnp.concatenate([x, tail], axis=-1) if tail.shape[-1] else x
    return x[..., 0]


def _product(equation, x, y):
    # One batch axis: XLA's CPU backend aborts on products of rank 8 and transposes what it cannot flatten.
    out = jnp.einsum(equation, x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:]))
    return out.reshape(*x.shape[:-2], *out.shape[-2:])


def nn(x, y):
    """x y for stacks of matrices."""
    return _product("nij,njk->nik", x, y)


def nt(x, y):
    """x yᵀ for stacks of matrices."""
    return _product("nij,nkj->nik", x, y)


def tn(x, y):
    """xᵀ y for stacks of matrices."""
    # XLA:CPU reads a transposed operand slowly; behind a barrier it is transposed first, in two thirds of the time.
    return nn(jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2)), y)


def gram(k):
    """k kᵀ for stacks of matrices, to the last bit of float32 for rows of length at most one.

    The inverse of I + β k kᵀ multiplies what rounding leaves in the products of correlated keys, and most of that comes from
    adding K terms up. Rounded to multiples of 2⁻¹¹, keys have products that float32 adds up exactly; the rest is small.
    """
    if k.dtype != jnp.float32:
        return nt(k, k)
    high = jnp.round(k * 2048) / 2048
    low = nt(k - high, high + k)
    return nt(high, high) + (low + jnp.swapaxes(low, -1, -2)) / 2
