"""Where a layer stands in its model, for the few mechanisms whose constants depend on it."""

from typing import NamedTuple

from research.axes import Array


class Place(NamedTuple):
    """Layer number ``layer``, from 0, of the model's ``layers``. What counts is the branches that mix tokens: one published
    layer has one of them. ``layer`` may be traced, since the repeats of a stage are built at once."""

    layer: Array | int
    layers: int


class Placed:
    """Base of the configurations whose ``build`` also takes ``place``."""
