"""Where the tokens of a cached call go, and whom they may see: caches that hold every token, and rings that hold the last.

A cached call holds one right-padded document a row (ids 1 then 0), with ``cached_B`` tokens before it.
"""

from typing import NamedTuple

import jax.numpy as jnp

from research.axes import Array, Int
from research.ops.attention import Tokens


class Slots(NamedTuple):
    """The new tokens, what they read, and the slot of S that each is written to (S itself: to none)."""

    query: Tokens
    source: Tokens
    write_BT: Int[Array, "B T"]

    @property
    def mask(self) -> dict[str, Array]:
        """As ``attention`` takes it."""
        return {
            "segment_ids_BT": self.query.segment_BT,
            "places_BT": self.query.place_BT,
            "source_segment_ids_BS": self.source.segment_BT,
            "source_places_BS": self.source.place_BT,
        }


def whole(segment_ids_BT: Int[Array, "B T"] | None, cached_B: Int[Array, " B"], length: int, slots: int) -> Slots:
    """A cache of ``slots`` places that holds every token, place p in slot p; it is written first and then read."""
    query = _new(segment_ids_BT, cached_B, length)
    after_B1 = cached_B[:, None] + jnp.sum(query.segment_BT, axis=1, keepdims=True)
    place_BS = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (len(cached_B), slots))
    source = Tokens((place_BS < after_B1).astype(jnp.int32), place_BS)
    return Slots(query, source, jnp.where(query.segment_BT > 0, query.place_BT, slots))


def ring(segment_ids_BT: Int[Array, "B T"] | None, cached_B: Int[Array, " B"], length: int, slots: int) -> Slots:
    """A cache of the last ``slots`` tokens, place p in slot p mod ``slots``.

    The source is [ring as it was | new tokens]: the new ones may push out what the first of them still see.
    """
    query = _new(segment_ids_BT, cached_B, length)
    before_B1 = cached_B[:, None].astype(jnp.int32)
    slot_S = jnp.arange(slots, dtype=jnp.int32)
    # The last place before the call that falls in each slot.
    place_BS = slot_S + slots * ((before_B1 - 1 - slot_S) // slots)
    source = Tokens(
        jnp.concatenate([(place_BS >= 0).astype(jnp.int32), query.segment_BT], axis=1),
        jnp.concatenate([place_BS, query.place_BT], axis=1),
    )
    after_B1 = before_B1 + jnp.sum(query.segment_BT, axis=1, keepdims=True)
    last_BT = (query.segment_BT > 0) & (query.place_BT >= after_B1 - slots)
    return Slots(query, source, jnp.where(last_BT, query.place_BT % slots, slots))


def write(cache_BS: Array, new_BT: Array, slots: Slots) -> Array:
    """The cache [B, S, …] with new tokens [B, T, …] in their slots."""
    rows_B1 = jnp.arange(cache_BS.shape[0])[:, None]
    return cache_BS.at[rows_B1, slots.write_BT].set(new_BT.astype(cache_BS.dtype), mode="drop")


class Written(NamedTuple):
    """New tokens [B, T, …] of a cache and their slots: what a layer returns as its state where writing waits."""

    new_BT: Array
    write_BT: Int[Array, "B T"]

    def onto(self, cache_LBS: Array) -> Array:
        """The caches of L layers with their tokens; here every leaf has that leading axis."""
        rows_B1 = jnp.arange(cache_LBS.shape[1])[:, None]
        return cache_LBS.at[:, rows_B1, self.write_BT[0]].set(self.new_BT, mode="drop")


def overlaid(cache_BS: Array, new_B1: Array, slots: Slots) -> tuple[Array, Written]:
    """The cache with one new token a row in place, as a value to be computed where it is read, and what is to be written."""
    new_B1 = new_B1.astype(cache_BS.dtype)
    here_BS = jnp.arange(cache_BS.shape[1]) == slots.write_BT
    here_BS = here_BS.reshape(*here_BS.shape, *[1] * (cache_BS.ndim - 2))
    return jnp.where(here_BS, new_B1, cache_BS), Written(new_B1, slots.write_BT)


def _new(segment_ids_BT, cached_B, length) -> Tokens:
    shape = (len(cached_B), length)
    real_BT = (jnp.ones(shape, jnp.int32) if segment_ids_BT is None else segment_ids_BT) > 0
    rank_BT = jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - 1
    return Tokens(real_BT.astype(jnp.int32), cached_B[:, None].astype(jnp.int32) + rank_BT)
