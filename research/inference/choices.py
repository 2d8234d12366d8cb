"""Multiple choice: which of several continuations a model finds likeliest, scored as EleutherAI's harness does."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from research.config import ConfigError
from research.inference.text import score_continuations
from research.training.runs import Trained

KEYS = ("context", "choices", "answer", "delimiter")


@dataclasses.dataclass(frozen=True)
class Question:
    """``context + delimiter + choices[i]`` are the texts; ``choices[answer]`` is right."""

    context: str
    choices: tuple[str, ...]
    answer: int
    delimiter: str = " "


def read_questions(path: str | os.PathLike) -> list[Question]:
    """The questions of a JSONL file: on each line an object with ``context``, ``choices`` (texts) and ``answer`` (the index
    of the right one), and ``delimiter`` where that between context and choice is not one space; other keys are ignored.

    Raises:
      ConfigError: no such file, or a line that is no question; names the line.
    """
    path, questions = Path(path).expanduser(), []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} must be a file of questions, a JSON object a line: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}, is not JSON: {error}") from error
        questions.append(_question(told, f"{path}, line {number},"))
    if not questions:
        raise ConfigError(f"{path} holds no question: it must hold a JSON object a line")
    return questions


def _question(told: Any, where: str) -> Question:
    if not isinstance(told, dict) or not {"context", "choices", "answer"} <= set(told):
        raise ConfigError(f"{where} must be an object with context, choices and answer, got {json.dumps(told)[:80]}")
    choices, answer = told["choices"], told["answer"]
    if not (isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)):
        raise ConfigError(
            f"{where} must hold at least two choices, texts that are not empty, got {json.dumps(choices)[:80]}"
        )
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ConfigError(f"{where} must hold as answer the index of a choice, 0 to {len(choices) - 1}, got {answer!r}")
    if not isinstance(told["context"], str) or not isinstance(told.get("delimiter", " "), str):
        raise ConfigError(f"{where} must hold texts as context and delimiter")
    return Question(told["context"], tuple(choices), answer, told.get("delimiter", " "))


def multiple_choice(
    trained: Trained,
    questions: Sequence[Question],
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """``acc``: how often the right choice has the highest log-probability; ``acc_norm``: per character of the choice, the
    delimiter not counted; ``acc_bytes``: per byte of it. Each with its standard error; the first of equals is chosen."""
    pairs = [(q.context, q.delimiter + choice) for q in questions for choice in q.choices]
    scored = iter(score_continuations(trained, pairs, batch_size=batch_size, progress=progress))
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for question in questions:
        totals = np.array([next(scored).scores.total for _ in question.choices])
        for name, lengths in (
            ("acc", [1] * len(totals)),
            ("acc_norm", [len(choice) for choice in question.choices]),
            ("acc_bytes", [len(choice.encode()) for choice in question.choices]),
        ):
            right[name].append(int(np.argmax(totals / np.array(lengths))) == question.answer)
    result: dict[str, Any] = {"questions": len(questions)}
    for name, values in right.items():
        result[name] = float(np.mean(values))
        result[f"{name}_stderr"] = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return result
