"""Published families, one file each: what their config.json means and what their checkpoints call our arrays.

A file that defines ``FAMILY`` is found by its being here.
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from research.models.config import ModelConfig
from research.models.hub import Family, Keys


@functools.cache
def families() -> dict[str, Family]:
    """Every family by the name of its file."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").FAMILY for name in names}


def family_of(hub: Mapping[str, Any]) -> Family:
    """The family that reads a config.json.

    Raises:
      ValueError: there is none; lists those there are.
    """
    kind, classes = hub.get("model_type"), hub.get("architectures") or []
    for family in families().values():
        if family.reads(hub):
            return family
    known = sorted({name for family in families().values() for name in family.architectures})
    raise ValueError(
        f"config.json: model_type {kind!r} with architectures {list(classes)} is unknown; known are {', '.join(known)}"
    )


def model_config(hub: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes, in float32.

    Raises:
      ValueError: an unknown family, or keys that are missing, unknown, or say what the model cannot do: all of them.
    """
    family, keys = family_of(hub), Keys(hub)
    config = family.config(keys)
    keys.check()
    return config
