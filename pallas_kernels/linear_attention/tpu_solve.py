"""(I + A)⁻¹ for strictly lower triangular A [C, C], inside a kernel: substitution on 16 × 16 blocks, then ladder merges.

The diagonal blocks lie side by side in one [16, C] array, so that one step of substitution serves them all; the column it
needs is gathered along lanes. A merge makes [[X1, 0], [−X2 A21 X1, X2]] and touches the rows of odd blocks only. The last
merge is applied to the right-hand side instead.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.linear_attention.tpu_tiles import iota

_BASE = 16


class Inverse(NamedTuple):
    """X [C, C] block diagonal with two blocks, and A21 [C/2, C/2] between them; or X whole and no A21."""

    X: Any
    A21: Any


def invert(A, products):
    """Generator: stages of the inverse of I + ``A``; returns an Inverse."""
    C = A.shape[0]
    b = min(_BASE, C)
    row, lane = iota((b, C), 0), iota((b, C), 1)
    diagonal = A[:b]
    for block in range(1, C // b):
        diagonal = jnp.where(lane // b == block, A[block * b : (block + 1) * b], diagonal)
    X = jnp.where(lane % b == row, 1.0, 0.0).astype(A.dtype)
    columns = [jnp.take_along_axis(diagonal, lane // b * b + j, axis=1) for j in range(b - 1)]
    yield
    for j, column in enumerate(columns):
        X = X - column * X[j : j + 1]
        if j % 4 == 3:
            yield
    X = jnp.concatenate([jnp.where(lane // b == block, X, 0.0) for block in range(C // b)], axis=0)
    s = b
    while 2 * s < C:
        odd = lambda x, s=s: jnp.concatenate([x[i : i + s] for i in range(s, C, 2 * s)], axis=0)  # noqa: E731
        r, c = iota((C // 2, C), 0), iota((C // 2, C), 1)
        low = jnp.where(c // s == 2 * (r // s), odd(A), 0.0)
        low = products.three_pass(low, X)
        yield
        zeros = jnp.zeros((s, C), A.dtype)
        rows = [x for m in range(C // (2 * s)) for x in (zeros, low[m * s : (m + 1) * s])]
        X2 = odd(X)
        X2 = X2 - products.three_pass(X2, jnp.concatenate(rows, axis=0))
        yield
        rows = [x for m in range(C // (2 * s)) for x in (X[2 * m * s : (2 * m + 1) * s], X2[m * s : (m + 1) * s])]
        X = jnp.concatenate(rows, axis=0)
        s *= 2
    return Inverse(X, A[C // 2 :, : C // 2] if s < C else None)


def solve(inverse: Inverse, x, products):
    """Generator: (I + A)⁻¹ x."""
    y = products.nn(inverse.X, x)
    yield
    if inverse.A21 is None:
        return y
    half = inverse.A21.shape[0]
    low = products.nn(inverse.A21, y[:half])
    yield
    low = products.nn(inverse.X[half:, half:], low)
    yield
    return jnp.concatenate([y[:half], y[half:] - low], axis=0)


def solve_transposed(inverse: Inverse, x, products):
    """Generator: (I + A)⁻ᵀ x."""
    if inverse.A21 is None:
        y = products.tn(inverse.X, x)
        yield
        return y
    half = inverse.A21.shape[0]
    low = products.tn(inverse.X[half:, half:], x[half:])
    yield
    top = x[:half] - products.tn(inverse.A21, low)
    yield
    top = products.tn(inverse.X[:half, :half], top)
    yield
    return jnp.concatenate([top, low], axis=0)
