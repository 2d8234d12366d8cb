"""New tokens for prompts, all at once (``generate``) or as they come (``stream``)."""

import math
import operator
from collections.abc import Iterable, Iterator
from typing import SupportsFloat, SupportsIndex

import jax
import numpy as np

from research.inference.decoding import BLOCK, decode, prefill
from research.inference.sampling import Sampling, check_whole, make_sampling
from research.models.language_model import LanguageModel
from research.sharding.mesh import BATCH

Ids = Iterable[SupportsIndex]


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
    return _stream(model, rows, max_new_tokens, is_stop_V, np.uint32(seed), sampling, block)


def _stream(
    model: LanguageModel,
    rows: list[list[int]],
    max_new_tokens: int,
    is_stop_V: np.ndarray,
    seed: np.uint32,
    sampling: Sampling,
    block: int,
) -> Iterator[list[list[int]]]:
    if not rows:
        return
    longest, shards = max(map(len, rows)), _batch_shards()
    # Rows of no tokens fill up the mesh.
    B = -(-len(rows) // shards) * shards
    prompts_BT, lengths_B = np.zeros((B, size_class(longest)), np.int32), np.zeros(B, np.int32)
    for b, ids in enumerate(rows):
        prompts_BT[b, : len(ids)], lengths_B[b] = ids, len(ids)
    slots = size_class(longest + max_new_tokens - 1)
    token_B, state = prefill(model, prompts_BT, lengths_B, is_stop_V, seed, sampling, max_length=slots)
    ready_BN, size, drawn = token_B[:, None], 1, 1
    ended = [False] * len(rows)
    while True:
        coming_BN, count = None, min(block, max_new_tokens - drawn)
        if count:
            # The next block starts before this one is looked at; where every row has ended it is over at once.
            coming_BN, state = decode(model, state, is_stop_V, sampling, np.int32(count))
        gained: list[list[int]] = []
        for b, ids in enumerate(np.asarray(ready_BN)[: len(rows), :size].tolist()):
            stops = np.flatnonzero(is_stop_V[ids])
            gained.append([] if ended[b] else ids[: stops[0] + 1] if stops.size else ids)
            ended[b] |= bool(stops.size)
        yield gained
        if coming_BN is None or all(ended):
            return
        ready_BN, size, drawn = coming_BN, count, drawn + count


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
