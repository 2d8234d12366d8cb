"""Inside a chunk with no gate or one gate a token and head, for the TPU kernels.

    E_ij = e^{span(j, i]}    P = tril(q kᵀ) ⊙ E    M = tril(k kᵀ, −1) ⊙ E
    a_i = e^{span[0, i]}     z_j = e^{span(j, C)}  Z = e^{span[0, C)}

Every span is its own sum of gates: a matrix of masked gates times a constant of zeros and ones, with the gates in three
bfloat16 parts, which is exact. The same product lays a and z along lanes.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.linear_attention.tpu_tiles import LANES, column, iota, split_row, widen

LOG2_E = 1.4426950408889634
# e^−200 is 0 in float32 and so is every product with it: a stronger gate erases no more.
ERASE = -200.0


class Inside(NamedTuple):
    """A chunk of one head, every decay in it; what ``backward`` reuses."""

    P: Any  # [C, C]
    M: Any  # [C, C] or None
    q_in: Any  # [C, K]
    k_in: Any  # [C, K] or None
    k_out: Any  # [C, K], or transposed going forward
    Z: Any  # [1, V] (alike), [K, V] (rows alike), or None
    E: Any
    a: Any
    z: Any


class Constants(NamedTuple):
    """Masks of a grid step, as booleans and as bfloat16."""

    lower: Any  # i ≥ j
    strict: Any  # i > j
    lower_low: Any
    upper_low: Any  # i < j
    after: Any  # [C, C + LANES]: i > j, then ones: what masked gates are multiplied with


def make_constants(C):
    i, j = iota((C, C), 0), iota((C, C), 1)
    low = lambda mask: mask.astype(jnp.float32).astype(jnp.bfloat16)  # noqa: E731
    ones = jnp.ones((C, LANES), jnp.bfloat16)
    return Constants(i >= j, i > j, low(i >= j), low(i < j), jnp.concatenate([low(i > j), ones], axis=1))


def spans(gates, constants, products):
    """For every head its gates summed, in bits, over (j, i] and, in the last lanes, over [0, i]: [C, C + LANES]. All heads and
    parts go through one product: its constant is loaded once, and the parts are added where products are."""
    C = constants.lower.shape[0]
    mask = constants.lower_low.reshape(C // 16, 16, C)
    stack = []
    for g in gates:
        parts = [jnp.broadcast_to(x, (16, C)) for x in split_row(jnp.maximum(g, ERASE) * LOG2_E)]
        parts = [(mask * part.astype(jnp.bfloat16)[None]).reshape(C, C) for part in parts]
        stack.append(jnp.concatenate(parts, axis=1))
    sums = products.dot(jnp.concatenate(stack, axis=0), jnp.concatenate([constants.after] * 3, axis=0))
    return [sums[i * C : (i + 1) * C] for i in range(len(gates))]


def prepare(q, k, sums, constants, products, *, delta, backwards=False):
    """Generator: the chunk of one head. ``sums`` is its part of ``spans``, or None; P and M are not yet scaled by β."""
    lower, strict = constants.lower, constants.strict
    C, K = k.shape
    low_k = k.astype(products.dtype)
    k_T = low_k.T
    both = products.nn(jnp.concatenate([q.astype(products.dtype), low_k], axis=0) if delta else q, k_T)
    P = both[:C]
    M: Any = both[C:] if delta else None
    if sums is None:
        yield
        P = jnp.where(lower, P, 0.0)
        M = jnp.where(strict, M, 0.0) if delta else None
        k_out = low_k if backwards else k_T
        return Inside(P, M, q, k if delta else None, k_out, None, None, None, None)
    E = jnp.where(lower, jnp.exp2(sums[:, :C]), 0.0)
    a = jnp.exp2(sums[:, C:])
    Z = a[C - 1 :]
    a = widen(a, K)
    if backwards:
        z = column(E[C - 1 :], K)
        k_out = z * k
    else:
        z = E[C - 1 :]
        k_out = z * k_T
    yield
    P = P * E
    M = jnp.where(strict, M * E, 0.0) if delta else None
    return Inside(P, M, a * q, a * k if delta else None, k_out, Z, E, a, z)


def backward(q, k, inside: Inside, dP, dM, dq_in, dk_in, dk_out, state, constants, products):
    """Generator: (dq, dk, dg [1, C] or None) from the cotangents of the chunk's arrays; ``state`` is (S, dS)."""
    dPE = jnp.where(constants.lower, dP, 0.0) if inside.E is None else dP * inside.E
    dq = products.nn(dPE, k) + _scale(inside.a, dq_in)
    dk = products.tn(dPE, q) + _scale(inside.z, dk_out)
    yield
    if dM is not None:
        dME = jnp.where(constants.strict, dM, 0.0)
        dME = dME if inside.E is None else dME * inside.E
        dk = dk + products.nn(dME, k) + products.tn(dME, k) + _scale(inside.a, dk_in)
        yield
    if inside.E is None:
        return dq, dk, None
    # dg_l: the factors whose span holds l, times their cotangents. Row i holds those that end at i ≥ l (P, M, a), and for
    # i < l those that start at i (z).
    Q = dP * inside.P
    c = inside.q_in * dq_in
    if dM is not None:
        Q = Q + dM * inside.M
        c = c + inside.k_in * dk_in
    e = inside.k_out * dk_out
    S, dS = state
    f = jnp.sum(widen(inside.Z, S.shape[1]) * (S * dS), axis=0, keepdims=True)
    ending = products.sums(Q, constants.upper_low) + jnp.sum(c, axis=1, keepdims=True)
    starting = jnp.sum(e, axis=1, keepdims=True)
    yield
    holding = jnp.sum(jnp.where(constants.lower, ending, starting), axis=0, keepdims=True)
    return dq, dk, holding + jnp.sum(f, axis=1, keepdims=True)


def _scale(factor, x):
    return x if factor is None else factor * x
