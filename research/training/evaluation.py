"""Held-out bits per byte: the length of a code for the held-out documents, by the model and by compressors."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from research.data.pipeline import Corpus, build_held_out
from research.data.tokenization import Tokenizer


class HeldOut(NamedTuple):
    """What the model makes of held-out text.

    ``bits_per_byte`` is ``nats / ln 2 / bytes``, ends of documents included; ``whole`` says that every held-out byte
    was scored exactly once.
    """

    bits_per_byte: float
    nats: float
    tokens: int
    bytes: int
    whole: bool


def evaluate(
    eval_step: Callable,
    params,
    variables,
    corpus: Corpus,
    put: Callable[[dict], dict],
    *,
    batch_size: int | None = None,
    overlap: int = 0,
    batches: int = 0,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOut | None:
    """Scores the held-out documents; None where ``stop`` asked to leave off.

    Args:
      eval_step: of ``make_eval_step``.
      put: a batch of this process's arrays onto the devices.
      overlap: positions of context repeated before each piece of a long document (``build_held_out``).
      batches: only so many of the first batches; 0 is all.
      progress: told of batches done and in all.
    """
    dataset = build_held_out(corpus, batch_size=batch_size, overlap=overlap)
    total = min(batches, len(dataset)) if batches else len(dataset)
    part = total < len(dataset)
    bytes_of_id = byte_lengths(corpus.tokenizer) if part else np.zeros(0)
    nats, tokens, scored = 0.0, 0, 0
    pending = None
    for done in range(total + 1):
        if stop():
            return None
        sums = None
        if done < total:
            batch: dict[str, np.ndarray] = dataset[done]  # pyright: ignore[reportAssignmentType]
            if part:
                scored += int(bytes_of_id[batch["targets_BT"]][batch["loss_mask_BT"]].sum())
            sums = eval_step(params, variables, put(batch))
        if pending is not None:
            # One batch late, so that the devices have the next one; summed in double precision.
            batch_nats, batch_tokens = jax.device_get(pending)
            nats, tokens = nats + float(batch_nats), tokens + round(float(batch_tokens))
            progress(done, total)
        pending = sums
    size = scored if part else corpus.held_out_bytes
    return HeldOut(nats / math.log(2) / max(size, 1), nats, tokens, size, not part)


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes each id stands for, [vocab_size]; 0 for special tokens."""
    return np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)], np.int64)
