"""How a layer makes its parameters and reads them."""

import jax
import jax.numpy as jnp
from flax import nnx

from research.axes import Array, Float
from research.sharding.mesh import P, declare, gathered


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype, spec: P, *, fan_in: int, gain: float = 1.0) -> nnx.Param:
    """A parameter drawn from a normal of standard deviation ``gain · fan_in^-1/2``, truncated at two of them."""
    draw = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)
    # 0.8796 is the standard deviation of the unit normal truncated at ±2.
    return nnx.Param((draw * (gain * fan_in**-0.5 / 0.8796)).astype(dtype), out_sharding=declare(spec))


def constant(value: Array, dtype, spec: P) -> nnx.Param:
    """A parameter that starts at ``value``."""
    return nnx.Param(jnp.asarray(value, dtype), out_sharding=declare(spec))


def project(x: Float[Array, "*rows D"], w_DN: Float[Array, "D N"]) -> Float[Array, "*rows N"]:
    """``x @ w`` over the last axis.

    As one product of two matrices: with two leading axes XLA's CPU backend takes half again as long for the gradient.
    """
    return (x.reshape(-1, x.shape[-1]) @ w_DN).reshape(*x.shape[:-1], w_DN.shape[-1])


def read(variable: nnx.Variable, dtype=None) -> Array:
    """A variable's value whole on every device, cast to the dtype that the layer computes in."""
    value = variable[...]
    return gathered(value if dtype is None else value.astype(dtype))
