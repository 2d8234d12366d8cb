"""Published tensors as views of a model's own arrays: one description that loads and saves.

A family says of each tensor of its checkpoint which parts of which arrays it is, and how they are turned. To save, the parts
are read; to load, the tensor is written through them. Only reshapes that split axes and transpositions are allowed on this
side, which numpy does without a copy, so that nothing has to be inverted by hand.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from research.models.config import HNetConfig, Residual
from research.models.language_model import LanguageModel
from research.models.stages import Stage, factorise

Box = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """A part of one of the model's arrays, turned the way the checkpoint stores it.

    Attributes:
      leaf: name of the array.
      box: the part of each of its axes.
      dropped: axes of it that were indexed away.
      steps: what turns the rest: ('split', axis, sizes) or ('order', axes).
    """

    leaf: str
    box: Box
    dropped: tuple[int, ...] = ()
    steps: tuple[tuple, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = [part.stop - part.start for part in self.box]
        return self.of(np.broadcast_to(np.int8(0), sizes)).shape

    def within(self, other: "View") -> bool:
        """Whether it is part of ``other``, however they are turned."""
        if self.leaf != other.leaf:
            return False
        return all(b.start <= a.start and a.stop <= b.stop for a, b in zip(self.box, other.box, strict=True))

    @property
    def T(self) -> "View":
        """The last two axes exchanged."""
        axes = tuple(range(len(self.shape)))
        return self.order(*axes) if len(axes) < 2 else self.order(*axes[:-2], axes[-1], axes[-2])

    def order(self, *axes: int) -> "View":
        """The axes in another order."""
        return dataclasses.replace(self, steps=(*self.steps, ("order", axes)))

    def split(self, axis: int, *sizes: int) -> "View":
        """One axis made several, the first of them the slowest; one size may be -1."""
        axis %= len(self.shape)
        return dataclasses.replace(self, steps=(*self.steps, ("split", axis, sizes)))

    def cut(self, axis: int, *sizes: int) -> list["View"]:
        """Neighbouring parts of one axis, together all of it."""
        axis %= len(self.shape)
        if sum(sizes) != self.shape[axis]:
            raise ValueError(f"{self.leaf}: the parts {sizes} of axis {axis} must add up to {self.shape[axis]}")
        ends = np.cumsum(sizes).tolist()
        before = (slice(None),) * axis
        return [self[(*before, slice(end - size, end))] for end, size in zip(ends, sizes, strict=True)]

    def __getitem__(self, index: Any) -> "View":
        """A part of it; ``...`` and steps other than 1 are not known."""
        if self.steps:
            raise ValueError(f"{self.leaf} must be cut before it is turned")
        kept = [axis for axis in range(len(self.box)) if axis not in self.dropped]
        box, dropped = list(self.box), list(self.dropped)
        for axis, part in zip(kept, index if isinstance(index, tuple) else (index,), strict=False):
            start, size = box[axis].start, box[axis].stop - box[axis].start
            if isinstance(part, slice):
                low, high, _ = part.indices(size)
                box[axis] = slice(start + low, start + high)
            else:
                box[axis] = slice(start + part, start + part + 1)
                dropped.append(axis)
        return dataclasses.replace(self, box=tuple(box), dropped=tuple(dropped))

    def of(self, boxed: np.ndarray) -> np.ndarray:
        """The view of ``boxed``, the box of its array: the same memory."""
        turned = boxed[tuple(0 if axis in self.dropped else slice(None) for axis in range(boxed.ndim))]
        for kind, *rest in self.steps:
            if kind == "order":
                turned = turned.transpose(rest[0])
            else:
                axis, sizes = rest
                turned = turned.reshape(*turned.shape[:axis], *sizes, *turned.shape[axis + 1 :])
        return turned


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: ``views`` side by side along ``axis``, then reshaped to ``shape``.

    Attributes:
      shape: None leaves it as it is; an axis may be -1.
    """

    name: str
    views: tuple[View, ...]
    axis: int = 0
    merged: tuple[int, ...] | None = None

    @property
    def parts_shape(self) -> tuple[int, ...]:
        """Before it is reshaped."""
        shape = list(self.views[0].shape)
        shape[self.axis] = sum(view.shape[self.axis] for view in self.views)
        return tuple(shape)

    @property
    def shape(self) -> tuple[int, ...]:
        if self.merged is None:
            return self.parts_shape
        known = math.prod(size for size in self.merged if size != -1)
        return tuple(math.prod(self.parts_shape) // known if size == -1 else size for size in self.merged)

    def read(self, box_of: Callable[[View], np.ndarray]) -> np.ndarray:
        """The tensor, from the boxes of its views."""
        parts = [view.of(box_of(view)) for view in self.views]
        return np.ascontiguousarray(np.concatenate(parts, self.axis) if len(parts) > 1 else parts[0]).reshape(
            self.shape
        )

    def parts(self, tensor: np.ndarray) -> Iterator[tuple[View, np.ndarray]]:
        """What each view must hold for the tensor to be ``tensor``."""
        ends = np.cumsum([view.shape[self.axis] for view in self.views])[:-1]
        yield from zip(self.views, np.split(tensor.reshape(self.parts_shape), ends, self.axis), strict=True)


def joined(name: str, *views: View, axis: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
    """A tensor of a checkpoint: one view of the model, or several side by side along ``axis``, reshaped to ``shape``."""
    return Tensor(name, views, axis, shape)


class PartViews:
    """The arrays of a part of a model by their paths within it: ``head["norm.scale_D"]``."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], prefix: str = "", repeats: tuple[int, ...] = ()):
        """``repeats``: which of them it is in the leading axes of its arrays, outer stages first."""
        self._shapes, self._prefix, self._repeats = shapes, prefix, repeats

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._shapes

    def __getitem__(self, name: str) -> View:
        leaf = self._prefix + name
        if leaf not in self._shapes:
            raise KeyError(f"the model has no {leaf}")
        view = View(leaf, tuple(slice(0, size) for size in self._shapes[leaf]))
        return view[self._repeats]


class BranchViews(PartViews):
    """The arrays of one residual branch: ``branch["pre_norm.scale_D"]``, ``branch["mixer.w_in_DN"]``."""

    def __init__(self, shapes, prefix: str, repeats: tuple[int, ...], residual: Residual):
        super().__init__(shapes, prefix, repeats)
        self.residual = residual

    @property
    def over_chunks(self) -> list["BranchViews"]:
        """The branches that an H-Net runs over its chunks."""
        plan = factorise(self.mixer(HNetConfig).layers)
        return _branches(self._shapes, f"{self._prefix}mixer.", plan, self._repeats)

    def mixer[Config](self, kind: type[Config]) -> Config:
        """The configuration of its mixer, which must be of the kind."""
        if not isinstance(self.residual.mixer, kind):
            raise TypeError(f"{self._prefix}mixer is {type(self.residual.mixer).__name__}, not {kind.__name__}")
        return self.residual.mixer


class HeadViews(PartViews):
    """The arrays of one head of multi-token prediction, and its branches."""

    def __init__(self, shapes, prefix: str, residuals: Sequence[Residual]):
        super().__init__(shapes, prefix)
        self.branches = [
            BranchViews(shapes, f"{prefix}unit.branches[{b}].", (), residual) for b, residual in enumerate(residuals)
        ]


class ModelViews(PartViews):
    """The arrays of a model: ``model["embedding_VD"]``.

    Attributes:
      config: the model's.
      branches: an entry a residual branch, in the order they run, whatever the stages.
      heads: of multi-token prediction.
    """

    def __init__(self, model: LanguageModel):
        super().__init__({name: variable.shape for name, variable in variables_of(model)})
        self.config = model.config
        self.branches = _branches(self._shapes, "", model.plan, ())
        named = {branch.name: branch for branch in model.config.branches}
        ahead = () if model.config.mtp is None else tuple(named[name] for name in model.config.mtp.pattern)
        count = 0 if model.mtp is None else len(model.mtp.heads)
        self.heads = [HeadViews(self._shapes, f"mtp.heads[{k}].", ahead) for k in range(count)]


def _branches(shapes, prefix: str, plan: Sequence[Stage[Residual]], repeats: tuple[int, ...]) -> list[BranchViews]:
    return [
        BranchViews(shapes, f"{prefix}stages[{s}].branches[{b}].", (*repeats, repeat), residual)
        for s, stage in enumerate(plan)
        for repeat in range(stage.repeats)
        for b, residual in enumerate(stage.unit)
    ]


def variables_of(model: LanguageModel) -> list[tuple[str, nnx.Variable]]:
    """Every variable of a model with its name: ``stages[0].branches[1].mixer.w_in_DN``."""
    found = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return [(jax.tree_util.keystr(path).removeprefix("."), variable) for path, variable in found]
