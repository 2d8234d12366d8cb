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

    @jax.jit
    def make(key):
        init_key, step_key = jax.random.split(key)
        made = LanguageModel(model, rngs=nnx.Rngs(params=init_key))
        return made, optimizer.init(nnx.state(made, nnx.Param)), jnp.zeros((), jnp.int32), step_key

    made, opt_state, step, step_key = make(jax.random.key(seed))
    graphdef, params, variables = nnx.split(made, nnx.Param, ...)
    return graphdef, TrainState(step, params, variables, opt_state, step_key)
