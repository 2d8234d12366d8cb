"""One training step: sums over micro-batches, losses from the sums, one update."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from research.axes import Array
from research.models.auxiliaries import Auxiliaries, Report, auxiliary_losses, reports, reward_policies, running_order
from research.models.language_model import LanguageModel
from research.models.multi_token import multi_token_sums
from research.ops import balancing
from research.ops.dynamic_chunking import ChunkStatistics
from research.ops.sparse_attention import IndexStatistics
from research.sharding.mesh import P, on_mesh
from research.training.state import TrainState

Batch = dict[str, Array]


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    trained: Callable[[Any], bool] = lambda path: True,
):
    """A compiled ``(state, batch) -> (state, metrics)`` that donates its state.

    The batch is the loader's (see ``research.data``). With ``micro_batches`` its rows are computed a part at a time,
    each part's activations recomputed in the backward pass: cross-entropy and router statistics are summed over the
    parts and every loss is taken from the totals, so the result is that of one batch, balance loss included.

    Metrics, float32: loss (mean nats per counted target), tokens (counted targets), grad_norm, and the auxiliary losses
    of the model, coefficients included, summed over its layers, those over chunks and of heads ahead among them:
    balance_loss, z_loss and others of experts, index_loss (sparse attention), ratio_loss (chunks), mtp_loss (heads ahead).
    With experts also load_LE (share of assignments, a row a layer in the order they run; −1 past the experts of layers
    that have fewer than others), max_violation (worst layer), dead_experts (all layers), router_entropy (mean, nats)
    and dropped_assignments (all layers); with indexers that warm up index_captured (share of attention that their top-k
    hold, mean); with chunks tokens_per_chunk, and tokens_per_chunk_2 for chunks of chunks.

    Args:
      trained: of paths in a state tree, which variables the step changes; no gradient is computed for the others.
    """

    def sums(params, variables, batch, key):
        return batch_sums(nnx.merge(graphdef, params, variables), batch, key)

    def objective(params, variables, batch, key):
        params = jax.tree.map_with_path(lambda path, x: x if trained(path) else jax.lax.stop_gradient(x), params)
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
        model = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, state.variables))  # what it writes to is its own
        update_router_biases(model, aux)
        _, _, moved = nnx.split(model, nnx.Param, ...)
        keep = lambda path, new, old: new if trained(path) else old  # noqa: E731
        variables = jax.tree.map_with_path(keep, moved, state.variables)
        metrics = {
            "loss": loss,
            "tokens": count,
            "grad_norm": optax.tree.norm(grads),
            **losses,
            **layer_metrics(model, aux),
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


def batch_sums(model: LanguageModel, batch: Batch, key) -> tuple[Array, Array, Auxiliaries]:
    """Summed nats, counted targets and the model's auxiliaries (sums as well) of one batch; heads ahead run where there is
    a key (in training)."""
    segment_ids_BT, positions_BT = batch["segment_ids_BT"], batch["positions_BT"]
    targets_BT, mask_BT = batch["targets_BT"], batch["loss_mask_BT"]
    x_BTD, _, stages = model.hidden(batch["inputs_BT"], segment_ids_BT, positions_BT, key=key)
    nats, count = model.cross_entropy(x_BTD, targets_BT, mask_BT)
    # Only routers trained by REINFORCE read these logits; without them they are dead code.
    aux = Auxiliaries(reward_policies(stages, model.logits(x_BTD), targets_BT, mask_BT))
    if model.mtp is not None and key is not None:
        ahead, heads = multi_token_sums(
            model, x_BTD, batch["inputs_BT"], targets_BT, mask_BT, segment_ids_BT, positions_BT, key
        )
        aux = aux._replace(ahead=ahead, heads=heads)
    return nats, count, aux


def update_router_biases(model: LanguageModel, aux: Auxiliaries) -> None:
    """Moves the selection biases of ``model`` (merged inside the step, so nothing outside changes) by one step."""
    for layer, statistics in ((report.mixer, report.auxiliary) for report in _routers(reports(model, aux))):
        if rate := layer.config.bias_rate:
            layer.bias_E.set_value(balancing.update_bias(layer.bias_E[...], statistics.counts_E, rate))
        elif layer.config.quantile_bias and statistics.margins_EQ is not None:
            bias_LE = balancing.quantile_bias_from_margins(statistics.margins_EQ, layer.config.per_token)
            layer.bias_E.set_value(bias_LE.astype(layer.bias_E[...].dtype))


def layer_metrics(model: LanguageModel, aux: Auxiliaries) -> dict[str, Array]:
    """What ``make_train_step`` reports of layers, whether the model has them or a model inside it."""
    found = list(reports(model, aux))
    return {**_router_metrics(list(_routers(found))), **_index_metrics(found), **_chunk_metrics(found)}


def _routers(found: Iterable[Report]) -> Iterator[Report]:
    return (report for report in found if isinstance(report.auxiliary, balancing.RouterStatistics))


def _router_metrics(routers: list[Report]) -> dict[str, Array]:
    if not routers:
        return {}
    flat = [report.flat for report in routers]
    metrics = [balancing.metrics(statistics) for statistics in flat]

    def over_layers(name):
        return jnp.concatenate([m[name] for m in metrics])

    widest = max(statistics.experts for statistics in flat)
    padded = [jnp.pad(m["load"], ((0, 0), (0, widest - m["load"].shape[1])), constant_values=-1) for m in metrics]
    load_LE, order = jnp.concatenate(padded), running_order(routers)
    return {
        "load_LE": load_LE if (order == np.arange(len(order))).all() else load_LE[order],
        "max_violation": jnp.max(over_layers("max_violation")),
        "dead_experts": jnp.sum(over_layers("dead_experts")).astype(jnp.float32),
        "router_entropy": jnp.mean(over_layers("entropy")),
        "dropped_assignments": sum((jnp.sum(s.dropped, dtype=jnp.float32) for s in flat), jnp.zeros((), jnp.float32)),
    }


def _index_metrics(found: list[Report]) -> dict[str, Array]:
    flat = [report.flat for report in found if isinstance(report.auxiliary, IndexStatistics)]
    known = [statistics for statistics in flat if statistics.captured is not None]
    if not known:
        return {}
    captured, queries = (sum(jnp.sum(getattr(s, name)) for s in known) for name in ("captured", "queries"))
    return {"index_captured": captured / jnp.maximum(queries, 1)}


def _chunk_metrics(found: list[Report]) -> dict[str, Array]:
    """What was cut over the chunks it became: the model's own rows, and by number the chunks cut again."""
    chunks = [
        (len(report.place) // 3, report.flat) for report in found if isinstance(report.auxiliary, ChunkStatistics)
    ]
    metrics = {}
    for level in sorted({level for level, _ in chunks}):
        tokens, cuts = (
            sum(jnp.sum(getattr(c, f)) for at, c in chunks if at == level) for f in ("tokens", "boundaries")
        )
        metrics[f"tokens_per_chunk{'' if level == 1 else f'_{level}'}"] = tokens / jnp.maximum(cuts, 1)
    return metrics


def split_rows(x, parts: int):
    """[B, …] → [parts, B / parts, …], every shard keeping rows of its own."""
    shape = (x.shape[0] // parts, parts, *x.shape[1:])
    spec = [*jax.typeof(x).sharding.spec, *[None] * x.ndim][: x.ndim] if on_mesh() else None
    split = jax.lax.reshape(x, shape, out_sharding=None if spec is None else P(spec[0], None, *spec[1:]))
    return jnp.swapaxes(split, 0, 1)
