"""What a published family says of itself."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

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
      multimodal: values of ``architectures`` of models whose ``text_config`` is the family's.
      spellings: pairs for ``re.sub`` from names of tensors in such checkpoints to those that ``tensors`` knows.
      fused: tensors that hold what several of ``tensors`` do; those that a checkpoint has are read in their place.
      matches: whether it reads a config.json that names neither a model_type nor architectures.
      ignored: regular expressions of tensors that a checkpoint may hold besides, and that the model has no use for.
    """

    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    config: Callable[[Keys], ModelConfig]
    tensors: Callable[[ModelViews], Iterable[Tensor]]
    ignored: tuple[str, ...] = ()
    multimodal: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    fused: Callable[[ModelViews], Iterable[Tensor]] = lambda model: ()
    matches: Callable[[Mapping[str, Any]], bool] = lambda hub: False

    def reads(self, hub: Mapping[str, Any]) -> bool:
        """Whether a config.json is the family's: by its model_type and architectures, or the one of them that is there."""
        kind, classes = hub.get("model_type"), hub.get("architectures") or []
        if kind is None and not classes:
            return self.matches(hub)
        of_kind = kind is None or kind in self.model_types
        return of_kind and (not classes or bool(set(classes) & set(self.architectures)))

    def spelled(self, name: str) -> str:
        """The name by which ``tensors`` knows a tensor of a checkpoint."""
        for pattern, replacement in self.spellings:
            name = re.sub(pattern, replacement, name)
        return name
