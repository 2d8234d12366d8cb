"""How well a model does the synthetic tasks of ``research.data.synthetic``, whose vocabulary must be within its own."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from research.config import ConfigError
from research.data import synthetic
from research.inference.generation import size_class
from research.inference.scoring import read
from research.models.language_model import LanguageModel


class Task(NamedTuple):
    """A batch from a seed and options; of these options the vocabulary and the accuracy of guessing."""

    batch: Callable[..., synthetic.Batch]
    vocabulary: Callable[[Mapping[str, Any]], int]
    chance: Callable[[Mapping[str, Any]], float]
    usual: Mapping[str, Any]


TASKS = {
    "associative_recall": Task(
        synthetic.associative_recall,
        lambda o: 1 + o["keys"] + o["values"],
        lambda o: 1 / o["values"],
        {"length": 64, "pairs": 8},
    ),
    "selective_copying": Task(
        synthetic.selective_copying, lambda o: 2 + o["symbols"], lambda o: 1 / o["symbols"], {"length": 256}
    ),
    "state_tracking": Task(
        synthetic.state_tracking,
        lambda o: len(synthetic.group_table(o["group"])),
        lambda o: 1 / len(synthetic.group_table(o["group"])),
        {"length": 64},
    ),
    "needle_retrieval": Task(
        synthetic.needle_retrieval,
        lambda o: 2 + o["keys"] + o["symbols"],
        lambda o: 1 / o["symbols"],
        {"length": 256},
    ),
}


def task_options(name: str, words: Mapping[str, str]) -> dict[str, Any]:
    """Every option of a task, those in ``words`` as they say.

    Raises:
      ConfigError: no such task or option, or a value that is none of its kind.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}: there are {', '.join(TASKS)}")
    signature = inspect.signature(TASKS[name].batch).parameters
    known = {key: p for key, p in signature.items() if key not in ("seed", "batch")}
    options = {key: p.default for key, p in known.items() if p.default is not p.empty} | dict(TASKS[name].usual)
    for key, text in words.items():
        if key not in known:
            raise ConfigError(f"{name} has no option {key!r}: it has {', '.join(known)}")
        kind = str if known[key].annotation is str else float if "float" in str(known[key].annotation) else int
        try:
            options[key] = kind(text)
        except ValueError:
            raise ConfigError(
                f"{name}: {key} must be {'a number' if kind is float else 'a whole number'}, got {text!r}"
            ) from None
    return options


def measure_task(
    model: LanguageModel, name: str, options: Mapping[str, Any], *, rows: int = 256, batch_size: int = 32, seed: int = 0
) -> dict[str, Any]:
    """Accuracy on ``rows`` fresh rows over the targets that count, whole rows right, and mean nats per target.

    Raises:
      ConfigError: the task's vocabulary is larger than the model's, or options that don't go together.
    """
    task = TASKS[name]
    try:
        vocabulary = task.vocabulary(options)
        drawn = task.batch(seed, batch=rows, **options)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    if vocabulary > model.config.vocab_size:
        raise ConfigError(
            f"{name} has {vocabulary} ids, which must be at most the {model.config.vocab_size} that the model knows"
        )
    inputs_BT, targets_BT, mask_BT = (drawn[key] for key in ("inputs_BT", "targets_BT", "loss_mask_BT"))
    T = inputs_BT.shape[1]
    right_BT, nats_BT = np.zeros(mask_BT.shape, bool), np.zeros(mask_BT.shape)
    width = size_class(T) - T
    for start in range(0, rows, batch_size):
        part = slice(start, start + batch_size)
        count = len(inputs_BT[part])
        # Rows of no tokens make the last batch as large as the others.
        padding = ((0, batch_size - count), (0, width))
        padded = (np.pad(x[part], padding) for x in (inputs_BT, targets_BT))
        lengths_B = np.where(np.arange(batch_size) < count, T, 0).astype(np.int32)
        logprobs_BT, right, _, _ = jax.device_get(read(model, *padded, lengths_B, top=0))
        right_BT[part], nats_BT[part] = right[:count, :T], -logprobs_BT[:count, :T]
    return {
        "task": name,
        "options": dict(options),
        "rows": rows,
        "accuracy": float(right_BT[mask_BT].mean()),
        "rows_right": float(np.mean(np.all(right_BT | ~mask_BT, axis=1))),
        "nats": float(nats_BT[mask_BT].mean()),
        "chance": task.chance(options),
        "chance_nats": -math.log(task.chance(options)),
    }
