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


# Beside a text_config, what says nothing of the language model.
BESIDE_TEXT = (
    "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "image_token_index", "boi_token_index", "eoi_token_index", "language_model_only",
)  # fmt: skip


def text_part(hub: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the language model alone: of a multimodal one's ``text_config``, and itself of any other.

    Raises:
      ValueError: no family reads the multimodal model, or keys beside its text_config are unknown or contradict it.
    """
    inner = hub.get("text_config")
    if not isinstance(inner, Mapping):
        return dict(hub)
    classes = hub.get("architectures") or []
    family = next((f for f in families().values() if set(classes) & set(f.multimodal)), None)
    if family is None or inner.get("model_type", family.model_types[0]) not in family.model_types:
        known = sorted({name for f in families().values() for name in f.multimodal})
        raise ValueError(
            f"config.json: architectures {list(classes)} around a text_config of model_type {inner.get('model_type')!r} is "
            f"unknown; known are {', '.join(known)}"
        )
    keys = Keys({name: value for name, value in hub.items() if name != "text_config"})
    keys.inert(*BESIDE_TEXT)
    tied = keys.get("tie_word_embeddings")
    if tied is not None and inner.get("tie_word_embeddings", tied) != tied:
        keys.refuse(f"tie_word_embeddings is {tied!r}, and in text_config {inner['tie_word_embeddings']!r}")
    keys.check()
    text = {**inner, "model_type": family.model_types[0], "architectures": [family.architectures[0]]}
    if tied is not None:
        text["tie_word_embeddings"] = tied
    if "quantization_config" in hub:
        text["quantization_config"] = hub["quantization_config"]
    return text


def model_config(hub: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes, in float32.

    Raises:
      ValueError: an unknown family, or keys that are missing, unknown, or say what the model cannot do: all of them.
    """
    hub = text_part(hub)
    family, keys = family_of(hub), Keys(hub)
    try:
        config = family.config(keys)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"config.json: a value is of another type than it must be: {error}") from error
    keys.check()
    return config
