"""New tokens for prompts, all at once (``generate``) or as they come (``stream``)."""

import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

import jax
import numpy as np

from research.inference.decoding import BLOCK, Drawn, decode, prefill
from research.inference.sampling import Sampling, check_whole, make_sampling
from research.models.language_model import LanguageModel
from research.sharding.mesh import BATCH

Ids = Iterable[SupportsIndex]


class Continuation(NamedTuple):
    """New ids, and for each its natural log-probability and the likeliest ids in its place with theirs.

    They are the model's own, of the distribution before temperature and filters (at temperature 0 too).
    """

    ids: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]

    def extend(self, more: "Continuation") -> None:
        self.ids.extend(more.ids)
        self.logprobs.extend(more.logprobs)
        self.top.extend(more.top)


def generate(
    model: LanguageModel,
    prompts: Iterable[Ids],
    max_new_tokens: SupportsIndex = 32,
    temperature: SupportsFloat = 0.0,
    top_k: SupportsIndex | None = None,
    top_p: SupportsFloat | None = None,
    min_p: SupportsFloat | None = None,
    stop: Ids = (),
    seed: SupportsIndex = 0,
) -> list[list[int]]:
    """Continues prompts, all of them together, whatever their lengths.

    The prompts are read in the parallel form and continued in the recurrent one. Compiled programs are kept: they are
    made anew only for another number of prompts, another size class of lengths (see ``size_class``), or when a filter is
    turned on or off.

    Args:
      prompts: token ids, at least one each.
      max_new_tokens: for each prompt.
      temperature: 0 takes the most likely token (the lowest id among equals), and filters change nothing then.
      top_k, top_p, min_p: filters in this order, see ``research.inference.sampling.Sampling``; None is off.
      stop: a row ends with the first of these ids that it draws.
      seed: what row b draws for its nth token depends on (seed, b, n) and the row's own tokens, not on other rows.

    Returns:
      For each prompt its new ids alone, a stop id included.

    Raises:
      ValueError: an argument out of its range; names it, what it was and what it must be.
    """
    prompts = list(prompts)
    new: list[list[int]] = [[] for _ in prompts]
    for block in stream(model, prompts, max_new_tokens, temperature, top_k, top_p, min_p, stop, seed, block=BLOCK):
        for row, ids in zip(new, block, strict=True):
            row += ids
    return new


def stream(
    model: LanguageModel,
    prompts: Iterable[Ids],
    max_new_tokens: SupportsIndex = 32,
    temperature: SupportsFloat = 0.0,
    top_k: SupportsIndex | None = None,
    top_p: SupportsFloat | None = None,
    min_p: SupportsFloat | None = None,
    stop: Ids = (),
    seed: SupportsIndex = 0,
    *,
    block: SupportsIndex = 8,
) -> Iterator[list[list[int]]]:
    """``generate`` as it goes: yields, time after time, the ids that each prompt gained (none where it has ended).

    The first yield is the first token; each later one up to ``block`` more. Arguments are checked before anything is
    yielded. While the caller looks at a block the next one is already under way.

    Raises:
      ValueError: as ``generate``; and ``block`` less than 1 or more than ``decoding.BLOCK``.
    """
    blocks = _start(
        model, prompts, max_new_tokens, temperature, top_k, top_p, min_p, stop, seed, block=block, logprobs=None
    )
    return ([row.ids for row in rows] for rows in blocks)


def generate_with_logprobs(
    model: LanguageModel,
    prompts: Iterable[Ids],
    max_new_tokens: SupportsIndex = 32,
    *,
    top: SupportsIndex = 0,
    **how: Any,
) -> list[Continuation]:
    """``generate`` with the log-probability of every new token, and of the ``top`` likeliest ones in its place.

    Args:
      how: as ``generate``: temperature, top_k, top_p, min_p, stop, seed.

    Raises:
      ValueError: as ``generate``; and ``top`` less than 0 or more than the vocabulary.
    """
    prompts = list(prompts)
    new = [Continuation([], [], []) for _ in prompts]
    for block in stream_with_logprobs(model, prompts, max_new_tokens, top=top, block=BLOCK, **how):
        for row, gained in zip(new, block, strict=True):
            row.extend(gained)
    return new


def stream_with_logprobs(
    model: LanguageModel,
    prompts: Iterable[Ids],
    max_new_tokens: SupportsIndex = 32,
    *,
    top: SupportsIndex = 0,
    block: SupportsIndex = 8,
    **how: Any,
) -> Iterator[list[Continuation]]:
    """``generate_with_logprobs`` as it goes, see ``stream``."""
    top = check_whole("top", top, 0, model.config.vocab_size)
    return _start(model, prompts, max_new_tokens, **how, block=block, logprobs=top)


def _start(
    model: LanguageModel,
    prompts: Iterable[Ids],
    max_new_tokens: SupportsIndex,
    temperature: SupportsFloat = 0.0,
    top_k: SupportsIndex | None = None,
    top_p: SupportsFloat | None = None,
    min_p: SupportsFloat | None = None,
    stop: Ids = (),
    seed: SupportsIndex = 0,
    *,
    block: SupportsIndex,
    logprobs: int | None,
) -> Iterator[list[Continuation]]:
    """Checks the arguments; what it returns yields blocks, without log-probabilities where ``logprobs`` is None."""
    vocab_size = model.config.vocab_size
    rows = [check_ids(ids, f"prompts[{i}]", vocab_size) for i, ids in enumerate(prompts)]
    for i, ids in enumerate(rows):
        if not ids:
            raise ValueError(f"prompts[{i}] is empty: it must hold at least one token id (that of a start token, say)")
    max_new_tokens = check_whole("max_new_tokens", max_new_tokens, 1)
    block = check_whole("block", block, 1, BLOCK)
    seed = check_whole("seed", seed, 0, 2**32 - 1)
    is_stop_V = np.zeros(vocab_size, bool)
    is_stop_V[check_ids(stop, "stop", vocab_size)] = True
    sampling = make_sampling(temperature, top_k, top_p, min_p)
    return _blocks(model, rows, max_new_tokens, is_stop_V, np.uint32(seed), sampling, block, logprobs)


def _blocks(
    model: LanguageModel,
    rows: list[list[int]],
    max_new_tokens: int,
    is_stop_V: np.ndarray,
    seed: np.uint32,
    sampling: Sampling,
    block: int,
    top: int | None,
) -> Iterator[list[Continuation]]:
    if not rows:
        return
    longest = max(map(len, rows))
    prompts_BT, lengths_B = right_padded(rows, len(rows))
    slots = size_class(longest + max_new_tokens - 1)
    ready, state = prefill(model, prompts_BT, lengths_B, is_stop_V, seed, sampling, max_length=slots, top=top)
    size, drawn = 1, 1
    ended = [False] * len(rows)
    while True:
        coming, count = None, min(block, max_new_tokens - drawn)
        if count:
            # The next block starts before this one is looked at; where every row has ended it is over at once.
            coming, state = decode(model, state, is_stop_V, sampling, np.int32(count), top=top)
        gained = []
        for b, row in enumerate(_told(ready, len(rows), size)):
            stops = np.flatnonzero(is_stop_V[row.ids])
            end = 0 if ended[b] else stops[0] + 1 if stops.size else size
            gained.append(Continuation(row.ids[:end], row.logprobs[:end], row.top[:end]))
            ended[b] |= bool(stops.size)
        yield gained
        if coming is None or all(ended):
            return
        ready, size, drawn = coming, count, drawn + count


def _told(drawn: Drawn, rows: int, size: int) -> Iterator[Continuation]:
    """The first ``size`` tokens of the first ``rows`` rows, on the host."""
    ids, *told = (np.asarray(x)[:rows, :size].tolist() for x in jax.device_get(drawn) if x is not None)
    for b in range(rows):
        logprobs, top = [], []
        if told:
            logprobs, top_ids, top_logprobs = (values[b] for values in told)
            top = [list(zip(*pair, strict=True)) for pair in zip(top_ids, top_logprobs, strict=True)]
        yield Continuation(ids[b], logprobs, top)


def right_padded(rows: list[list[int]], least: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one array [B, T] of a size class, and their lengths [B]; rows of no tokens, at the end, make them ``least``
    at least and fill up the mesh."""
    shards = _batch_shards()
    B = -(-max(len(rows), least) // shards) * shards
    tokens_BT, lengths_B = np.zeros((B, size_class(max(map(len, rows)))), np.int32), np.zeros(B, np.int32)
    for b, ids in enumerate(rows):
        tokens_BT[b, : len(ids)], lengths_B[b] = ids, len(ids)
    return tokens_BT, lengths_B


def size_class(length: int) -> int:
    """``length`` rounded up to one of few sizes, at most a quarter (or 31) more: each size is a program of its own."""
    step = max(32, 2 ** (math.ceil(math.log2(length)) - 3)) if length > 1 else 32
    return -(-length // step) * step


def check_ids(ids: Ids, name: str, vocab_size: int) -> list[int]:
    """``ids`` as a list of int; raises ValueError naming the first that is no id of the vocabulary."""
    try:
        checked = [operator.index(i) for i in ids]
    except TypeError:
        raise ValueError(f"{name} must be a sequence of token ids (whole numbers), got {ids!r}") from None
    for i in checked:
        if not 0 <= i < vocab_size:
            raise ValueError(f"{name} must hold token ids from 0 to {vocab_size - 1}, got {i}")
    return checked


def _batch_shards() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH)
