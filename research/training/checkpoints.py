"""Checkpoints: Orbax folders that say what they are, saved in the background, verified before they are believed.

``WORKDIR/checkpoints/STEP/`` holds ``state`` (arrays), ``data`` (the Grain iterator's position), ``tokenizer``
(its JSON), custom metadata (configuration, corpus) as readable JSON, and ``checksums.json``.
"""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from research.config import ConfigError
from research.training.metrics import say_now

CHECKPOINTS_FOLDER = "checkpoints"
CHECKSUMS_FILE = "checksums.json"
ORBAX_METADATA_FILE = "_CHECKPOINT_METADATA"
TOKENIZER_FILE = "tokenizer.json"
DAMAGED, DELETING, UNFINISHED = ".damaged", ".deleting", ".orbax-checkpoint-tmp"


class Checkpoints:
    """The checkpoints of one work directory: saves one at a time in the background and keeps the newest ``keep``.

    A save is atomic: Orbax writes beside and renames. What a killed process left unfinished is removed at the start;
    a damaged checkpoint is renamed to ``STEP.damaged``, never deleted.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 3, say: Callable[[str], None] = say_now):
        self.folder = Path(workdir).resolve() / CHECKPOINTS_FOLDER
        self._keep, self._say = keep, say
        self._finishing: threading.Thread | None = None
        self._failure: BaseException | None = None
        if jax.process_index() == 0 and self.folder.is_dir():
            for entry in self.folder.iterdir():
                if entry.name.endswith((DELETING, UNFINISHED)):
                    shutil.rmtree(entry)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole, or None where there is none yet; damaged newer ones are set aside.

        Raises:
          ConfigError: there are checkpoints, and not one of them is whole.
        """
        step = -1
        if jax.process_index() == 0:
            path, damaged = newest_whole(self.folder)
            for bad, problem in damaged if path is not None or not damaged else []:
                aside = _free_name(bad.with_name(bad.name + DAMAGED))
                bad.rename(aside)
                self._say(f"checkpoint {bad.name} is damaged ({problem}): set aside as {aside}")
            if damaged and path is None:
                step = -2
            elif path is not None:
                step = int(path.name)
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        if step == -2:
            problems = "; ".join(problem for _, problem in newest_whole(self.folder)[1])
            raise ConfigError(
                f"{self.folder} holds checkpoints, but none is whole ({problems}): move it away to restart"
            )
        return None if step < 0 else self.folder / str(step)

    def restore(self, path: Path, abstract_state, iterator):
        """The state saved at ``path``, on the devices that ``abstract_state`` names; winds ``iterator`` to its place.

        Args:
          abstract_state: the state's pytree with a ``jax.ShapeDtypeStruct`` (with a sharding) for each array.

        Raises:
          ConfigError: the arrays saved there have other names or shapes, or the data was read by other processes.
        """
        check_shapes(path, abstract_state)
        names = {"state": abstract_state}
        if iterator is not None:
            if not (path / "data" / f"process_{jax.process_index()}-of-{jax.process_count()}.json").exists():
                raise ConfigError(
                    f"{path} holds no data position for {jax.process_count()} processes: resume on as many"
                )
            names["data"] = iterator
        return ocp.load_checkpointables(str(path), names)["state"]

    def save(self, step: int, state, iterator=None, *, about: Mapping[str, Any], tokenizer: str | None = None) -> None:
        """Begins to save ``state`` after ``step``; returns once the arrays are copied, so that they may be donated.

        Args:
          about: what goes into the checkpoint's metadata, as JSON values.
          tokenizer: the tokenizer's own JSON.

        Raises:
          FileExistsError: there is a checkpoint of ``step``.
          Exception: whatever made the save before this one fail.
        """
        self.wait()
        path = self.folder / str(step)
        if path.exists():
            raise FileExistsError(f"{path} exists already: a checkpoint is never overwritten")
        self.folder.mkdir(parents=True, exist_ok=True)
        parts: dict[str, Any] = {"state": state}
        if iterator is not None:
            parts["data"] = iterator
        if tokenizer is not None:
            parts["tokenizer"] = _Text(TOKENIZER_FILE, tokenizer)
        response = ocp.save_checkpointables_async(str(path), parts, custom_metadata=dict(about))
        self._finishing = threading.Thread(target=self._finish, args=(response, path), name=f"checkpoint {step}")
        self._finishing.start()

    def wait(self) -> None:
        """Waits until the save under way is on the disk, and raises what made it fail."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _finish(self, response, path: Path) -> None:
        try:
            response.result()
            if jax.process_index() == 0:
                write_checksums(path)
                for old in checkpoint_paths(self.folder)[: -self._keep]:
                    # Renamed first: a process killed halfway must not leave half a checkpoint under a good name.
                    shutil.rmtree(old.rename(_free_name(old.with_name(old.name + DELETING))))
        except BaseException as failure:
            self._failure = failure


class _Text:
    """A text file as an Orbax checkpointable."""

    def __init__(self, name: str, text: str):
        self._name, self._text = name, text

    async def save(self, directory):
        async def write():
            folder = await directory.await_creation()
            if jax.process_index() == 0:
                (folder / self._name).write_text(self._text, encoding="utf-8")

        return write()

    async def load(self, directory):
        raise NotImplementedError("read the file itself")


def checkpoint_paths(folder: str | os.PathLike) -> list[Path]:
    """The committed checkpoints in ``folder``, oldest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = [entry for entry in folder.iterdir() if entry.is_dir() and entry.name.isascii() and entry.name.isdigit()]
    return sorted(found, key=lambda entry: int(entry.name))


def newest_whole(folder: str | os.PathLike) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest undamaged checkpoint in ``folder``, and what is wrong with each newer one; changes nothing."""
    damaged = []
    for path in reversed(checkpoint_paths(folder)):
        problem = damage(path)
        if problem is None:
            return path, damaged
        damaged.append((path, problem))
    return None, damaged


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files in a few words that name the file, or None where nothing is.

    Where the process was killed between Orbax's commit and our checksums, Orbax's own commit record has to do.
    """
    metadata = path / ORBAX_METADATA_FILE
    try:
        if not json.loads(metadata.read_bytes()).get("commit_timestamp_nsecs"):
            return f"{metadata} records no commit"
    except (OSError, ValueError, AttributeError):
        return f"{metadata} is missing or unreadable"
    checksums = path / CHECKSUMS_FILE
    if not checksums.exists():
        return None if (path / "state").is_dir() else f"{path / 'state'} is missing"
    try:
        files = json.loads(checksums.read_bytes())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{checksums} is unreadable"
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes, must have {size}"
        if _sha256(file) != digest:
            return f"{file} has changed since it was saved"
    return None


def write_checksums(path: Path) -> None:
    """Writes the size and SHA-256 of every file of a checkpoint into it, atomically."""
    files = {
        file.relative_to(path).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != CHECKSUMS_FILE
    }
    unfinished = path / (CHECKSUMS_FILE + ".tmp")
    unfinished.write_text(json.dumps({"files": files}, indent=1))
    unfinished.replace(path / CHECKSUMS_FILE)


def read_about(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON values a checkpoint was saved with (``about`` of ``Checkpoints.save``)."""
    return json.loads((Path(path) / ORBAX_METADATA_FILE).read_bytes())["custom_metadata"]


def read_tokenizer(path: str | os.PathLike) -> str:
    """The JSON text of the tokenizer a checkpoint was saved with."""
    return (Path(path) / "tokenizer" / TOKENIZER_FILE).read_text(encoding="utf-8")


def abstract(state):
    """``state`` with shapes, dtypes and shardings in place of arrays: what to restore into."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


def load_part(path: str | os.PathLike, abstract_part: dict[str, Any]) -> dict[str, Any]:
    """Only the fields of the saved state that ``abstract_part`` names, such as its parameters without the optimizer."""
    check_shapes(Path(path), abstract_part, partial=True)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load(str(path), abstract_part, checkpointable_name="state")


def check_shapes(path: Path, abstract_state, *, partial: bool = False) -> None:
    """Raises ConfigError naming the arrays of ``abstract_state`` that ``path`` lacks or holds in another shape."""
    saved = _shapes(ocp.metadata(str(path), checkpointable_name="state").metadata)
    wanted = _shapes(abstract_state)
    problems = []
    for name, shape in wanted.items():
        if name not in saved:
            problems.append(f"it has no {name}")
        elif saved[name] != shape:
            problems.append(f"{name} is {list(saved[name])} there, {list(shape)} here")
    if not partial:
        problems += [f"{name} has no place here" for name in saved if name not in wanted]
    if problems:
        more = f" and {len(problems) - 3} more differences" if len(problems) > 3 else ""
        raise ConfigError(f"{path} is a checkpoint of another model: {'; '.join(problems[:3])}{more}")


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    """Shapes by dotted path; the same for a state and for what Orbax says of a saved one (keys as dicts, lists)."""
    shapes = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        words = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        shape = leaf.shape
        if isinstance(leaf, jax.ShapeDtypeStruct | jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            shape = jax.eval_shape(jax.random.key_data, leaf).shape
        shapes[".".join(words)] = tuple(shape)
    return shapes


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _free_name(path: Path) -> Path:
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate
