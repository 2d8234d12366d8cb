"""Every row against every expert: the definition."""

import jax.numpy as jnp

from research.ops.grouped_matmul.even import accumulator
from research.ops.grouped_matmul.ragged import live, transposed


def _member(sizes_E, rows, dtype):
    ends_E = jnp.cumsum(sizes_E)
    row_M = jnp.arange(rows)[:, None]
    return ((row_M < ends_E) & (row_M >= ends_E - sizes_E)).astype(dtype)


def _dense_product(x_MK, w_EKN, sizes_E, *, alignment, clean):
    member_ME = _member(sizes_E, x_MK.shape[0], accumulator(x_MK))
    every_MEN = jnp.einsum("mk,ekn->men", live(x_MK, sizes_E, clean), w_EKN, preferred_element_type=accumulator(x_MK))
    return jnp.einsum("men,me->mn", every_MEN, member_ME).astype(x_MK.dtype)


def _dense_outer(x_MK, dy_MN, sizes_E, *, alignment, clean):
    member_ME = _member(sizes_E, x_MK.shape[0], accumulator(x_MK))
    x_MEK = jnp.einsum("mk,me->mek", live(x_MK, sizes_E, clean), member_ME)
    return jnp.einsum("mek,mn->ekn", x_MEK, live(dy_MN, sizes_E, clean)).astype(x_MK.dtype)


LEGS = {"product": _dense_product, "transposed": transposed(_dense_product), "outer": _dense_outer}
