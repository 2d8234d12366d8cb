"""Everything a run must remember of its model to go on bitwise."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from research.models.config import ModelConfig
from research.models.language_model import LanguageModel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A value: the training step takes one and returns the next.

    Attributes:
      step: int32 scalar, steps taken.
      params: what is differentiated, decayed and optimised (``nnx.Param``).
      variables: every other variable of the model (router biases).
      opt_state: optax's.
      key: the key that the randomness of all steps derives from; never changes.
    """

    step: jax.Array
    params: Any
    variables: Any
    opt_state: Any
    key: jax.Array


def create_state(model: ModelConfig, optimizer, seed: int) -> tuple[nnx.GraphDef, TrainState]:
    """A fresh model and optimizer state on the current mesh (``jax.set_mesh``), and the model's graph definition."""
    init_key, step_key = jax.random.split(jax.random.key(seed))

    @jax.jit
    def make(key):
        return LanguageModel(model, rngs=nnx.Rngs(params=key))

    graphdef, params, variables = nnx.split(make(init_key), nnx.Param, ...)
    opt_state = jax.jit(optimizer.init)(params)
    return graphdef, TrainState(jnp.zeros((), jnp.int32), params, variables, opt_state, step_key)
