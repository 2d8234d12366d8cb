"""What every layer of a call may read beside its own input."""

import dataclasses
from typing import Any, NamedTuple

import jax

from research.axes import Array, Int
from research.ops.segments import select


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Facts of one call.

    Attributes:
      positions_BT: place of each token in its document, from 0.
      segment_ids_BT: document of each token; 0 is padding; None is one document a row.
      token_ids_BT: the tokens themselves (hash routing reads them).
      cached_B: tokens each row's cache already holds; None without a cache.
      key: for layers that draw at random; None where the call is deterministic.
      deterministic: no layer may draw at random or use training-only behaviour.
      remat: units, those of layers that run layers of their own too, are recomputed in the backward pass, but for the results of
        the ops named here (``research.ops.kept``); None recomputes nothing.
      deferred: caches that can be (``caches.Written``) are not written, what is to be written is returned as their state.
      selected_BTN: the keys that the last layer to hand its selection on chose (``research.ops.sparse_attention``).
    """

    positions_BT: Int[Array, "B T"]
    segment_ids_BT: Int[Array, "B T"] | None = None
    token_ids_BT: Int[Array, "B T"] | None = None
    cached_B: Int[Array, " B"] | None = None
    key: Array | None = None
    deterministic: bool = dataclasses.field(default=True, metadata={"static": True})
    remat: tuple[str, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    deferred: bool = dataclasses.field(default=False, metadata={"static": True})
    selected_BTN: Int[Array, "B T N"] | None = None


class Nested(NamedTuple):
    """What a mixer that is a model of its own returns as its auxiliary: its own, and those of its layers (by stage, stacked
    over repeats)."""

    own: Any
    stages: tuple[Any, ...]


class HandedOn(NamedTuple):
    """What a layer that hands its selection on returns as its auxiliary: the auxiliary itself, and the selection, which
    rides in the scan's carry beside x to ``Context.selected_BTN`` of later layers."""

    aux: Any
    selected_BTN: Int[Array, "B T N"] | None


def without_padding(x_BTD, context: Context | None):
    """Zeros for padding, so that nothing that stands there (NaN included) meets a weight, forwards or backwards."""
    if context is None or context.segment_ids_BT is None:
        return x_BTD
    return select(context.segment_ids_BT > 0, x_BTD)
