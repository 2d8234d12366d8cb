"""How a layer makes its parameters and reads them."""

import jax
import jax.numpy as jnp
from flax import nnx

from research.axes import Array, Float
from research.sharding.mesh import P, declare, gathered, on_mesh


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype, spec: P, *, fan_in: int, gain: float = 1.0) -> nnx.Param:
    """A parameter drawn from a normal of standard deviation ``gain · fan_in^-1/2``, truncated at two of them."""
    draw = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)
    # 0.8796 is the standard deviation of the unit normal truncated at ±2.
    return nnx.Param((draw * (gain * fan_in**-0.5 / 0.8796)).astype(dtype), out_sharding=declare(spec))


def constant(value: Array, dtype, spec: P) -> nnx.Param:
    """A parameter that starts at ``value``."""
    return nnx.Param(jnp.asarray(value, dtype), out_sharding=declare(spec))


def dt_bias(rngs: nnx.Rngs, shape: tuple[int, ...]) -> nnx.Param:
    """What softplus takes to step sizes log-uniform in [1e-3, 1e-1], as Mamba (Gu & Dao 2023, section 3.6) starts them."""
    dt = jnp.exp(jax.random.uniform(rngs.params(), shape, minval=jnp.log(1e-3), maxval=jnp.log(1e-1)))
    return constant(dt + jnp.log(-jnp.expm1(-dt)), jnp.float32, P(*(None,) * len(shape)))


def log_rate(rngs: nnx.Rngs, shape: tuple[int, ...]) -> nnx.Param:
    """The logarithm of decay rates uniform in [1, 16], as Mamba-2 (Dao & Gu 2024) starts them."""
    rate = jax.random.uniform(rngs.params(), shape, minval=1.0, maxval=16.0)
    return constant(jnp.log(rate), jnp.float32, P(*(None,) * len(shape)))


def project(x: Float[Array, "*rows D"], w_DN: Float[Array, "D N"], dtype=None) -> Float[Array, "*rows N"]:
    """``x @ w`` over the last axis, in x's dtype or the wider ``dtype``.

    As one product of two matrices: with two leading axes XLA's CPU backend takes half again as long for the gradient.
    """
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), w_DN, preferred_element_type=dtype)
    # Where the rows lie over several mesh axes, a reshape alone cannot know which of its axes takes them.
    spec = P(*jax.typeof(x).sharding.spec[:-1], None) if on_mesh() else None
    return jax.lax.reshape(y, (*x.shape[:-1], w_DN.shape[-1]), out_sharding=spec)


def read(variable: nnx.Variable, dtype=None) -> Array:
    """A variable's value whole on every device, cast to the dtype that the layer computes in."""
    value = variable[...]
    return gathered(value if dtype is None else value.astype(dtype))
