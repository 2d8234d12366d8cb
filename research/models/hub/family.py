"""What a published family says of itself."""

import dataclasses
from collections.abc import Callable, Iterable

from research.models.config import ModelConfig
from research.models.hub.keys import Keys
from research.models.hub.tensors import ModelViews, Tensor


@dataclasses.dataclass(frozen=True)
class Family:
    """One file of ``research.models.families`` defines one, as ``FAMILY``.

    Attributes:
      model_types: values of config.json's ``model_type`` that it reads.
      architectures: values of config.json's ``architectures`` that it reads.
      config: the model that a config.json describes. It reads every key that changes the mathematics.
      tensors: every tensor of the published checkpoint as views of the model's own arrays. It serves both ways, so each
        element of the model appears exactly once.
      ignored: regular expressions of tensors that a checkpoint may hold besides, and that the model has no use for.
    """

    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    config: Callable[[Keys], ModelConfig]
    tensors: Callable[[ModelViews], Iterable[Tensor]]
    ignored: tuple[str, ...] = ()
