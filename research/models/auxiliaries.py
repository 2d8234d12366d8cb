"""What leaves a model beside its output, layer by layer, wherever the layer is.

A mixer may be a model of its own (H-Net), and heads ahead have layers too. Whoever reads auxiliaries walks them with
``reports`` and need not know: losses, the updates of router biases, metrics. All are sums over a batch, so they add up.
"""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.axes import Array, Float, Int
from research.layers.context import Nested
from research.ops import balancing
from research.ops.routing import PolicyTerms, reinforce

if typing.TYPE_CHECKING:
    from research.models.language_model import LanguageModel


class MultiTokenSums(NamedTuple):
    """Of each head: summed nats and counted targets (float32 or wider); they add up over micro-batches and devices."""

    nats_N: Float[Array, " N"]
    count_N: Float[Array, " N"]


class Auxiliaries(NamedTuple):
    """Those of the model's stages (``LanguageModel.hidden``); what the heads ahead predict, and those of their layers."""

    stages: tuple[Any, ...]
    ahead: MultiTokenSums | None = None
    heads: tuple[Any, ...] = ()


class Report(NamedTuple):
    """One layer's auxiliary, or that of layers stacked over repeats: the leaves of both mixer and auxiliary then have
    ``axes`` leading axes. ``place`` orders them: stage, repeat (None where it is an axis) and branch, outside in."""

    mixer: Any
    auxiliary: Any
    axes: int
    place: tuple[int | None, ...]

    @property
    def repeats(self) -> tuple[int, ...]:
        return jax.tree.leaves(self.auxiliary)[0].shape[: self.axes]

    @property
    def flat(self) -> Any:
        """The auxiliary with one leading axis, of layers."""
        count = int(np.prod(self.repeats))
        return jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[self.axes :]), self.auxiliary)


def reports(model: "LanguageModel", aux: Auxiliaries) -> Iterator[Report]:
    """Every layer that has an auxiliary."""
    yield from _of_stages(model.stages, aux.stages, 0, ())
    for index, entries in enumerate(aux.heads):
        assert model.mtp is not None
        yield from _of_branches(model.mtp.heads[index].unit.branches, entries, 0, (len(model.stages) + index, 0))


def _of_stages(stages, entries, axes: int, place) -> Iterator[Report]:
    for index, (stacked, of_stage) in enumerate(zip(stages, entries, strict=True)):
        yield from _of_branches(stacked.branches, of_stage, axes + 1, (*place, index, None))


def _of_branches(branches, entries, axes: int, place) -> Iterator[Report]:
    for index, (branch, entry) in enumerate(zip(branches, entries, strict=True)):
        here = (*place, index)
        if isinstance(entry, Nested):
            yield Report(branch.mixer, entry.own, axes, here)
            yield from _of_stages(branch.mixer.stages, entry.stages, axes, here)
        elif entry is not None:
            yield Report(branch.mixer, entry, axes, here)


def running_order(found: Sequence[Report]) -> Int[np.ndarray, " L"]:
    """Where each layer, in the order they run, is among the layers of ``flat`` reports one after the other."""
    places = []
    for report in found:
        for repeat in np.ndindex(report.repeats):
            left = iter(repeat)
            places.append(tuple(next(left) if part is None else part for part in report.place))
    return np.asarray(sorted(range(len(places)), key=places.__getitem__), np.int32)


def auxiliary_losses(model: "LanguageModel", aux: Auxiliaries) -> dict[str, Array]:
    """The model's auxiliary losses by name, coefficients included, summed over layers, from sums of the whole batch."""
    from research.models.multi_token import multi_token_loss

    totals: dict[str, Array] = {}
    for report in reports(model, aux):
        for name, value_L in jax.vmap(report.mixer.config.losses)(report.flat).items():
            totals[name] = totals.get(name, 0.0) + jnp.sum(value_L)
    if aux.ahead is not None:
        totals["mtp_loss"] = multi_token_loss(model, aux.ahead)
    return totals


def reward_policies(aux, logits_BTV, targets_BT, mask_BT):
    """The auxiliaries with every token of a router trained by REINFORCE rewarded, with minus its loss; none where the
    target does not count."""

    def reward(entry):
        if not (isinstance(entry, balancing.RouterStatistics) and isinstance(entry.policy, PolicyTerms)):
            return entry
        reward_BT = -optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
        counted = dataclasses.replace(entry.policy, live_T=entry.policy.live_T & mask_BT)
        return dataclasses.replace(entry, policy=reinforce(counted, reward_BT, axis=(-2, -1)))

    return jax.tree.map(reward, aux, is_leaf=lambda entry: isinstance(entry, balancing.RouterStatistics))
