"""Log-probabilities of given text: what evaluation, multiple choice and the evaluation harness are made of."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from research.inference.decoding import spread, top_logprobs
from research.inference.generation import Ids, check_ids, right_padded
from research.inference.sampling import check_whole
from research.models.language_model import LanguageModel
from research.ops.losses import token_logprobs
from research.sharding.mesh import gathered, per_shard

# Logits that are held at once, whatever the length of rows and the size of the vocabulary (64 MiB in float32).
LOGITS_AT_ONCE = 2**24


class Scores(NamedTuple):
    """What a model makes of the N tokens of one row that are scored, in nats.

    Attributes:
      logprobs_N: of each token, given all before it.
      greedy_N: whether it is the likeliest (the lowest id among equals).
      top_ids_NK, top_logprobs_NK: the likeliest tokens in its place, likeliest first.
    """

    logprobs_N: np.ndarray
    greedy_N: np.ndarray
    top_ids_NK: np.ndarray
    top_logprobs_NK: np.ndarray

    @property
    def total(self) -> float:
        """Log-probability of all the tokens together."""
        return math.fsum(self.logprobs_N)

    @property
    def perplexity(self) -> float:
        """Of a token; NaN where none is scored."""
        return math.exp(-self.total / len(self.logprobs_N)) if len(self.logprobs_N) else math.nan


def score(
    model: LanguageModel,
    rows: Sequence[Ids],
    given: SupportsIndex | Sequence[SupportsIndex] = 1,
    *,
    top: SupportsIndex = 0,
    batch_size: SupportsIndex = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Scores]:
    """Log-probabilities of the tokens of each row after the first ``given``, read in the parallel form.

    Rows of like length are read together; compiled programs are kept, one for each size class of lengths.

    Args:
      rows: token ids.
      given: tokens at the beginning of each row that are context and not scored, at least one: a number, or one for each row.
      top: how many alternatives to tell in each place.
      batch_size: rows that are read together.
      progress: told of rows done and in all.

    Returns:
      For each row the scores of ``len(row) - given`` tokens.

    Raises:
      ValueError: an argument out of its range; names it, what it was and what it must be.
    """
    vocab_size = model.config.vocab_size
    ids = [check_ids(row, f"rows[{i}]", vocab_size) for i, row in enumerate(rows)]
    givens: list[Any] = list(given) if isinstance(given, Sequence) else [given] * len(ids)
    if len(givens) != len(ids):
        raise ValueError(f"given must be one number, or one for each of {len(ids)} rows, got {len(givens)}")
    for i, (row, first) in enumerate(zip(ids, givens, strict=True)):
        givens[i] = check_whole(f"given[{i}]", first, 1, max(len(row), 1))
        if not row:
            raise ValueError(f"rows[{i}] is empty: it must hold at least the token that is given")
    top = check_whole("top", top, 0, vocab_size)
    batch_size = check_whole("batch_size", batch_size, 1)
    scores: dict[int, Scores] = {}
    # The longest first: what does not fit into memory fails at once.
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        tokens_BT, lengths_B = right_padded([ids[i] for i in batch], min(batch_size, len(order)))
        found = jax.device_get(read(model, tokens_BT[:, :-1], tokens_BT[:, 1:], lengths_B - 1, top=top))
        for b, i in enumerate(batch):
            scores[i] = Scores(*(np.asarray(x)[b, givens[i] - 1 : len(ids[i]) - 1] for x in found))
        progress(len(scores), len(ids))
    return [scores[i] for i in range(len(ids))]


def pieces(row: Sequence[int], longest: SupportsIndex, overlap: SupportsIndex = 0) -> Iterator[tuple[list[int], int]]:
    """A row in pieces of which the model reads at most ``longest`` tokens each: pairs of ids and how many of them are given.

    Every token but the row's first is scored once. Each piece begins with ``overlap`` tokens, and one more, of the one before.

    Raises:
      ValueError: ``longest`` less than 1, or ``overlap`` not less than it.
    """
    row, longest = list(row), check_whole("longest", longest, 1)
    overlap = check_whole("overlap", overlap, 0, longest - 1)
    start, scored = 0, 1
    while scored < len(row):
        end = min(start + longest + 1, len(row))
        yield row[start:end], scored - start
        start, scored = end - 1 - overlap, end


@functools.partial(jax.jit, static_argnames="top")
def read(model: LanguageModel, inputs_BT, targets_BT, lengths_B, *, top: int):
    """What the model makes of a target at each of the first ``lengths_B`` places of a row, having read the inputs up to it:
    the arrays of ``Scores`` [B, T, …]. What lies past a row's length means nothing."""
    inputs_BT, targets_BT, lengths_B = spread((inputs_BT, targets_BT, lengths_B))
    B, T = inputs_BT.shape
    real_BT = (jnp.arange(T) < lengths_B[:, None]).astype(jnp.int32)
    x_BTD, _, _ = model.hidden(inputs_BT, real_BT)
    # Logits of one piece of the row at a time: the vocabulary is large.
    width = max(1, min(T, LOGITS_AT_ONCE // (B * model.config.vocab_size)))
    count = -(-T // width)

    def cut(x_BT):
        x_BT = jnp.pad(x_BT, ((0, 0), (0, count * width - T), *[(0, 0)] * (x_BT.ndim - 2)))
        return jnp.moveaxis(x_BT.reshape(B, count, width, *x_BT.shape[2:]), 1, 0)

    def look(batched, _):
        logits_BNV, targets_BN = batched
        logits_V = logits_BNV.reshape(-1, logits_BNV.shape[-1])
        greedy_BN = jnp.argmax(logits_BNV, axis=-1) == targets_BN
        likeliest = (x.reshape(*targets_BN.shape, top) for x in top_logprobs(logits_V, top))
        return token_logprobs(logits_BNV, targets_BN), greedy_BN, *likeliest

    def piece(parts):
        x_BND, targets_BN = parts
        return per_shard(look, (model.logits(x_BND), targets_BN))

    parts: Any = jax.lax.map(piece, (cut(x_BTD), cut(targets_BT)))
    whole = (jnp.moveaxis(x, 0, 1) for x in parts)
    return tuple(gathered(x.reshape(B, count * width, *x.shape[3:])) for x in whole)
