"""Who sees whom: one rule on the documents and places of two sets of tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.axes import Array, Bool, Int
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
