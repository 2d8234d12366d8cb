"""One token: the choice of an implementation, made when the call is lowered.

Training never goes through here, so its gradient is that of the definition, whatever ran forward.
"""

import functools
from typing import Any

import jax

from pallas_kernels.linear_attention import gpu_step, tpu_step
from research.ops.linear_attention import recurrent

IMPLEMENTATIONS = (None, "recurrent", "pallas_tpu", "pallas_gpu", "pallas_tpu_interpret", "pallas_gpu_interpret")
# How jax.lax.platform_dependent calls a platform, and its kernel.
_PLATFORMS: dict[str, Any] = {"tpu": tpu_step, "cuda": gpu_step}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def step(implementation, scale, q_BGK, k_BGK, v_BHV, g, beta_BH, state_BHKV):
    """(o_BHV, the new state), everything in the accumulation dtype."""
    arrays = (q_BGK, k_BGK, v_BHV, g, beta_BH, state_BHKV)
    definition = functools.partial(recurrent.step, scale=scale)
    if implementation == "recurrent":
        return definition(*arrays)
    if implementation is None:
        serving = {name: module.step for name, module in _PLATFORMS.items() if not module.refuses(state_BHKV)}
        if tpu_step.copies(state_BHKV):
            serving.pop("tpu", None)
        kernels = {name: functools.partial(kernel, scale=scale) for name, kernel in serving.items()}
        return jax.lax.platform_dependent(*arrays, default=definition, **kernels) if kernels else definition(*arrays)
    module: Any = tpu_step if implementation.startswith("pallas_tpu") else gpu_step
    why = module.refuses(state_BHKV)
    if why:
        raise NotImplementedError(f"implementation={implementation!r} cannot serve this call: {why}")
    return module.step(*arrays, scale=scale, interpret=implementation.endswith("interpret"))


def _forward(implementation, scale, *arrays):
    return step(implementation, scale, *arrays), arrays


def _backward(implementation, scale, arrays, cotangents):
    return jax.vjp(functools.partial(recurrent.step, scale=scale), *arrays)[1](cotangents)


step.defvjp(_forward, _backward)
