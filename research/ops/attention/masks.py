"""Who sees whom: one rule on the documents and places of two sets of tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.axes import Array, Bool, Int, UInt32
from research.ops.segments import real_and_reset


class Tokens(NamedTuple):
    """The document of each token (0 is padding) and its place there: how many real tokens of it come before."""

    segment_BT: Int[Array, "B T"]
    place_BT: Int[Array, "B T"]


def tokens_of(segment_ids_BT: Int[Array, "B T"] | None, shape: tuple[int, int], first_B=None) -> Tokens:
    """The tokens of packed rows: documents numbered 1, 2, … along the row, places counted over real tokens.

    Args:
      segment_ids_BT: document of each token, 0 for padding; None is one document a row.
      shape: (B, T).
      first_B: place of each row's first real token (a cache's fill); 0 by default.
    """
    if segment_ids_BT is None:
        place_BT = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        segment_BT = jnp.ones(shape, jnp.int32)
    else:
        real_BT, reset_BT = real_and_reset(segment_ids_BT)
        rank_BT = jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - 1
        place_BT = rank_BT - jax.lax.cummax(jnp.where(reset_BT, rank_BT, 0), axis=1)
        segment_BT = jnp.where(real_BT, 1 + jnp.cumsum(reset_BT, axis=1, dtype=jnp.int32), 0)
    return Tokens(segment_BT, place_BT if first_B is None else place_BT + first_B[:, None].astype(jnp.int32))


def visible(query: Tokens, source: Tokens, window: int | None = None, chunk: int | None = None) -> Bool[Array, "B T S"]:
    """Whether query t may see key s: of its own document, no later than itself, real; less than ``window`` places back
    (so a window of 1 is the token itself); and of the same run of ``chunk`` places (Llama 4)."""
    t_BT1, s_B1S = query.place_BT[:, :, None], source.place_BT[:, None, :]
    seen_BTS = (query.segment_BT[:, :, None] == source.segment_BT[:, None, :]) & (source.segment_BT[:, None, :] > 0)
    seen_BTS &= s_B1S <= t_BT1
    if window is not None:
        seen_BTS &= s_B1S > t_BT1 - window
    if chunk is not None:
        seen_BTS &= s_B1S // chunk == t_BT1 // chunk
    return seen_BTS


def chosen(selected: Int[Array, "B T N"] | UInt32[Array, "B T W"], slots: int) -> Bool[Array, "B T S"]:
    """Whether each of ``slots`` keys is among a query's, who names them (a slot past the last is none) or has a bit for each."""
    if selected.dtype == jnp.uint32:
        return _bits(selected, slots)
    B, T, _ = selected.shape
    rows_B11, queries_1T1 = jnp.arange(B)[:, None, None], jnp.arange(T)[None, :, None]
    return jnp.zeros((B, T, slots), bool).at[rows_B11, queries_1T1, selected].set(True, mode="drop")


# Bit j of word g·_LANES + c stands for slot (32·g + j)·_LANES + c: a TPU makes and reads words without moving lanes.
_LANES, _BITS = 128, 32


def words(mask_BTS: Bool[Array, "B T S"]) -> UInt32[Array, "B T W"]:
    """A selection as one bit a key, in W = 128·⌈S / 4096⌉ words a query."""
    B, T, S = mask_BTS.shape
    mask_BTS = jnp.pad(mask_BTS, [(0, 0), (0, 0), (0, -S % (_BITS * _LANES))])
    bits = mask_BTS.reshape(B, T, -1, _BITS, _LANES).astype(jnp.uint32)
    place = jnp.arange(_BITS, dtype=jnp.uint32)[:, None]
    return jnp.sum(bits << place, axis=3, dtype=jnp.uint32).reshape(B, T, -1)


def _bits(words_BTW, slots: int):
    B, T, _ = words_BTW.shape
    place = jnp.arange(_BITS, dtype=jnp.uint32)[:, None]
    bits = (words_BTW.reshape(B, T, -1, 1, _LANES) >> place) & 1
    bits = bits.reshape(B, T, -1)[..., :slots] > 0
    return jnp.pad(bits, [(0, 0), (0, 0), (0, slots - bits.shape[-1])])


def padded(x_BT: Array, block: int) -> Array:
    """[B, T, …] to whole blocks, with zeros."""
    return jnp.pad(x_BT, [(0, 0), (0, -x_BT.shape[1] % block)] + [(0, 0)] * (x_BT.ndim - 2))


def in_blocks(x_BT: Array, block: int) -> Array:
    """[B, T, …] → [N, B, C, …]."""
    return jnp.moveaxis(padded(x_BT, block).reshape(len(x_BT), -1, block, *x_BT.shape[2:]), 1, 0)


def token_blocks(tokens: Tokens, block: int) -> Tokens:
    """Tokens as [N, B, C]; what fills the last block up is padding."""
    return Tokens(*(in_blocks(x, block) for x in tokens))


def visits(query: Tokens, source: Tokens, window: int | None = None, chunk: int | None = None, aligned: bool = False):
    """For each block of queries the blocks of keys it may see, first and in order, and how many they are (``token_blocks``)."""
    queries, keys = query.segment_BT.shape[0], source.segment_BT.shape[0]
    (t_segment, t_place), (s_segment, s_place) = _ranges(query), _ranges(source)
    meet_NNB = (t_segment[0][:, None] <= s_segment[1]) & (s_segment[0] <= t_segment[1][:, None])
    meet_NNB &= s_place[0] <= t_place[1][:, None]
    if window is not None:
        meet_NNB &= s_place[1] > t_place[0][:, None] - window
    if chunk is not None:
        meet_NNB &= s_place[1] // chunk >= t_place[0][:, None] // chunk
    meet_NN = jnp.any(meet_NNB, axis=-1)
    if aligned:
        meet_NN &= jnp.arange(keys) <= jnp.arange(queries)[:, None]
    return jnp.argsort(~meet_NN, axis=1, stable=True), jnp.sum(meet_NN, axis=1, dtype=jnp.int32)


def _ranges(tokens: Tokens):
    """Least and greatest document and place of each block's real tokens; of padding alone, a range that meets none."""
    real_NBC, most = tokens.segment_BT > 0, jnp.iinfo(jnp.int32).max // 2
    return tuple(
        (jnp.min(jnp.where(real_NBC, x, most), axis=-1), jnp.max(jnp.where(real_NBC, x, -most), axis=-1))
        for x in tokens
    )
