"""Products over groups of equal size: one batched product. Shared by the forms that end in one."""

import functools

import jax
import jax.numpy as jnp

SPECS = {"product": "ick,ikn->icn", "transposed": "icn,ikn->ick"}


def accumulator(*arrays):
    return functools.reduce(jnp.promote_types, [a.dtype for a in arrays], jnp.float32)


def einsum(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=accumulator(a, b)).astype(a.dtype)


def even_product(x_MK, w_EKN, sizes_E, *, spec):
    return einsum(spec, x_MK.reshape(sizes_E.shape[0], -1, x_MK.shape[1]), w_EKN).reshape(x_MK.shape[0], -1)


def block_outer(x_MK, dy_MN, rows):
    """One outer product per block of rows."""
    x_ICK, dy_ICN = (a.reshape(-1, rows, a.shape[1]) for a in (x_MK, dy_MN))
    outer = functools.partial(jnp.einsum, "ica,icb->iab", preferred_element_type=accumulator(x_MK, dy_MN))
    # XLA on CPU transposes the first operand in memory: let it be the narrower one.
    return outer(x_ICK, dy_ICN) if x_MK.shape[1] <= dy_MN.shape[1] else outer(dy_ICN, x_ICK).swapaxes(1, 2)


def even_outer(x_MK, dy_MN, sizes_E):
    return block_outer(x_MK, dy_MN, x_MK.shape[0] // sizes_E.shape[0]).astype(x_MK.dtype)


EVEN = {name: functools.partial(even_product, spec=spec) for name, spec in SPECS.items()} | {"outer": even_outer}


def unless_even(even, uneven):
    """A leg over any sizes from one over equal ones."""

    def leg(a, b, sizes_E):
        if a.shape[0] % sizes_E.shape[0]:
            return uneven(a, b, sizes_E)
        same = (sizes_E == a.shape[0] // sizes_E.shape[0]).all()
        return jax.lax.cond(same, even, uneven, a, b, sizes_E)

    return leg


def few(rows, sizes_E, alignment):
    """Whether there are no more rows than groups: then every row had better read its own matrix."""
    return alignment == 1 and rows.shape[0] <= sizes_E.shape[0]
