"""One training step: sums over micro-batches, losses from the sums, one update."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from research.axes import Array
from research.models.language_model import LanguageModel
from research.ops import balancing
from research.ops.losses import cross_entropy
from research.ops.routing import PolicyTerms, reinforce
from research.sharding.mesh import P, on_mesh
from research.training.state import TrainState

Batch = dict[str, Array]


def make_train_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, *, micro_batches: int = 1):
    """A compiled ``(state, batch) -> (state, metrics)`` that donates its state.

    The batch is the loader's (see ``research.data``). With ``micro_batches`` its rows are computed a part at a time,
    each part's activations recomputed in the backward pass: cross-entropy and router statistics are summed over the
    parts and every loss is taken from the totals, so the result is that of one batch, balance loss included.

    Metrics, float32: loss (mean nats per counted target), tokens (counted targets), balance_loss, z_loss, grad_norm,
    the other auxiliary losses that the model asks for, and for models with experts load_LE (share of assignments, a row
    a layer, where layers have equally many experts), max_violation (worst layer), dead_experts (all layers),
    router_entropy (mean, nats) and dropped_assignments (all layers).
    """

    def sums(params, variables, batch, key):
        model = nnx.merge(graphdef, params, variables)
        return batch_sums(model, batch, key)

    def objective(params, variables, batch, key):
        if micro_batches == 1:
            nats, count, aux = sums(params, variables, batch, key)
        else:
            parts = jax.tree.map(lambda x: split_rows(x, micro_batches), batch)
            body = jax.checkpoint(lambda part, key: sums(params, variables, part, key))
            _, stacked = jax.lax.scan(
                lambda _, part: (None, body(*part)), None, (parts, jax.random.split(key, micro_batches))
            )
            nats, count, aux = jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), stacked)
        losses = auxiliary_losses(nnx.merge(graphdef, params, variables), aux)
        loss = nats / jnp.maximum(count, 1)
        return loss + sum(losses.values(), jnp.zeros((), loss.dtype)), (loss, count, losses, aux)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        gradient = jax.grad(objective, has_aux=True)
        grads, (loss, count, losses, aux) = gradient(state.params, state.variables, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        model = nnx.merge(graphdef, params, state.variables)
        update_router_biases(model, aux)
        _, _, variables = nnx.split(model, nnx.Param, ...)
        metrics = {
            "loss": loss,
            "tokens": count,
            "grad_norm": optax.tree.norm(grads),
            **losses,
            **router_metrics(aux),
        }
        return TrainState(state.step + 1, params, variables, opt_state, state.key), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(graphdef: nnx.GraphDef):
    """A compiled ``(params, variables, batch) -> (nats, count)``: sums over the batch's counted targets."""

    @jax.jit
    def eval_step(params, variables, batch: Batch):
        nats, count, _ = batch_sums(nnx.merge(graphdef, params, variables), batch, key=None)
        return nats, count

    return eval_step


def batch_sums(model: LanguageModel, batch: Batch, key) -> tuple[Array, Array, Any]:
    """Summed nats, counted targets and the model's auxiliaries (sums as well) of one batch."""
    x_BTD, _, aux = model.hidden(batch["inputs_BT"], batch["segment_ids_BT"], batch["positions_BT"], key=key)
    logits_BTV = model.logits(x_BTD)
    nats, count = cross_entropy(logits_BTV, batch["targets_BT"], batch["loss_mask_BT"])
    return nats, count, reward_policies(aux, logits_BTV, batch)


def reward_policies(aux, logits_BTV, batch: Batch):
    """The auxiliaries with every token of a router trained by REINFORCE rewarded, with minus its next-token loss."""

    def reward(entry):
        if not (isinstance(entry, balancing.RouterStatistics) and isinstance(entry.policy, PolicyTerms)):
            return entry
        reward_BT = -optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch["targets_BT"])
        counted = dataclasses.replace(entry.policy, live_T=entry.policy.live_T & batch["loss_mask_BT"])
        return dataclasses.replace(entry, policy=reinforce(counted, reward_BT, axis=(-2, -1)))

    return jax.tree.map(reward, aux, is_leaf=lambda entry: isinstance(entry, balancing.RouterStatistics))


def auxiliary_losses(model: LanguageModel, aux) -> dict[str, Array]:
    """The model's auxiliary losses by name, summed over layers, from statistics of the whole batch."""
    totals: dict[str, Array] = {}
    for layer, statistics in _expert_layers(model, aux):
        for name, value in jax.vmap(layer.config.losses)(statistics).items():
            totals[name] = totals.get(name, 0.0) + jnp.sum(value)
    return totals


def update_router_biases(model: LanguageModel, aux) -> None:
    """Moves the selection biases of ``model`` (merged inside the step, so nothing outside changes) by one step."""
    for layer, statistics in _expert_layers(model, aux):
        if rate := layer.config.bias_rate:
            layer.bias_E.set_value(balancing.update_bias(layer.bias_E[...], statistics.counts_E, rate))
        elif layer.config.quantile_bias and statistics.margins_EQ is not None:
            bias_LE = balancing.quantile_bias_from_margins(statistics.margins_EQ, layer.config.per_token)
            layer.bias_E.set_value(bias_LE.astype(layer.bias_E[...].dtype))


def router_metrics(aux) -> dict[str, Array]:
    """Load and its summaries over all layers with experts, in the order they run."""
    stages = [[entry for entry in stage if isinstance(entry, balancing.RouterStatistics)] for stage in aux]
    metrics = [_in_order([balancing.metrics(entry) for entry in stage]) for stage in stages if stage]
    dropped = [jnp.sum(entry.dropped, dtype=jnp.float32) for stage in stages for entry in stage]
    if not metrics:
        return {}

    def over_layers(name):
        return jnp.concatenate([m[name].reshape(-1) for m in metrics])

    loads = [load_LE for m in metrics for load_LE in m["load"]]
    same = all(isinstance(load_LE, Array) for load_LE in loads) and len({load_LE.shape for load_LE in loads}) == 1
    load = {"load_LE": jnp.stack(loads)} if same else {}
    return {
        **load,
        "max_violation": jnp.max(over_layers("max_violation")),
        "dead_experts": jnp.sum(over_layers("dead_experts")).astype(jnp.float32),
        "router_entropy": jnp.mean(over_layers("entropy")),
        "dropped_assignments": sum(dropped, jnp.zeros((), jnp.float32)),
    }


def _in_order(branches: list[dict[str, Array]]) -> dict[str, Any]:
    """Metrics of a stage's branches, each [repeats, …], layer by layer; lists where branches differ in experts."""
    if len({metrics["load"].shape for metrics in branches}) == 1:
        return jax.tree.map(lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *branches)
    loads = [load_E for metrics in branches for load_E in metrics["load"]]
    summaries = [{name: value for name, value in metrics.items() if name != "load"} for metrics in branches]
    return {**jax.tree.map(lambda *x: jnp.stack(x, axis=1).reshape(-1), *summaries), "load": loads}


def split_rows(x, parts: int):
    """[B, …] → [parts, B / parts, …], every shard keeping rows of its own."""
    shape = (x.shape[0] // parts, parts, *x.shape[1:])
    spec = [*jax.typeof(x).sharding.spec, *[None] * x.ndim][: x.ndim] if on_mesh() else None
    split = jax.lax.reshape(x, shape, out_sharding=None if spec is None else P(spec[0], None, *spec[1:]))
    return jnp.swapaxes(split, 0, 1)


def _expert_layers(model: LanguageModel, aux) -> Iterator[tuple[Any, balancing.RouterStatistics]]:
    """Every mixer that routes, with its statistics."""
    for stacked, entries in zip(model.stages, aux, strict=True):
        for branch, entry in zip(stacked.branches, entries, strict=True):
            if isinstance(entry, balancing.RouterStatistics):
                yield branch.mixer, entry
