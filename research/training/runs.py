"""A work directory as a run: whose it is, what may change when it goes on, and its model for use elsewhere."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from research.config import ConfigError, from_dict, to_json
from research.data.tokenization import Tokenizer, tokenizer_from_json
from research.models.language_model import LanguageModel
from research.models.sparsify import from_dense
from research.training.checkpoints import (
    CHECKPOINTS_FOLDER,
    ORBAX_METADATA_FILE,
    load_part,
    newest_whole,
    read_about,
    read_tokenizer,
)
from research.training.config import ExperimentConfig
from research.training.state import TrainState

CONFIG_FILE = "config.json"
CACHE_FOLDER = "cache"
# Fields a run may be continued with, whatever they were; the first that matches counts. The corpus itself is compared
# by its hash, so that it may lie elsewhere.
MAY_CHANGE = {
    "train.seed": False,
    "train.*": True,
    "mesh.*": True,
    "optimizer.name": False,
    "optimizer.*": True,
    "data.threads": True,
    "data.prefetch": True,
    "data.source.*": True,
    "data.tokenizer.path": True,
    "*": False,
}


@contextlib.contextmanager
def claim(workdir: str | os.PathLike) -> Iterator[Path]:
    """Holds ``workdir`` (made if need be) for this process alone; the lock goes with the process, however it ends.

    Raises:
      ConfigError: not a directory, another process holds it, or it holds files that are no run's.
    """
    path = Path(workdir).expanduser().resolve()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{path} is a file: the work directory must be a directory or not exist yet") from None
    foreign = [entry.name for entry in path.iterdir() if entry.name != CACHE_FOLDER and not entry.name.startswith(".")]
    if foreign and not (path / CONFIG_FILE).exists():
        raise ConfigError(
            f"{path} holds {sorted(foreign)[0]} but no {CONFIG_FILE}, so it is no run to resume: "
            "the work directory must be a run, empty, or not exist yet"
        )
    handle = os.open(path, os.O_RDONLY)
    try:
        if jax.process_index() == 0:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{path} is in use: another process is training there") from None
            except OSError:
                pass  # a file system without locks
        yield path
    finally:
        os.close(handle)


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that differ between two configurations' dicts (``to_dict``): dotted path → (before, now)."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return {path: (old.get(path), new.get(path)) for path in {**old, **new} if old.get(path) != new.get(path)}


def check_changes(workdir: Path, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a run goes on with otherwise than before, a line a field.

    Raises:
      ConfigError: naming fields that a run cannot change on its way (another model, other data).
    """
    differing = changes(before, now)
    fixed = {path: pair for path, pair in differing.items() if not _may_change(path)}
    if fixed:
        what = "another model" if any(path.startswith("model") for path in fixed) else "another experiment"
        told = [f"{path} was {_short(old)}, now {_short(new)}" for path, (old, new) in list(fixed.items())[:4]]
        more = f", and {len(fixed) - 4} more" if len(fixed) > 4 else ""
        raise ConfigError(
            f"{workdir} holds {what} ({'; '.join(told)}{more}): set these fields as they were, or choose another --workdir"
        )
    return [f"{path} was {_short(old)}, now {_short(new)}" for path, (old, new) in differing.items()]


def write_config(workdir: Path, config: ExperimentConfig) -> None:
    """Writes the configuration as readable JSON, whole or not at all."""
    unfinished = workdir / (CONFIG_FILE + ".tmp")
    unfinished.write_text(to_json(config) + "\n", encoding="utf-8")
    unfinished.replace(workdir / CONFIG_FILE)


def read_config(workdir: Path) -> dict[str, Any] | None:
    """The configuration's dict that a work directory was last started with, or None where there is none.

    Raises:
      ConfigError: it is not readable.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): restore it, or move the run away") from error


class Trained(NamedTuple):
    """A model out of a checkpoint, with all that goes with it.

    ``published`` is of a model that came from Hugging Face and has not been trained since: its ``config`` (config.json) and
    ``texts``, small files by name (the chat template is among them).
    """

    model: LanguageModel
    tokenizer: Tokenizer
    config: ExperimentConfig
    step: int
    corpus_hash: str
    path: Path
    published: Mapping[str, Any] | None = None


class NoRun(ConfigError):
    """A directory without a checkpoint."""


def find_checkpoint(directory: str | os.PathLike, say=print) -> Path:
    """The newest whole checkpoint of a work directory (or the checkpoint itself, if that is what it is); reads only.

    Raises:
      NoRun: there is none.
    """
    directory = Path(directory).expanduser().resolve()
    if (directory / ORBAX_METADATA_FILE).exists():
        return directory
    path, damaged = newest_whole(directory / CHECKPOINTS_FOLDER)
    for bad, problem in damaged:
        say(f"checkpoint {bad.name} is damaged ({problem}): passed over")
    if path is None:
        what = "does not exist" if not directory.exists() else "holds no checkpoint" if not damaged else "is damaged"
        raise NoRun(f"{directory} {what}: it must be the work directory of a training run")
    return path


def load_for_inference(directory: str | os.PathLike, say=print) -> Trained:
    """The model, tokenizer and configuration of a work directory's newest checkpoint; needs nothing else.

    On the mesh that is set (``jax.set_mesh``), its parameters spread as they declare; with none, on one device. How
    many devices trained it does not matter.

    Raises:
      ConfigError: no checkpoint there, or one that this version cannot read.
    """
    path = find_checkpoint(directory, say)
    about = read_about(path)
    config = from_dict(ExperimentConfig, about["config"], "the checkpoint's config")
    graphdef, *parts = abstract_model(config)
    loaded = load_part(path, dict(zip(("params", "variables"), parts, strict=True)))
    model = nnx.merge(graphdef, loaded["params"], loaded["variables"])
    tokenizer = tokenizer_from_json(read_tokenizer(path))
    return Trained(model, tokenizer, config, about["step"], about["corpus_hash"], path, about.get("huggingface"))


def take_over(directory: str | os.PathLike, graphdef, state: TrainState, tokenizer: Tokenizer, say=print) -> TrainState:
    """A fresh ``state`` that begins with the parameters and router biases of a trained model: a dense one's, say, for a
    sparse model (``research.models.sparsify``).

    Raises:
      ConfigError: there is no checkpoint, its tokens are others, or it has a variable that the new model lacks.
    """
    trained = load_for_inference(directory, say)
    if trained.tokenizer.to_json() != tokenizer.to_json():
        raise ConfigError(f"train.start_from is {directory}, which must have been trained with this run's tokenizer")
    try:
        model = from_dense(nnx.merge(graphdef, state.params, state.variables), trained.model)
    except ValueError as error:
        raise ConfigError(f"train.start_from is {directory}: {error}") from error
    _, params, variables = nnx.split(model, nnx.Param, ...)
    say(f"starting from {trained.path}, step {trained.step}")
    return dataclasses.replace(state, params=params, variables=variables)


def abstract_model(config: ExperimentConfig):
    """Graph definition, parameters and other variables of the model, shapes and shardings only."""
    shapes = jax.eval_shape(lambda key: LanguageModel(config.model, rngs=nnx.Rngs(params=key)), jax.random.key(0))
    graphdef, params, variables = nnx.split(shapes, nnx.Param, ...)
    return graphdef, placed(params), placed(variables)


def placed(tree):
    """Abstract arrays with a sharding each: the one they carry on a mesh, else the first device."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    mesh = jax.sharding.get_mesh()

    def place(a):
        sharding = one if mesh.empty else jax.NamedSharding(mesh, a.sharding.spec if a.sharding else jax.P())
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = ((item.get("name", str(i)) if isinstance(item, dict) else str(i), item) for i, item in enumerate(value))
    else:
        yield path, value
        return
    for name, item in items:
        yield from _leaves(item, f"{path}.{name}" if path else name)


def _may_change(path: str) -> bool:
    return next(allowed for pattern, allowed in MAY_CHANGE.items() if fnmatchcase(path, pattern))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
