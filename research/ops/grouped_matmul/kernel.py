"""The legs of the TPU and GPU kernels."""

import functools

import jax

from pallas_kernels.grouped_matmul import gpu, tpu

_MODULES = {"TPU": tpu, "GPU": gpu}


def _kernel(platform, function, **options):
    """A leg from a kernel: over a batch, one call after another."""
    call = jax.custom_batching.sequential_vmap(functools.partial(function, **options))

    def leg(a, b, sizes_E, *, alignment, clean):
        why = _MODULES[platform].refuses(a, b)
        if why:
            raise NotImplementedError(f"grouped_matmul's {platform} kernel cannot serve this call: {why}")
        return call(a, b, sizes_E)

    return leg


def legs(platform: str, *, interpret: bool):
    module = _MODULES[platform]
    return {
        "product": _kernel(platform, module.product, interpret=interpret),
        "transposed": _kernel(platform, module.product, interpret=interpret, transposed=True),
        "outer": _kernel(platform, module.outer, interpret=interpret),
    }
