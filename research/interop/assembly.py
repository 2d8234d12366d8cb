"""A model's arrays, put together piece by piece where they will live."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from research.models.hub import Tensor, View
from research.models.hub.tensors import Box, variables_of
from research.models.language_model import LanguageModel
from research.training.runs import placed

# XLA takes host memory over without a copy where it begins at a multiple of this.
ALIGNMENT = 64


class Assembly:
    """The arrays of a model that is being loaded. Host memory holds each part of an array once, however many devices share it;
    on a CPU that memory becomes the array.

    ``write`` fills the views of all ``tensors``, then ``finish`` makes the model. What no tensor holds (a router's selection
    bias, decays that depend on the layer alone) starts as in a fresh model.
    """

    def __init__(self, model: LanguageModel, tensors: Iterable[Tensor]):
        """``model`` holds shapes in place of arrays."""
        self._model, self._place = model, placed(model)
        covered: dict[str, int] = {}
        for tensor in tensors:
            for view in tensor.views:
                covered[view.leaf] = covered.get(view.leaf, 0) + int(np.prod([s.stop - s.start for s in view.box]))
        self._targets = {}
        for (name, variable), place in zip(variables_of(model), jax.tree.leaves(self._place), strict=True):
            if name in covered and covered[name] != place.size:
                raise AssertionError(
                    f"the family's tensors hold {covered[name]} of the {place.size} elements of {name}"
                )
            if name in covered:
                self._targets[name] = _Target(place)
            elif isinstance(variable, nnx.Param):
                raise AssertionError(f"no tensor of the family holds {name}")

    def write(self, view: View, values: np.ndarray) -> None:
        self._targets[view.leaf].write(view, values)

    def finish(self) -> LanguageModel:
        names = [name for name, _ in variables_of(self._model)]
        rest = [i for i, name in enumerate(names) if name not in self._targets]
        fresh: dict[int, Any] = {}
        if rest:
            config = self._model.config

            def constants():
                leaves = jax.tree.leaves(LanguageModel(config, rngs=nnx.Rngs(params=0)))
                return [leaves[i] for i in rest]

            fresh = dict(zip(rest, jax.jit(constants)(), strict=True))
        leaves = [fresh[i] if i in fresh else self._targets.pop(name).finish() for i, name in enumerate(names)]
        return jax.tree.unflatten(jax.tree.structure(self._model), leaves)


class _Target:
    """One array: a buffer for each distinct part that a device of this process holds."""

    def __init__(self, place: jax.ShapeDtypeStruct):
        self._place = place
        indices = place.sharding.addressable_devices_indices_map(place.shape)  # type: ignore[union-attr]
        self._devices = {device: _box(index, place.shape) for device, index in indices.items()}
        boxes = {_key(box): box for box in self._devices.values()}
        self._buffers = {key: (box, _aligned(_sizes(box), place.dtype)) for key, box in boxes.items()}

    def write(self, view: View, values: np.ndarray) -> None:
        whole = None
        for box, buffer in self._buffers.values():
            inside = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, view.box, strict=True)]
            if any(part.start >= part.stop for part in inside):
                continue
            here = tuple(slice(p.start - b.start, p.stop - b.start) for p, b in zip(inside, box, strict=True))
            if _sizes(tuple(inside)) == _sizes(view.box):
                view.of(buffer[here])[...] = values
                continue
            if whole is None:
                whole = np.empty(_sizes(view.box), values.dtype)
                view.of(whole)[...] = values
            there = tuple(slice(p.start - v.start, p.stop - v.start) for p, v in zip(inside, view.box, strict=True))
            buffer[here] = whole[there]

    def finish(self) -> jax.Array:
        parts = [
            jax.device_put(self._buffers[_key(box)][1], device, may_alias=True) for device, box in self._devices.items()
        ]
        self._buffers.clear()
        return jax.make_array_from_single_device_arrays(self._place.shape, self._place.sharding, parts)


def _box(index, shape: tuple[int, ...]) -> Box:
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def _key(box: Box) -> tuple[tuple[int, int], ...]:
    return tuple((part.start, part.stop) for part in box)


def _sizes(box: Box) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in box)


def _aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Uninitialised memory that XLA can take over."""
    dtype = np.dtype(dtype)
    room = np.empty(int(np.prod(shape)) * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)
