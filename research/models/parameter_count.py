"""How many parameters a model has, and how many of them work on a token: by shapes alone."""

import functools
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from research.models.config import ModelConfig
from research.models.hub.tensors import variables_of
from research.models.language_model import LanguageModel

# Of a mixture's experts, whose leading axis (behind that of repeats) is the expert.
EXPERT_ARRAYS = ("w_in_EDF", "w_out_EFD", "b_in_EF", "b_out_ED")


class ParameterCount(NamedTuple):
    """Numbers of parameters, heads ahead left out, as published figures do.

    Attributes:
      total: all.
      active: those that work on one token: of routed experts the share that a token visits.
      embedding: the embedding's, which some published figures leave out of ``active``.
      head: the head's; 0 where it is the embedding.
    """

    total: int
    active: int
    embedding: int
    head: int


def parameter_count(config: ModelConfig) -> ParameterCount:
    """Of a model of ``config``, which is not built."""
    model = model_of_shapes(config)
    total, active, named = 0, 0.0, {}
    for name, variable in variables_of(model):
        if not isinstance(variable, nnx.Param) or name.startswith("mtp."):
            continue
        size = int(np.prod(variable.shape))
        total, named[name] = total + size, size
        active += size * _share(model, name)
    return ParameterCount(total, round(active), named["embedding_VD"], named.get("head_DV", 0))


@functools.lru_cache(maxsize=1)
def model_of_shapes(config: ModelConfig) -> LanguageModel:
    """A model with shapes in place of arrays, to count by: where they would lie is not to be asked of it."""
    return jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(params=0)))


def _share(model: LanguageModel, name: str) -> float:
    """Of an array the part that one token uses."""
    if not name.endswith(EXPERT_ARRAYS):
        return 1.0
    stage, branch = (int(part.split("]")[0]) for part in name.split("[")[1:3])
    mixer = model.plan[stage].unit[branch].mixer
    return mixer.per_token / mixer.experts  # type: ignore[union-attr]
