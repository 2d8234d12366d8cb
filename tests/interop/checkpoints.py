"""Golden families, and their checkpoints rebuilt from names and shapes alone."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from tests.interop.weights import documents, weight

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(folder.name for folder in GOLDEN.iterdir())


class Golden(NamedTuple):
    """What ``generate.py`` left of one family."""

    hub: dict[str, Any]
    tensors: dict[str, np.ndarray]
    documents: list[np.ndarray]
    logits: list[np.ndarray]
    new: list[list[int]]
    atol: float


def golden(name: str) -> Golden:
    tiny, hub, shapes, new = (
        json.loads((GOLDEN / name / f"{file}.json").read_text()) for file in ("tiny", "config", "tensors", "new")
    )
    tensors = {
        tensor: weight(tensor, tuple(shape), tiny["seed"], tiny.get("centred", "(?!)"))
        for tensor, shape in shapes.items()
    }
    stored = np.load(GOLDEN / name / "logits.npz")
    logits = [stored[f"document_{i}"] for i in range(len(stored.files))]
    return Golden(hub, tensors, documents(hub["vocab_size"], tiny["seed"]), logits, new, tiny["atol"])


def write_checkpoint(directory: Path, hub: dict[str, Any], tensors: dict[str, np.ndarray], files: int = 1) -> Path:
    """A Hugging Face directory, its tensors dealt out to so many files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hub))
    if files == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    where = {name: f"model-{i % files}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return directory


def stored_in(directory: Path) -> dict[str, np.ndarray]:
    from research.interop.stored_tensors import StoredTensors

    stored = StoredTensors(directory)
    return {name: stored.read(name) for name in stored.shapes()}
