"""One token of a layer in one kernel on TPU, where XLA's form is the definition and has the gradients."""

import functools
from typing import Any

import jax

from research.ops.explicit_mesh import vary_alike

IMPLEMENTATIONS = (None, "xla", "pallas_tpu", "pallas_tpu_interpret")


def fused_step(xla, kernel, refuses):
    """``step(implementation, options, *arrays)``: ``xla(*options, *arrays)``, or ``kernel`` of the same and ``interpret=``.

    None takes the kernel where the call is lowered for a TPU and ``refuses(*options, *arrays)`` gives no reason against it.
    ``options`` is a hashable tuple. ``step`` raises ValueError for an unknown implementation and NotImplementedError where the
    kernel is named and cannot serve the call.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
    def run(implementation, options, *arrays):
        if implementation == "xla":
            return xla(*options, *arrays)
        why = refuses(*options, *arrays)
        if why and implementation is not None:
            raise NotImplementedError(f"implementation={implementation!r} cannot serve this call: {why}")
        if why:
            return xla(*options, *arrays)
        if implementation is None:
            forms = {"default": functools.partial(xla, *options), "tpu": functools.partial(kernel, *options)}
            return jax.lax.platform_dependent(*arrays, **forms)
        return kernel(*options, *arrays, interpret=implementation.endswith("interpret"))

    def forward(implementation, options, *arrays):
        return run(implementation, options, *arrays), arrays

    def backward(implementation, options, arrays, cotangents):
        return jax.vjp(functools.partial(xla, *options), *arrays)[1](cotangents)

    run.defvjp(forward, backward)

    def step(implementation, options, *arrays) -> Any:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}; got {implementation!r}")
        return run(implementation, options, *vary_alike(arrays))

    return step
