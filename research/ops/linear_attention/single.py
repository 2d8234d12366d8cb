"""One token: the choice of an implementation, made when the call is lowered.

Training never goes through here, so its gradient is that of the definition, whatever ran forward.
"""

import functools

import jax

from pallas_kernels.linear_attention import tpu_step
from research.ops.linear_attention import recurrent

IMPLEMENTATIONS = (None, "recurrent", "pallas_tpu", "pallas_tpu_interpret")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def step(implementation, scale, q_BGK, k_BGK, v_BHV, g, beta_BH, state_BHKV):
    """(o_BHV, the new state), everything in the accumulation dtype."""
    arrays = (q_BGK, k_BGK, v_BHV, g, beta_BH, state_BHKV)
    definition = functools.partial(recurrent.step, scale=scale)
    if implementation == "recurrent":
        return definition(*arrays)
    kernel = functools.partial(tpu_step.step, scale=scale)
    why = tpu_step.refuses(state_BHKV)
    if implementation is None:
        return definition(*arrays) if why else jax.lax.platform_dependent(*arrays, default=definition, tpu=kernel)
    if why:
        raise NotImplementedError(f"implementation={implementation!r} cannot serve this call: {why}")
    return kernel(*arrays, interpret=implementation.endswith("interpret"))


def _forward(implementation, scale, *arrays):
    return step(implementation, scale, *arrays), arrays


def _backward(implementation, scale, arrays, cotangents):
    return jax.vjp(functools.partial(recurrent.step, scale=scale), *arrays)[1](cotangents)


step.defvjp(_forward, _backward)
