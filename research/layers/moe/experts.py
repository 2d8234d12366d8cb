"""The experts of one device, and how tokens reach them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from research.layers.moe.config import MoEConfig
from research.ops.dispatch import expert_mlp, group, limit_capacity, one_hot_mlp
from research.ops.routing import Assignment, from_choice
from research.sharding.expert_parallel import exchange
from research.sharding.mesh import axis_size, batch_axes, on_mesh


def run_experts(
    config: MoEConfig, inner_TD, x_TD, assignment: Assignment, live: int | None, weights: dict, groups: int
):
    """Routed and shared experts on one device's tokens: (y_TD, shared_TD or None).

    Args:
      inner_TD: what routed experts read. x_TD: what the shared expert reads.
      live: how many visits the assignment holds at most; None if there may be one for each entry.
      weights: this device's parts: its experts, and its share of every hidden width.
      groups: of experts, for the byte model.
    """
    function, form = config.activation.function(), config.dispatch.form
    gates = config.activation.matrices

    def hidden_last(name) -> Any:
        value = weights.get(name)
        return value.reshape(*value.shape[:-2], gates * value.shape[-1]) if value is not None and on_mesh() else value

    w_in, w_out, b_in, b_out = hidden_last("w_in"), weights["w_out"], hidden_last("b_in"), weights.get("b_out")
    b_out = _once(b_out)

    def compute(rows_RD, local: Assignment, live: int | None):
        options = {"activation": function, "b_EN": b_in, "b_EO": b_out}
        if form == "one_hot":
            return one_hot_mlp(rows_RD, w_in, w_out, local, **options)
        return expert_mlp(rows_RD, w_in, w_out, group(local, live=live), **options)

    def shared():
        if "shared_in" not in weights:
            return None
        h_TF = x_TD @ hidden_last("shared_in")
        if "shared_b_in" in weights:
            h_TF = h_TF + hidden_last("shared_b_in")
        y_TD = function(h_TF) @ weights["shared_out"]
        return y_TD + _once(weights["shared_b_out"]) if "shared_b_out" in weights else y_TD

    if axis_size("expert") > 1:
        y_TD, shared_TD = exchange(
            inner_TD,
            assignment,
            compute,
            method=config.exchange,
            chunks=config.chunks,
            slack=config.slack,
            devices_reached=config.devices_reached(axis_size("expert"), groups),
            live=live,
            beside=shared,
        )
    else:
        y_TD, shared_TD = compute(inner_TD, assignment, live), shared()
    if axis_size("tensor") > 1:
        y_TD, shared_TD = jax.lax.psum((y_TD, shared_TD), "tensor")
    return y_TD, shared_TD


def _once(bias):
    """A bias that only one of the devices that split a hidden width may add."""
    if bias is None or axis_size("tensor") == 1:
        return bias
    return jnp.where(jax.lax.axis_index("tensor") == 0, bias, 0)


def batch_shards() -> int:
    """Devices that the current mesh's rows are split over."""
    return functools.reduce(lambda product, name: product * axis_size(name), batch_axes(), 1)


def whole_batch(x):
    """Every device's rows in order, inside ``per_shard``; None stays None."""
    if x is None or batch_shards() == 1:
        return x
    return jax.lax.all_gather(x, batch_axes(), axis=0, tiled=True)


def own_rows(x, count: int):
    """This device's ``count`` rows of what ``whole_batch`` returned."""
    if batch_shards() == 1:
        return x
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(batch_axes()) * count, count)


def kept_experts(expert_TK, weight_TK, experts: int, capacity: int, by: str):
    """expert_A after capacity, `experts` where there was no room."""
    nothing_TE = jnp.zeros((expert_TK.shape[0], experts), weight_TK.dtype)
    return limit_capacity(from_choice(expert_TK, weight_TK, nothing_TE, nothing_TE), capacity, by=by)[0].expert_A


def visits(assignment: Assignment):
    """How many assignments have an expert."""
    return (assignment.expert_A < assignment.experts).sum(dtype=jnp.int32)
