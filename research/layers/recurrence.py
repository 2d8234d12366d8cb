"""What the recurrent layers share: their state, their short convolution, and the choice between a sequence and one token."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.axes import Array, Float
from research.layers.context import Context
from research.layers.parameters import read
from research.ops.causal_conv import causal_conv
from research.ops.linear_attention import linear_attention, linear_attention_step
from research.ops.linear_attention.dispatch import check_implementation
from research.sharding.mesh import per_shard


class RecurrentState(NamedTuple):
    """The last inputs of the convolution, W-1 taps of N channels (None where there is none), and the op's state: matrices of
    [B, H, K, V], or Mamba-1's [B, N, K]."""

    tail_BWN: Float[Array, "B W N"] | None
    memory: Array


def at_least_one(config, *names: str) -> None:
    """Raises ValueError for a field of ``config`` that must be a positive whole number and is none."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def check_form(config) -> None:
    """Raises ValueError for an ``implementation`` or ``chunk_size`` that ``linear_attention`` would refuse."""
    try:
        check_implementation(config.implementation, config.chunk_size)
    except NotImplementedError as error:
        raise ValueError(str(error)) from error


def heads(x_BTN, *sizes: tuple[int, int]):
    """[B, T, N] cut into one array [B, T, heads, width] for each (heads, width)."""
    ends = [sum(number * width for number, width in sizes[: i + 1]) for i in range(len(sizes))]
    parts = jnp.split(x_BTN, ends[:-1], axis=-1)
    return [x.reshape(*x.shape[:2], *size) for x, size in zip(parts, sizes, strict=True)]


def convolve(x_BTN, w_WN, state: RecurrentState | None, context: Context, bias_N=None):
    """``silu(causal_conv(x))`` with variables ``w_WN`` and ``bias_N``; returns (y_BTN, the new tail or None)."""

    def run(batched, weights):
        x_BTN, tail_BWN, segment_ids_BT = batched
        return causal_conv(x_BTN, *weights, tail=tail_BWN, segment_ids=segment_ids_BT, activation="silu")

    dtype, tail_BWN = x_BTN.dtype, None if state is None else state.tail_BWN
    weights = read(w_WN, dtype), None if bias_N is None else read(bias_N, dtype)
    y_BTN, new_BWN = per_shard(run, (x_BTN, tail_BWN, context.segment_ids_BT), weights)
    return y_BTN, None if tail_BWN is None else new_BWN.astype(tail_BWN.dtype)


def attend(
    q_BTGK,
    k_BTGK,
    v_BTHV,
    state: RecurrentState | None,
    context: Context,
    config,
    *,
    log_decay=None,
    beta=None,
    scale=1.0,
):
    """``linear_attention`` or its step, with ``config``'s implementation and chunk_size; returns (o_BTHV, the new memory or
    None)."""
    options = {"implementation": config.implementation, "chunk_size": config.chunk_size}
    per_head = log_decay is not None and log_decay.ndim == 1  # the same for every row
    return sequence_or_step(
        functools.partial(linear_attention, scale=scale, **options),
        functools.partial(linear_attention_step, scale=scale),
        (q_BTGK, k_BTGK, v_BTHV),
        state,
        context,
        gates={"beta": beta} if per_head else {"beta": beta, "log_decay": log_decay},
        shared={"log_decay": log_decay} if per_head else {},
    )


def sequence_or_step(
    sequence, step, arrays, state: RecurrentState | None, context: Context, *, gates: Any = None, shared: Any = None
):
    """``sequence``, or ``step`` where one token goes on from a state, on each device's own rows.

    Args:
      sequence: ``(*arrays, **gates, **shared, initial_state=…, segment_ids=…) -> (o_BT…, memory)``.
      step: the same for arrays and gates without T, the memory after the arrays.
      arrays, gates: with leading axes [B, T]. shared: what all rows read.

    Returns:
      o, and the new memory (None without a state).
    """
    one = state is not None and arrays[0].shape[1] == 1 and context.segment_ids_BT is None

    def run(batched, shared):
        arrays, gates, memory, segment_ids_BT = batched
        if one:
            arrays, gates = jax.tree.map(lambda x: x[:, 0], (arrays, gates))
            o_B, memory = step(*arrays, memory, **gates, **shared)
            return o_B[:, None], memory
        return sequence(*arrays, **gates, **shared, initial_state=memory, segment_ids=segment_ids_BT)

    memory = None if state is None else state.memory
    o_BT, new = per_shard(run, (arrays, gates or {}, memory, context.segment_ids_BT), shared or {})
    return o_BT, None if state is None else new


def empty_state(batch: int, dtype, *, memory: tuple[int, ...], tail: tuple[int, int] | None = None) -> RecurrentState:
    """Zeros: ``memory`` is the op's state of a row, in float32 or wider; ``tail`` (taps - 1, channels)."""
    return RecurrentState(
        None if tail is None else jnp.zeros((batch, *tail), dtype),
        jnp.zeros((batch, *memory), jnp.promote_types(dtype, jnp.float32)),
    )


def next_state(state: RecurrentState | None, tail_BWN, memory) -> RecurrentState | None:
    """State in is state out; None stays None."""
    return None if state is None else RecurrentState(tail_BWN, memory)
