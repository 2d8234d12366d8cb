"""One training step: sums over micro-batches, losses from the sums, one update."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from research.axes import Array
from research.layers.moe import MoE
from research.models.language_model import LanguageModel
from research.ops import balancing
from research.ops.losses import cross_entropy
from research.training.state import TrainState

Batch = dict[str, Array]


def make_train_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, *, micro_batches: int = 1):
    """A compiled ``(state, batch) -> (state, metrics)`` that donates its state.

    The batch is the loader's (see ``research.data``). With ``micro_batches`` its rows are computed a part at a time,
    each part's activations recomputed in the backward pass: cross-entropy and router statistics are summed over the
    parts and every loss is taken from the totals, so the result is that of one batch, balance loss included.

    Metrics, float32: loss (mean nats per counted target), tokens (counted targets), balance_loss, z_loss, grad_norm,
    and for models with experts load_LE (share of assignments, a row a layer), max_violation (worst layer),
    dead_experts (all layers), router_entropy (mean, nats).
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
    nats, count = cross_entropy(model.logits(x_BTD), batch["targets_BT"], batch["loss_mask_BT"])
    return nats, count, aux


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


def router_metrics(aux) -> dict[str, Array]:
    """Load and its summaries over all layers with experts, in the order they run."""
    stages = [[entry for entry in stage if entry is not None] for stage in aux]
    # [repeats, branches of the unit, E] reads layer by layer once flattened.
    per_stage = [jax.tree.map(lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *s) for s in stages if s]
    if not per_stage or len({statistics.experts for statistics in per_stage}) > 1:
        return {}
    metrics = balancing.metrics(jax.tree.map(lambda *x: jnp.concatenate(x), *per_stage))
    return {
        "load_LE": metrics["load"],
        "max_violation": jnp.max(metrics["max_violation"]),
        "dead_experts": jnp.sum(metrics["dead_experts"]).astype(metrics["load"].dtype),
        "router_entropy": jnp.mean(metrics["entropy"]),
    }


def split_rows(x, parts: int):
    """[B, …] → [parts, B / parts, …], every shard keeping rows of its own."""
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def _expert_layers(model: LanguageModel, aux) -> Iterator[tuple[MoE, balancing.RouterStatistics]]:
    for stacked, entries in zip(model.stages, aux, strict=True):
        for branch, entry in zip(stacked.branches, entries, strict=True):
            if isinstance(branch.mixer, MoE):
                yield branch.mixer, entry
