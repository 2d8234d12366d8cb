"""One flip at a time of what config.json says, in models of a layer or two (``flips.json``, written by hand).

Needs numpy alone: ``generate.py --flips`` gives PyTorch the same models, and ``test_flips`` compares. Of every family of
``flips.json`` a list of models: ``model``, what its config.json has other than the golden one; ``flips``, each a change that must
change the logits as it does in transformers; ``inert``, keys with a value other than theirs that must change nothing there.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).parent
# A value that says: not in config.json at all.
ABSENT = "absent"
LENGTH = 12
# What is stored of the logits: the last tokens', a part of the vocabulary.
PART = np.s_[-4:, :16]

# Keys that change nothing in any family, with a value that would be another one.
EVERYWHERE = {
    "_attn_implementation": "eager", "_attn_implementation_autoset": True, "_name_or_path": "another", "attention_dropout": 0.5, "auto_map": {}, "bos_token_id": 5,
    "chunk_size_feed_forward": 3, "embd_pdrop": 0.5, "eos_token_id": 7, "hidden_dropout": 0.5, "hidden_dropout_prob": 0.5,
    "id2label": {"0": "zero"}, "initializer_range": 0.5, "is_encoder_decoder": False, "label2id": {"zero": 0},
    "max_position_embeddings": 77, "name_or_path": "another", "output_attentions": False, "output_hidden_states": True,
    "output_router_logits": True, "pad_token_id": 3, "pretraining_tp": 2, "problem_type": "regression", "resid_pdrop": 0.5,
    "return_dict": True, "router_aux_loss_coef": 0.5, "router_jitter_noise": 0.5, "router_z_loss_coef": 0.5, "sep_token_id": 4,
    "torch_dtype": "float32", "transformers_version": "4.40.0", "unsloth_version": "2025.1", "use_cache": False,
}  # fmt: skip


class Flip(NamedTuple):
    """``model`` is which of the family's, ``change`` empty for the model as it is."""

    family: str
    model: str
    change: dict[str, Any]
    hub: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{self.model} {json.dumps(self.change)}"


def golden_config(family: str) -> dict[str, Any]:
    return json.loads((FOLDER / "golden" / family / "config.json").read_text())


def changed(hub: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = {**hub, **changes}
    return {name: value for name, value in merged.items() if value != ABSENT}


def families() -> list[str]:
    return sorted(_told())


def flips(family: str) -> Iterator[Flip]:
    """Each model as it is, then flipped."""
    for name, hub, model in _models(family):
        for change in ({}, *model["flips"]):
            yield Flip(family, name, change, changed(hub, change))


def inert(family: str) -> Iterator[Flip]:
    for name, hub, model in _models(family):
        everywhere = EVERYWHERE if name.endswith(" 0") else {}
        for key, value in (everywhere | model.get("inert", {})).items():
            yield Flip(family, name, {key: value}, changed(hub, {key: value}))


def _models(family: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for number, model in enumerate(_told()[family]):
        yield f"{family} {number}", changed(golden_config(family), model["model"]), model


def _told() -> dict[str, list[dict[str, Any]]]:
    return json.loads((FOLDER / "flips.json").read_text())


def digest(shapes: dict[str, tuple[int, ...]]) -> str:
    """Of the names and shapes of a checkpoint's tensors."""
    told = json.dumps(sorted((name, list(shape)) for name, shape in shapes.items()))
    return hashlib.sha256(told.encode()).hexdigest()[:16]
