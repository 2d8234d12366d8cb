"""From a list of layers to stages: a unit of residual branches, scanned over its repeats.

Compile time grows with the branches that differ, not with depth.
"""

import dataclasses
import functools
from collections.abc import Hashable, Iterable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from research.layers.context import Context, HandedOn
from research.layers.place import Place, Placed
from research.models.config import Residual, TokenMixer
from research.ops.kept import keeping
from research.sharding.mesh import on_mesh


@dataclasses.dataclass(frozen=True)
class Stage[Layer: Hashable]:
    """``unit``, run ``repeats`` times."""

    unit: tuple[Layer, ...]
    repeats: int


def factorise[Layer: Hashable](layers: Sequence[Layer]) -> tuple[Stage[Layer], ...]:
    """The stages that spell ``layers`` with the fewest branches to compile (then the fewest stages)."""
    count = len(layers)
    # best[i]: (branches compiled, stages, plan) of layers[i:], built from the end.
    best: list[tuple[int, int, tuple[Stage[Layer], ...]]] = [(0, 0, ())] * (count + 1)
    for start in reversed(range(count)):
        options = []
        for length in range(1, count - start + 1):
            unit = tuple(layers[start : start + length])
            end, repeats = start + length, 1
            while True:
                compiled, stages, plan = best[end]
                options.append((compiled + length, stages + 1, (Stage(unit, repeats), *plan)))
                if tuple(layers[end : end + length]) != unit:
                    break
                end, repeats = end + length, repeats + 1
        best[start] = min(options, key=lambda option: option[:2])
    return best[0][2]


class Branch(nnx.Module):
    """One residual branch (see ``Residual``)."""

    def __init__(self, config: Residual, width: int, *, depth: int, place: Place, rngs: nnx.Rngs, param_dtype):
        self.config = config
        self.pre_norm = config.pre_norm and config.pre_norm.build(width, param_dtype=param_dtype)
        own = {"place": place} if isinstance(config.mixer, Placed) else {}
        self.mixer = config.mixer.build(width, depth=depth, rngs=rngs, param_dtype=param_dtype, **own)
        self.post_norm = config.post_norm and config.post_norm.build(width, param_dtype=param_dtype)

    def __call__(self, x_BTD, state, context: Context):
        c = self.config
        normed_BTD = x_BTD if self.pre_norm is None else self.pre_norm(x_BTD)
        y_BTD, state, aux = self.mixer(normed_BTD, state, context)
        y_BTD = y_BTD if self.post_norm is None else self.post_norm(y_BTD)
        skip_BTD = x_BTD if c.skip == "input" else normed_BTD
        return _scaled(skip_BTD, c.skip_scale) + _scaled(y_BTD, c.branch_scale), state, aux


def _scaled(x, scale: float):
    return x if scale == 1.0 else x * scale


class Unit(nnx.Module):
    """The branches of one repeat of a stage, in order."""

    def __init__(
        self, branches: tuple[Residual, ...], width: int, *, depth: int, place: Place, rngs: nnx.Rngs, param_dtype
    ):
        made = []
        for index, branch in enumerate(branches):
            here = place._replace(layer=place.layer + token_mixers(branches[:index]))
            made.append(Branch(branch, width, depth=depth, place=here, rngs=rngs, param_dtype=param_dtype))
        self.branches = nnx.List(made)

    def __call__(self, x_BTD, states, context: Context):
        """(x, selection handed on, states, auxiliaries); ``states`` and the last two are tuples with an entry a branch."""
        new_states, auxes = [], []
        for branch, state in zip(self.branches, states, strict=True):
            x_BTD, state, aux = branch(x_BTD, state, context)
            if isinstance(aux, HandedOn):
                context, aux = dataclasses.replace(context, selected_BTN=aux.selected_BTN), aux.aux
            new_states.append(state)
            auxes.append(aux)
        return x_BTD, context.selected_BTN, tuple(new_states), tuple(auxes)


def token_mixers(branches: Sequence[Residual]) -> int:
    """How many of the branches mix tokens: what the layers of a published model are numbered by."""
    return sum(isinstance(branch.mixer, TokenMixer) for branch in branches)


def build_stage(stage: Stage[Residual], width: int, *, depth: int, place: Place, rngs: nnx.Rngs, param_dtype) -> Unit:
    """A ``Unit`` whose every parameter and constant has a leading axis of repeats; ``place`` is the first one's."""

    def make(rngs: nnx.Rngs, layer) -> Unit:
        here = place._replace(layer=layer)
        return Unit(stage.unit, width, depth=depth, place=here, rngs=rngs, param_dtype=param_dtype)

    layers_L = place.layer + token_mixers(stage.unit) * jnp.arange(stage.repeats, dtype=jnp.int32)
    return nnx.vmap(nnx.transform_metadata(make, partition=None))(rngs.split(stage.repeats), layers_L)


def build_stages(
    plan: Sequence[Stage[Residual]], width: int, *, depth: int, rngs: nnx.Rngs, param_dtype
) -> tuple[list[Unit], Place]:
    """A ``build_stage`` for each, numbered from 0, and the place after them."""
    layers = [branch for stage in plan for branch in stage.unit * stage.repeats]
    place, stages = Place(0, token_mixers(layers)), []
    for stage in plan:
        stages.append(build_stage(stage, width, depth=depth, place=place, rngs=rngs, param_dtype=param_dtype))
        place = place._replace(layer=place.layer + token_mixers(stage.unit) * stage.repeats)
    return stages, place


def run_stages(stages: Iterable[Unit], x_BTD, states, context: Context, *, unroll: int):
    """One stage after the other: (x, states, auxiliaries); ``states`` (None without a cache) and the last two have an entry a
    stage. What a layer hands on reaches later stages too."""
    after, auxes = [], []
    for index, stacked in enumerate(stages):
        before = (None,) * len(stacked.branches) if states is None else states[index]
        x_BTD, selected_BTN, state, aux = run_stage(stacked, x_BTD, before, context, unroll=unroll)
        context = dataclasses.replace(context, selected_BTN=selected_BTN)
        after.append(state)
        auxes.append(aux)
    return x_BTD, tuple(after), tuple(auxes)


def run_stage(stacked: Unit, x_BTD, states, context: Context, *, unroll: int):
    """All repeats of a stage: (x, selection handed on, states, auxiliaries), the last two stacked over repeats."""

    def body(carry, repeat):
        (x_BTD, selected_BTN), (unit, states) = carry, repeat
        within = dataclasses.replace(context, selected_BTN=selected_BTN)
        x_BTD, selected_BTN, states, auxes = unit(x_BTD, states, within)
        return (x_BTD, selected_BTN), (states, auxes)

    selected_BTN = context.selected_BTN
    if selected_BTN is None and any(getattr(branch.mixer, "hands_on", False) for branch in stacked.branches):
        # A scan's carry keeps its shape: before the first repeat it holds nothing that is read.
        first = jax.tree.map(lambda leaf: leaf[0], (stacked, states))
        (_, shape), _ = jax.eval_shape(body, (x_BTD, None), first)
        if shape is not None:
            spec = shape.sharding.spec if on_mesh() else None
            selected_BTN = jnp.zeros(shape.shape, shape.dtype, out_sharding=spec)
    if jax.tree.leaves(states):
        later = tuple(context.deferred and getattr(branch.mixer, "defers", False) for branch in stacked.branches)
        return _run_cached(body, stacked, (x_BTD, selected_BTN), states, later, unroll)
    body = body if context.remat is None else jax.checkpoint(body, policy=keeping(context.remat))
    carry, (states, auxes) = jax.lax.scan(body, (x_BTD, selected_BTN), (stacked, states), unroll=unroll)
    return *carry, states, auxes


def _run_cached(body, stacked: Unit, carry, states, later: tuple[bool, ...], unroll: int):
    """``run_stage`` with a cache, copying as little of it as can be.

    States travel in the carry, where they are updated in place: as inputs and outputs of the scan they would be written to a
    second stack, cleared first, at every token. Those of branches in ``later`` are only read, and return what is to be
    written (``caches.Written``).
    """

    def step(carry, repeat):
        (carry, held), (unit, index, read) = carry, repeat
        cut = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
        own = tuple(r if late else jax.tree.map(cut, h) for r, h, late in zip(read, held, later, strict=True))
        carry, (new, auxes) = body(carry, (unit, own))
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
        kept = zip(held, new, later, strict=True)
        held = tuple(
            None if late else jax.tree.map(lambda h, n: put(h, n.astype(h.dtype)), h, n) for h, n, late in kept
        )
        return (carry, held), (auxes, tuple(n if late else None for n, late in zip(new, later, strict=True)))

    repeats = jax.tree.leaves(states)[0].shape[0]
    held, read = (
        tuple(s if late == which else None for s, late in zip(states, later, strict=True)) for which in (False, True)
    )
    inputs = (stacked, jnp.arange(repeats), read)
    (carry, held), (auxes, written) = jax.lax.scan(step, (carry, held), inputs, unroll=unroll)
    states = tuple(
        jax.tree.map(lambda stack, new: new.onto(stack), r, w) if late else h
        for r, w, h, late in zip(read, written, held, later, strict=True)
    )
    return *carry, states, auxes


def init_states(stacked: Unit, repeats: int, batch: int, max_length: int, dtype):
    """An empty state for every branch of a stage, stacked over its repeats."""
    one = tuple(branch.mixer.init_state(batch, max_length, dtype) for branch in stacked.branches)
    return jax.tree.map(lambda leaf: jnp.zeros((repeats, *leaf.shape), leaf.dtype), one)
