"""Inside a chunk with one gate a token, head and key channel (GLA, KDA), for the TPU kernels.

    P_ij = Σ_K q_i k_j e^{span(j, i]}  (i ≥ j)        M_ij = Σ_K k_i k_j e^{span(j, i]}  (i > j)

The dyadic split: with blocks of s = 1, 2, 4, … C/2 tokens, the pair (i, j) is served at the one s where i lies in an odd
block and j in the even block before it: the highest bit of i xor j. There e^{span(j, i]} is the product of two factors F ≤ 1,
one from j to the end of its block and one from the start of i's block to i. Their spans are summed block by block:

    from_2s = from_s + (odd: whole of the even block)        to_2s = to_s + (even: whole of the odd block)

where ``from`` runs from the start of a token's block to it, and ``to`` from it to the end. Blocks of less than 8 tokens lie
inside a tile's rows; there the eight tokens of a block are eight arrays, read and written with a stride through scratch.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.linear_attention.tpu_tiles import LANES, column, iota
from pallas_kernels.linear_attention.tpu_token_gates import ERASE, LOG2_E, Inside

# Arrays [C, K] a head keeps in scratch: spans (or their cotangents) of the levels 1, 2 and 4, then ``from`` and ``to``.
SCRATCH = 5
_ROWS = 8


class Constants(NamedTuple):
    lower: Any
    strict: Any
    pair: Any  # i xor j


def make_constants(C):
    i, j = iota((C, C), 0), iota((C, C), 1)
    return Constants(i >= j, i > j, i ^ j)


def prepare(q, k, gates, constants, products, *, delta, backwards=False):
    """Generator: the chunk of one head. ``gates`` are eight arrays [C/8, K] and a scratch ref [SCRATCH, C, K]."""
    g, scratch = gates
    C, K = k.shape
    g = [jnp.maximum(x, ERASE) * LOG2_E for x in g]
    start, end = list(g), [jnp.zeros_like(x) for x in g]
    for level, s in enumerate((1, 2, 4)):
        for c in range(_ROWS):
            scratch.at[level][pl.ds(c, C // _ROWS, stride=_ROWS), :] = start[c] if c // s % 2 else end[c]
        start, end = _double(start, end, s)
    for c in range(_ROWS):
        scratch.at[3][pl.ds(c, C // _ROWS, stride=_ROWS), :] = start[c]
        scratch.at[4][pl.ds(c, C // _ROWS, stride=_ROWS), :] = end[c]
    yield
    F = [jnp.exp2(scratch[level]) for level in range(3)]
    start, end = scratch[3], scratch[4]
    s = _ROWS
    while s < C:
        blocks = lambda x, s=s: x.reshape(C // (2 * s), 2, s, K)  # noqa: E731
        even_start, odd_start = blocks(start)[:, 0], blocks(start)[:, 1]
        even_end, odd_end = blocks(end)[:, 0], blocks(end)[:, 1]
        F.append(jnp.exp2(jnp.stack([even_end, odd_start], axis=1)).reshape(C, K))
        start = jnp.stack([even_start, odd_start + even_start[:, s - 1 :]], axis=1).reshape(C, K)
        end = jnp.stack([even_end + odd_start[:, s - 1 :], odd_end], axis=1).reshape(C, K)
        s *= 2
    a, z = jnp.exp2(start), jnp.exp2(end)
    yield
    P = products.nt(q, k)
    M: Any = jnp.zeros_like(P) if delta else None
    for level, factor in enumerate(F):
        s = 1 << level
        cols = factor * k
        rows = [_odd(factor * q, s)] + ([_odd(cols, s)] if delta else [])
        low = products.nt(jnp.concatenate(rows, axis=0), cols)
        n = rows[0].shape[0]
        P = _choose(P, low[:n], constants.pair, s)
        M = _choose(M, low[n:], constants.pair, s) if delta else None
        yield
    P = jnp.where(constants.lower, P, 0.0)
    M = jnp.where(constants.strict, M, 0.0) if delta else None
    k_out = z * k
    if not backwards:
        k_out = k_out.astype(products.dtype).T
    return Inside(P, M, a * q, a * k if delta else None, k_out, column(a[C - 1 :], LANES), F, a, z)


def backward(q, k, inside: Inside, dP, dM, dq_in, dk_in, dk_out, state, constants, products, scratch):
    """Generator: (dq, dk, dg as eight arrays [C/8, K]). ``state`` is (S, dS)."""
    C, K = k.shape
    F, delta = inside.E, dM is not None
    dP = jnp.where(constants.lower, dP, 0.0)
    both = [x.astype(products.dtype) for x in ([dP, jnp.where(constants.strict, dM, 0.0)] if delta else [dP])]
    turned = [x.T for x in both]
    diagonal = jnp.sum(jnp.where(constants.pair == 0, dP, 0.0), axis=1, keepdims=True)
    dq = inside.a * dq_in + diagonal * k
    dk = inside.z * dk_out + diagonal * q
    d_start = inside.q_in * dq_in
    if delta:
        dk = dk + inside.a * dk_in
        d_start = d_start + inside.k_in * dk_in
    d_end = inside.k_out * dk_out
    S, dS = state
    whole = inside.a[C - 1 :] * jnp.sum((S * dS).T, axis=0, keepdims=True)
    d_start = d_start + jnp.where(iota((C, K), 0) == C - 1, whole, 0.0)
    yield
    d_level = [None] * len(F)
    for level in reversed(range(len(F))):
        s = 1 << level
        cols, rows = F[level] * k, F[level] * q
        here = (constants.pair >= s) & (constants.pair < 2 * s)
        served = lambda x, here=here: jnp.where(here, x, jnp.zeros_like(x))  # noqa: E731
        left = jnp.concatenate([_odd(served(x), s) for x in both], axis=0)
        right = jnp.concatenate([_even(served(x), s) for x in turned], axis=1)
        drows = products.nn(left, cols)
        dcols = products.nn(right, jnp.concatenate([rows, cols] if delta else [rows], axis=0))
        n = drows.shape[0] // len(both)
        hq = F[level] * _spread(drows[:n], None, s)
        hk = F[level] * _spread(drows[n:] if delta else None, dcols, s)
        dq, dk = dq + hq, dk + hk
        d_level[level] = hq * q + hk * k
        if s >= _ROWS:
            d_start, d_end = _halve(d_start, d_end, d_level[level], s)
        yield
    for i, x in enumerate([*d_level[:3], d_start, d_end]):
        scratch[i] = x
    d_level, d_start, d_end = (
        [[scratch.at[i][pl.ds(c, C // _ROWS, stride=_ROWS), :] for c in range(_ROWS)] for i in group]
        for group in ((0, 1, 2), (3,), (4,))
    )
    d_start, d_end = d_start[0], d_end[0]
    for level in (2, 1, 0):
        s = 1 << level
        before_start, before_end = list(d_start), list(d_end)
        for c in range(_ROWS):
            block = c // (2 * s) * 2 * s
            if c == block + s - 1:
                before_start[c] = before_start[c] + sum(d_start[block + s : block + 2 * s])
            if c == block + 2 * s - 1:
                before_start[c] = before_start[c] + sum(d_end[block : block + s])
            if c // s % 2:
                before_start[c] = before_start[c] + d_level[level][c]
            else:
                before_end[c] = before_end[c] + d_level[level][c]
        d_start, d_end = before_start, before_end
    return dq, dk, d_start


def _double(start, end, s):
    """``from`` and ``to`` in blocks of 2s from those in blocks of s, tokens of an 8-block apart."""
    new_start, new_end = list(start), list(end)
    for c in range(_ROWS):
        block = c // (2 * s) * 2 * s
        if c // s % 2:
            new_start[c] = start[c] + start[block + s - 1]
        else:
            new_end[c] = end[c] + start[block + 2 * s - 1]
    return new_start, new_end


def _halve(d_start, d_end, d_here, s):
    """The transpose of one doubling (s ≥ 8), with the cotangent of this level's spans."""
    C, K = d_here.shape
    blocks = lambda x: x.reshape(C // (2 * s), 2, s, K)  # noqa: E731
    d_start, d_end, d_here = blocks(d_start), blocks(d_end), blocks(d_here)
    last = iota((s, K), 0) == s - 1
    at_last = lambda x: jnp.where(last, jnp.sum(x, axis=1, keepdims=True), 0.0)  # noqa: E731
    even = d_start[:, 0] + at_last(d_start[:, 1])
    odd = d_start[:, 1] + at_last(d_end[:, 0]) + d_here[:, 1]
    end = jnp.stack([d_end[:, 0] + d_here[:, 0], d_end[:, 1]], axis=1)
    return jnp.stack([even, odd], axis=1).reshape(C, K), end.reshape(C, K)


def _half(x, s, which):
    """The rows of the odd (1) or even (0) blocks of s, together; all rows where blocks are smaller than a tile."""
    return x if s < _ROWS else x.reshape(-1, 2, s, x.shape[1])[:, which].reshape(-1, x.shape[1])


def _odd(x, s):
    return _half(x, s, 1)


def _even(x, s):
    return _half(x, s, 0)


def _spread(odd, even, s):
    """All rows again from those of odd and of even blocks; None is zero."""
    if s < _ROWS:
        return even if odd is None else odd if even is None else odd + even
    some = odd if odd is not None else even
    odd, even = (jnp.zeros_like(some) if x is None else x for x in (odd, even))
    n, K = some.shape
    return jnp.stack([even.reshape(n // s, s, K), odd.reshape(n // s, s, K)], axis=1).reshape(2 * n, K)


def _choose(P, low, pair, s):
    """``P`` with the products of level s (rows of odd blocks, or all) where that level serves, or a later one will."""
    C = P.shape[0]
    if s < _ROWS:
        return jnp.where(pair >= s, low, P)
    split = lambda x: x.reshape(C // (2 * s), 2, s, C)  # noqa: E731
    odd = jnp.where(split(pair)[:, 1] >= s, low.reshape(C // (2 * s), s, C), split(P)[:, 1])
    return jnp.stack([split(P)[:, 0], odd], axis=1).reshape(C, C)
