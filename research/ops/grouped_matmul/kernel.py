"""The TPU kernel's legs."""

import functools

import jax

from pallas_kernels.grouped_matmul import tpu


def _kernel(function, **options):
    """A leg from a kernel: over a batch, one call after another."""
    call = jax.custom_batching.sequential_vmap(functools.partial(function, **options))

    def leg(a, b, sizes_E, *, alignment, clean):
        why = tpu.refuses(a, b)
        if why:
            raise NotImplementedError(f"grouped_matmul's TPU kernel cannot serve this call: {why}")
        return call(a, b, sizes_E)

    return leg


def legs(*, interpret: bool):
    return {
        "product": _kernel(tpu.product, interpret=interpret),
        "transposed": _kernel(tpu.product, interpret=interpret, transposed=True),
        "outer": _kernel(tpu.outer, interpret=interpret),
    }
