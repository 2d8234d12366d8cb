"""XLA's own ragged_dot: a real grouped product on TPU, every expert's product elsewhere."""

import jax
import jax.numpy as jnp

from research.ops.grouped_matmul.even import accumulator


def live(x_MK, sizes_E, clean=False):
    if clean:
        return x_MK
    return jnp.where((jnp.arange(x_MK.shape[0]) < sizes_E.sum())[:, None], x_MK, 0)


@jax.custom_batching.sequential_vmap  # ragged_dot's own batching refuses an operand without the batch axis
def _ragged_dot(x_MK, w_EKN, sizes_E):
    return jax.lax.ragged_dot(x_MK, w_EKN, sizes_E, preferred_element_type=accumulator(x_MK)).astype(x_MK.dtype)


@jax.custom_batching.sequential_vmap
def _ragged_dot_over_rows(x_MK, dy_MN, sizes_E):
    over_rows = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    kind = accumulator(x_MK, dy_MN)
    return jax.lax.ragged_dot_general(x_MK, dy_MN, sizes_E, over_rows, preferred_element_type=kind).astype(x_MK.dtype)


def _ragged_product(x_MK, w_EKN, sizes_E, *, alignment, clean):
    return live(_ragged_dot(live(x_MK, sizes_E, clean), w_EKN, sizes_E), sizes_E)


def _ragged_outer(x_MK, dy_MN, sizes_E, *, alignment, clean):
    return _ragged_dot_over_rows(live(x_MK, sizes_E, clean), live(dy_MN, sizes_E, clean), sizes_E)


def transposed(product):
    return lambda dy_MN, w_EKN, sizes_E, **options: product(dy_MN, w_EKN.swapaxes(1, 2), sizes_E, **options)


LEGS = {"product": _ragged_product, "transposed": transposed(_ragged_product), "outer": _ragged_outer}
