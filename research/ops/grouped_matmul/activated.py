"""The two products that meet an expert's activation, each with it: legs for callers with a custom_vjp of their own."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import tpu_activated as tpu
from research.axes import Array, Float, Int
from research.ops.grouped_matmul import check_implementation, clean_leg

Activation = Callable[[Array, Array], Array]


def activated_product(
    x_MK: Float[Array, "M K"],
    w_EKN: Float[Array, "E K N"],
    weight_M: Float[Array, "M"],
    sizes_E: Int[Array, "E"],
    *,
    activation: Activation,
    keep: bool,
    alignment: int,
    implementation: str | None,
) -> tuple[Float[Array, "M F"], Float[Array, "M N"] | None]:
    """(a, h where ``keep``) with h = x w, `clean_leg`'s 'product', and a = activation(h, weight_M1) in x's dtype.

    One kernel on TPU, which never writes h unless it is to be kept; the product and then the activation elsewhere, and where
    the kernel cannot serve the widths.

    Args:
      activation: ``(h [M, N], weight [M, 1]) -> a [M, F]``, both in float32 or wider; zero of zero. N is F or 2F; each column
        of a comes from the same column of h, or of its halves.
      alignment, implementation: of `grouped_matmul`.

    Raises:
      ValueError, NotImplementedError: as `grouped_matmul`.
    """
    wide = functools.partial(_in_wide, activation)
    F = jax.eval_shape(wide, jax.ShapeDtypeStruct((1, w_EKN.shape[2]), x_MK.dtype), weight_M[:1]).shape[1]

    def steps(x_MK, w_EKN, weight_M, sizes_E):
        h_MN = clean_leg("product", x_MK, w_EKN, sizes_E, alignment=alignment, implementation=implementation)
        return wide(h_MN, weight_M).astype(x_MK.dtype), *((h_MN,) if keep else ())

    fused = functools.partial(tpu.product, activation=activation, F=F, keep=keep)
    a_MF, *h = _choose(steps, fused, tpu.refuses(x_MK, w_EKN, F), implementation)(x_MK, w_EKN, weight_M, sizes_E)
    return a_MF, h[0] if keep else None


def activated_transposed(
    dy_MO: Float[Array, "M O"],
    w_EFO: Float[Array, "E F O"],
    h_MN: Float[Array, "M N"],
    weight_M: Float[Array, "M"],
    sizes_E: Int[Array, "E"],
    *,
    activation: Activation,
    alignment: int,
    implementation: str | None,
) -> tuple[Float[Array, "M N"], Float[Array, "M F"], Float[Array, "M"]]:
    """(dh, a, dweight) of y = a w with a = activation(h, weight_M1): `clean_leg`'s 'transposed', and the activation's gradient.

    Args, Raises: as `activated_product`.
    """

    def steps(dy_MO, w_EFO, h_MN, weight_M, sizes_E):
        again = lambda h, weight: _in_wide(activation, h, weight).astype(h.dtype)  # noqa: E731
        a_MF, pull = jax.vjp(again, h_MN, weight_M)
        da_MF = clean_leg("transposed", dy_MO, w_EFO, sizes_E, alignment=alignment, implementation=implementation)
        dh_MN, dweight_M = pull(da_MF)
        return dh_MN, a_MF, dweight_M

    def fused(dy_MO, w_EFO, h_MN, weight_M, sizes_E, **options):
        dh_MN, a_MF, dweight_M = tpu.transposed(dy_MO, w_EFO, h_MN, weight_M, sizes_E, activation=activation, **options)
        return dh_MN, a_MF, dweight_M.astype(weight_M.dtype)

    E, F, O = w_EFO.shape
    like = jax.ShapeDtypeStruct((E, O, h_MN.shape[1]), w_EFO.dtype)
    return _choose(steps, fused, tpu.refuses(dy_MO, like, F), implementation)(dy_MO, w_EFO, h_MN, weight_M, sizes_E)


def _in_wide(activation, h_MN, weight_M):
    wide = functools.reduce(jnp.promote_types, (h_MN.dtype, weight_M.dtype, jnp.float32))
    return activation(h_MN.astype(wide), weight_M[:, None].astype(wide))


def _choose(steps, fused, why, implementation):
    check_implementation(implementation)
    kernel = lambda interpret: jax.custom_batching.sequential_vmap(functools.partial(fused, interpret=interpret))  # noqa: E731
    if why or implementation not in (None, "pallas_tpu", "pallas_tpu_interpret"):
        return steps
    if implementation is not None:
        return kernel(implementation.endswith("interpret"))
    return lambda *arrays: jax.lax.platform_dependent(*arrays, tpu=kernel(False), default=steps)
