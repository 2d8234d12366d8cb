"""A block of queries at a time, its arrays made again in the backward pass."""

import jax
import jax.numpy as jnp

# Elements of the largest array that a block makes.
_ELEMENTS = 1 << 24


def queries_per_block(elements: int, length: int = 256) -> int:
    """How many queries, each of which makes an array of so many ``elements``, run together."""
    return max(1, min(length, _ELEMENTS // max(elements, 1)))


def map_queries(function, arrays, block: int):
    """``function(*arrays)`` over blocks of axis 1, joined again; arrays [B, T, …] in and out, trees of them too."""
    T = jax.tree.leaves(arrays)[0].shape[1]
    if block >= T:
        return function(*arrays)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, -T % block)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]

    body = jax.checkpoint(lambda _, block: (None, function(*block)))
    return jax.tree.map(join, jax.lax.scan(body, None, jax.tree.map(split, arrays))[1])
