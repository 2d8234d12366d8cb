"""One matrix product per group of rows: the arithmetic of sparsely routed experts.

Rows of ``x_MK`` come sorted by group, ``group_sizes_E[e]`` of them for expert e, and each group meets its own
``w_EKN[e]``. The XLA form costs what M rows cost, not what all experts would (``jax.lax.ragged_dot`` is expanded to a dense
product over every expert on CPU and CUDA). Where no group needs more than an equal share with some slack, groups get
equal shares, and it is one batched product over experts. Where there are no more rows than groups (decoding), each row
reads its own matrix. Otherwise rows are cut into tiles that never straddle two groups: elsewhere than on CPU one batched
product over as many tiles as any load needs; on CPU equal shares all the same, and a loop over tiles for what they leave
over, each reading its matrix where it lies. Axes besides the glossary's: P padded rows, I tiles, C rows of one tile.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import gpu, tpu
from research.axes import Array, Float, Int
from research.ops.grouped_matmul import dense, kernel, looped, ragged, tiled
from research.ops.grouped_matmul.layout import aligned_rows, padded_sizes, tile_rows

__all__ = [
    "IMPLEMENTATIONS",
    "aligned_rows",
    "check_implementation",
    "clean_leg",
    "grouped_matmul",
    "padded_sizes",
    "tile_rows",
]

_LEGS = {
    "looped": looped.LEGS,
    "tiled": tiled.LEGS,
    "ragged_dot": ragged.LEGS,
    "dense": dense.LEGS,
    "pallas_tpu": kernel.legs("TPU", interpret=False),
    "pallas_gpu": kernel.legs("GPU", interpret=False),
    "pallas_tpu_interpret": kernel.legs("TPU", interpret=True),
    "pallas_gpu_interpret": kernel.legs("GPU", interpret=True),
}
IMPLEMENTATIONS = tuple(_LEGS)


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w_EKN: Float[Array, "E K N"],
    group_sizes_E: Int[Array, "E"],
    *,
    alignment: int = 1,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """y[m] = x[m] @ w[e] for the expert e whose group holds row m.

    Args:
      x_MK: rows sorted by group.
      w_EKN: one matrix per group; taken in x's dtype.
      group_sizes_E: rows of each group, sum ≤ M. Rows past the sum are ignored (NaN included): they come out zero and
        have zero gradient.
      alignment: above 1 a promise that M is a multiple of it, and that the group sizes are as well or are all M / E
        (see `padded_sizes`). Nothing is gathered then: equal groups are one batched product over experts, others one
        over tiles of that many rows. What breaks the promise is undefined.
      implementation: 'looped' (equal shares and a loop over tiles; CPU's), 'tiled' (all tiles at once; other GPUs'),
        'ragged_dot' (XLA's own), 'dense' (every row against every expert: the definition), each for any platform;
        'pallas_tpu' (TPU's where it serves the dtype and the widths), 'pallas_gpu' (Hopper GPUs', likewise) and these two
        with '_interpret'; or None: chosen per platform when lowered.

    Returns:
      y_MN in x's dtype, accumulated in float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes that don't fit, or an unknown implementation.
      NotImplementedError: a named kernel that can't serve the call.
    """
    rows, width = x_MK.shape
    if w_EKN.shape[1] != width:
        raise ValueError(f"w_EKN has K = {w_EKN.shape[1]}, it must equal x_MK's K = {width}")
    if group_sizes_E.shape[0] != w_EKN.shape[0]:
        raise ValueError(f"group_sizes_E has {group_sizes_E.shape[0]} groups, w_EKN has {w_EKN.shape[0]} experts")
    if alignment < 1 or rows % alignment:
        raise ValueError(f"alignment is {alignment}, it must be positive and divide x_MK's {rows} rows")
    check_implementation(implementation)
    if x_MK.size == 0 or w_EKN.size == 0:
        return jnp.zeros((rows, w_EKN.shape[2]), x_MK.dtype)
    # The cast stands outside the custom_vjp, so that the gradient of w is accumulated in x's dtype and cast once.
    return _grouped_matmul(x_MK, w_EKN.astype(x_MK.dtype), group_sizes_E.astype(jnp.int32), alignment, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped_matmul(x_MK, w_EKN, sizes_E, alignment, implementation):
    return _choose("product", alignment, implementation)(x_MK, w_EKN, sizes_E)


def _forward(x_MK, w_EKN, sizes_E, alignment, implementation):
    return _grouped_matmul(x_MK, w_EKN, sizes_E, alignment, implementation), (x_MK, w_EKN, sizes_E)


def _backward(alignment, implementation, residuals, dy_MN):
    x_MK, w_EKN, sizes_E = residuals
    # dx is the grouped product with transposed matrices; dw is one outer product over the rows of each group.
    dx_MK = _choose("transposed", alignment, implementation)(dy_MN, w_EKN, sizes_E)
    dw_EKN = _choose("outer", alignment, implementation)(x_MK, dy_MN, sizes_E)
    return dx_MK, dw_EKN, np.zeros(sizes_E.shape, jax.dtypes.float0)


_grouped_matmul.defvjp(_forward, _backward)


def _choose(leg, alignment, implementation, clean=False):
    bound = {name: functools.partial(_LEGS[name][leg], alignment=alignment, clean=clean) for name in IMPLEMENTATIONS}
    if implementation is not None:
        return bound[implementation]

    def by_platform(a, b, sizes_E):
        # XLA has a real grouped matmul on TPU only (elsewhere it expands ragged_dot to all experts), and on TPU the kernel
        # beats it and megablox in every leg: benchmarks/kernels.md.
        own = "ragged_dot" if tpu.refuses(a, b) else "pallas_tpu"
        forms = {"tpu": bound[own], "cpu": bound["looped"], "default": bound["tiled"]}
        if not gpu.refuses(a, b):
            forms["cuda"] = bound["pallas_gpu"]
        return jax.lax.platform_dependent(a, b, sizes_E, **forms)

    return by_platform


def clean_leg(
    leg: str, a: Array, b: Array, sizes_E: Int[Array, "E"], *, alignment: int, implementation: str | None = None
) -> Array:
    """One leg of the product where rows past the sum are known to be zero, for callers with a custom_vjp of their own.

    leg: 'product' (x_MK, w_EKN) -> y_MN, 'transposed' (dy_MN, w_EKN) -> dx_MK or 'outer' (x_MK, dy_MN) -> dw_EKN. Not
    differentiable by itself. It spares the pass over memory that hides foreign rows.
    """
    check_implementation(implementation)
    return _choose(leg, alignment, implementation, clean=True)(a, b, sizes_E)


def check_implementation(implementation: str | None) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}, it must be None or one of {IMPLEMENTATIONS}")
