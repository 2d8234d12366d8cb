"""The choice of an implementation, made when the call is lowered, behind one custom_vjp.

Residuals have the same shapes whatever the choice: the state before every ``interval`` tokens, and nothing else. So a program
differentiated on one platform can be lowered for another. The interval follows from the shapes alone: a saved state takes
about as much room as v does over its tokens, and every implementation's chunks divide it.
"""

import functools
from typing import Any, NamedTuple

import jax

from pallas_kernels.linear_attention import gpu, tpu
from research.ops.kept import keepable
from research.ops.linear_attention import chunked

# How jax.lax.platform_dependent calls a platform, and its kernels.
_PLATFORMS = {"tpu": tpu, "cuda": gpu}


class Plan(NamedTuple):
    """What is static about a call. ``chunk_size`` is that of the XLA form; ``kernel_fits``: a kernel may use its own."""

    implementation: str | None
    scale: float
    interval: int
    chunk_size: int
    kernel_fits: bool


def make_plan(implementation, scale, chunk_size, T, K, V, per_channel, delta) -> Plan:
    """Fix the interval between saved states, and the XLA form's chunks within it."""
    if chunk_size is not None:
        kernel = implementation is not None and implementation.startswith("pallas")
        interval = chunk_size if kernel else chunk_size * _chunks_per_state(T, chunk_size, K, V)
        return Plan(implementation, scale, interval, chunk_size, interval == chunk_size)
    whole = _power_of_two(T)
    chunk_size = min(_tuned(per_channel, delta), whole)
    interval = max(chunk_size, min(whole, 128, max(32, _power_of_two(max(K, V)))))
    return Plan(implementation, scale, interval, chunk_size, True)


def _tuned(per_channel, delta):
    """The XLA form's chunk size, by measurement on CPU at B1 H8 T4096 K=V=64 and at B16 H4 T256 K=V=32: per-channel gates
    cost a pass of exponentials a level of the split, and the delta rule a solve, so both want short chunks."""
    return 16 if per_channel else 32 if delta else 64


def _power_of_two(x):
    return 1 << (x - 1).bit_length()


def _chunks_per_state(T, C, K, V):
    """How many chunks of a size that the caller chose share one saved state."""
    return min(max(1, -(-min(K, V) // (4 * C))), -(-T // C))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan, q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, state_BHKV):
    """(o_BTHV, state_BHKV) of the chunked recurrence, by the implementation the plan or the platform names."""
    inputs = (q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, state_BHKV)
    return _choose(plan, "forward", inputs, save=False)[:2]


def _attend_forward(plan, *inputs):
    o_BTHV, state_BHKV, saved_NBHKV = keepable(_choose(plan, "forward", inputs, save=True), "linear_attention")
    return (o_BTHV, state_BHKV), (inputs[:-1], saved_NBHKV)


def _attend_backward(plan, residuals, cotangents):
    inputs, saved_NBHKV = residuals
    return _choose(plan, "backward", (*inputs, saved_NBHKV, *cotangents))


attend.defvjp(_attend_forward, _attend_backward)


def _choose(plan, way, arrays: tuple, **save):
    options: dict[str, Any] = dict(scale=plan.scale, interval=plan.interval, **save)
    xla = functools.partial(getattr(chunked, way), chunk_size=plan.chunk_size, **options)
    if plan.implementation == "chunked":
        return xla(*arrays)
    if plan.implementation is not None:
        kernel = getattr(_named(plan), way)
        return kernel(*arrays, interpret=plan.implementation.endswith("interpret"), **options)
    kernels = {}
    if plan.kernel_fits:
        shapes = (*arrays[:5], arrays[-1])
        serving = {name: module for name, module in _PLATFORMS.items() if not _refuses(module, plan, shapes)}
        kernels = {name: functools.partial(getattr(module, way), **options) for name, module in serving.items()}
    return jax.lax.platform_dependent(*arrays, default=xla, **kernels) if kernels else xla(*arrays)


def refuses(plan, arrays) -> str | None:
    """Why the kernel that the plan names cannot serve ``arrays`` (q, k, v, g, beta, state), or None."""
    return _refuses(_named(plan), plan, arrays)


def _named(plan) -> Any:
    return tpu if plan.implementation.startswith("pallas_tpu") else gpu


def _refuses(module, plan, arrays):
    if module is gpu and plan.chunk_size > gpu.C:
        return f"its chunks are {gpu.C} tokens, got chunk_size={plan.chunk_size}"
    return module.refuses(*arrays, plan.interval)
