"""What stands between the two matrices of an expert."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.axes import Array
from research.ops.dispatch.expert_mlp import swiglu

GATED = ("swiglu", "geglu")
ACTIVATIONS = (*GATED, "relu2", "relu", "gelu")


@functools.cache
def activation(name: str, *, limit: float = 0.0, alpha: float = 1.0, shift: float = 0.0) -> Callable[[Array], Array]:
    """A function of hidden rows [..., N] -> [..., F]; the same object for the same arguments, as `expert_mlp` wants it.

    Args:
      name: 'swiglu' and 'geglu' (GELU's tanh form: Grok-1) split rows into gate and up, N = 2F, gate first; 'relu2' is
        relu(x)² (So et al. 2021; Nemotron), N = F as for 'relu' and 'gelu'.
      limit: above 0 clamps gate ≤ limit and |up| ≤ limit first (GPT-OSS: 7).
      alpha: gate·sigmoid(alpha·gate) (GPT-OSS: 1.702).
      shift: added to up (GPT-OSS: 1).
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"name is {name!r}, it must be one of {ACTIVATIONS}")
    if name not in GATED:
        if (limit, alpha, shift) != (0.0, 1.0, 0.0):
            raise ValueError(f"limit, alpha and shift belong to gated activations, {name!r} has no gate")
        plain: dict[str, Callable[[Array], Array]] = {
            "relu2": lambda h: jnp.square(jax.nn.relu(h)),
            "relu": jax.nn.relu,
            "gelu": functools.partial(jax.nn.gelu, approximate=True),
        }
        return plain[name]
    if name == "swiglu" and (limit, alpha, shift) == (0.0, 1.0, 0.0):
        return swiglu

    def gated(h):
        gate, up = jnp.split(h, 2, axis=-1)
        if limit:
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        open_ = gate * jax.nn.sigmoid(alpha * gate) if name == "swiglu" else jax.nn.gelu(gate, approximate=True)
        return open_ * (up + shift)

    return gated
