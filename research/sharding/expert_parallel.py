"""Tokens to the devices that hold their experts, and what comes of them back: inside one ``jax.shard_map``.

Two ways, over the mesh axis ``expert``. **All-to-all**: a token travels once to every device that holds any of its
experts, however many of them it holds there, and comes back as one sum. On TPU only what is sent moves
(``ragged_all_to_all``); elsewhere every pair of devices exchanges equally many slots. **Ring**: every device sees every
token (all-gather), computes what its experts have to say, and the sums return to their owners (reduce-scatter).

Nothing is ever dropped. Buffers of the all-to-all hold ``slack`` times an even load; where a batch needs more, all
devices take the ring for it, a part at a time, so that memory stays bounded.

For XLA to let tokens travel on a TPU while experts and the shared expert compute, its all-to-alls must be asynchronous:
``LIBTPU_INIT_ARGS="--xla_tpu_enable_async_all_to_all=true --xla_tpu_enable_async_ragged_all_to_all=true"``. What is then
scheduled, with ``chunks=2``, is tested ahead of time (``tests/sharding/test_tpu_schedule.py``).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.axes import Array, Float
from research.ops.dispatch import combine, dispatch, group
from research.ops.routing import Assignment, as_token_choice, from_choice
from research.sharding.mesh import axis_size

AXIS = "expert"
METHODS = ("auto", "all_to_all", "ragged", "padded", "ring")


@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """What the ways to exchange tokens would cost.

    Attributes:
      bytes: sent by one device in one forward pass of one layer, by way; the backward pass sends as many again.
      choice: the way taken where all-to-all is ragged (TPU). padded_choice: where it is padded.
      devices_reached: different devices a token's experts lie on, in expectation.
      slots: rows of one pair of devices in the padded all-to-all.
      received: rows of tokens that a device has room for in the ragged one.
      live: visits of its experts that a device has room for.
    """

    bytes: dict[str, int]
    choice: str
    padded_choice: str
    devices_reached: float
    slots: int
    received: int
    live: int

    def __str__(self):
        costs = ", ".join(f"{name} {value / 2**20:.2f} MiB" for name, value in self.bytes.items())
        return (
            f"experts exchange tokens by {self.choice} ({self.padded_choice} where all-to-all is padded): "
            f"{costs} a device, layer and forward pass; a token reaches {self.devices_reached:.2f} devices"
        )


def exchange_plan(
    tokens: int,
    width: int,
    *,
    experts: int,
    per_token: int,
    devices: int,
    itemsize: int,
    devices_reached: int | None = None,
    method: str = "auto",
    slack: float = 2.0,
) -> ExchangePlan:
    """The byte model: what a device with ``tokens`` tokens of ``width`` × ``itemsize`` bytes sends under even routing.

    Args:
      devices_reached: how many devices a token's experts may lie on at most (device-limited routing); None for any.
      method: 'auto' takes the fewest bytes; 'all_to_all' is ragged on TPU and padded elsewhere; 'ragged', 'padded' and
        'ring' are what they are everywhere (only TPUs and GPUs can run the ragged one).

    Raises:
      ValueError: experts that don't divide over the devices, an unknown method.
    """
    if experts % devices:
        raise ValueError(f"experts must divide over the {devices} devices of the mesh's expert axis, got {experts}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    own = experts // devices
    allowed = devices if devices_reached is None else min(devices_reached, devices)
    # A token misses a device if all its experts are among the others it may use.
    missed = math.comb((allowed - 1) * own, per_token) / math.comb(allowed * own, per_token)
    reached = allowed * (1 - missed)
    slots = min(tokens, _up(slack * tokens * reached / devices))
    row = width * itemsize * 2 + 2 * 4 * per_token  # there and back, and which experts with which weight
    costs = {
        "ragged": round(tokens * reached * (devices - 1) / devices * row),
        "padded": slots * (devices - 1) * row,
        "ring": tokens * (devices - 1) * row,
    }

    def choose(all_to_all):
        if method == "auto":
            return "ring" if costs["ring"] <= costs[all_to_all] else all_to_all
        return all_to_all if method == "all_to_all" else method

    return ExchangePlan(
        bytes=costs,
        choice=choose("ragged"),
        padded_choice=choose("padded"),
        devices_reached=reached,
        slots=slots,
        received=min(devices * tokens, _up(slack * tokens * reached)),
        live=min(devices * tokens * min(per_token, own), _up(slack * tokens * per_token)),
    )


def devices_within_reach(experts: int, devices: int, groups: int, top_groups: int) -> int:
    """How many devices the experts of any ``top_groups`` of ``groups`` equal groups lie on at most. Groups and devices
    both take the experts in order: one group may lie on several devices, and two groups on two, however small."""
    wide, own = experts // groups, experts // devices
    spans = sorted(((g + 1) * wide - 1) // own - g * wide // own + 1 for g in range(groups))
    return min(devices, sum(spans[-top_groups:]))


def _up(rows: float) -> int:
    return -(-math.ceil(rows) // 8) * 8


def exchange(
    x_TD: Float[Array, "T D"],
    assignment: Assignment,
    compute: Callable[[Array, Assignment, int | None], Array],
    *,
    method: str = "auto",
    chunks: int = 1,
    slack: float = 2.0,
    devices_reached: int | None = None,
    live: int | None = None,
    beside: Callable[[], Any] = lambda: None,
) -> tuple[Float[Array, "T O"], Any]:
    """Each token's sum over its experts, wherever on the axis ``expert`` they are.

    Args:
      x_TD: this device's tokens.
      assignment: of these tokens, over all experts; device d of N holds the d-th N-th of them.
      compute: rows, their assignment over this device's own experts, and the number of visits in it at most -> the
        weighted sums of each row; linear in what its experts return.
      method, slack, devices_reached: see `exchange_plan`.
      chunks: parts that tokens travel in, so that one may travel while another is computed (their greatest common
        divisor with the tokens).
      live: visits that a device's experts receive at most where a capacity says so.
      beside: computed beside the exchange, and returned as second: its arithmetic may hide the travelling.
    """
    devices = axis_size(AXIS)
    assignment = as_token_choice(assignment)
    tokens, experts = assignment.tokens, assignment.experts
    expert_TK, weight_TK = (a.reshape(tokens, -1) for a in (assignment.expert_A, assignment.weight_A))
    chunks = math.gcd(chunks, tokens)
    part = tokens // chunks
    plan = exchange_plan(
        part,
        x_TD.shape[1],
        experts=experts,
        per_token=expert_TK.shape[1],
        devices=devices,
        itemsize=x_TD.dtype.itemsize,
        devices_reached=devices_reached,
        method=method,
        slack=slack,
    )
    own = experts // devices
    worst = devices * part * min(expert_TK.shape[1], own)
    worst = worst if live is None else min(worst, live)
    room = min(plan.live, worst)
    finish = functools.partial(_own_experts, own=own, weight_on=assignment.weight_on, compute=compute)
    ring = functools.partial(_ring, finish=finish, live=worst)
    ways = {
        "ring": ring,
        "padded": functools.partial(_padded, finish=finish, devices=devices, slots=plan.slots, live=room),
        "ragged": functools.partial(_ragged, finish=finish, devices=devices, received=plan.received, live=room),
    }

    def every_chunk(way, arrays):
        other = [beside()]

        def meet(rows_RD):
            # Experts wait for the first tokens and for what is beside: while those travel, this is computed. It also
            # keeps XLA from fusing its last product with the sum of both, which would make it wait for tokens to return.
            if other[0] is None or len(other) > 1:
                return rows_RD
            rows_RD, held = jax.lax.optimization_barrier((rows_RD, other[0]))
            other.append(held)
            return rows_RD

        parts = [way(*(a[i * part : (i + 1) * part] for a in arrays), meet=meet) for i in range(chunks)]
        return jnp.concatenate(parts) if chunks > 1 else parts[0], other[-1]

    def bounded(name):
        def run(*arrays):
            if name == "ring" or _never_overflows(name, plan, part, devices, room, worst):
                return every_chunk(ways[name], arrays)
            fits = _fits(name, arrays[1], plan, chunks, devices, own, room)
            return jax.lax.cond(
                fits,
                lambda *arrays: every_chunk(ways[name], arrays),
                lambda *arrays: (_in_pieces(ring, arrays, chunks * devices), beside()),
                *arrays,
            )

        return run

    arrays = (x_TD, expert_TK, weight_TK)
    if plan.choice == plan.padded_choice:
        return bounded(plan.choice)(*arrays)
    return jax.lax.platform_dependent(*arrays, tpu=bounded(plan.choice), default=bounded(plan.padded_choice))


def _never_overflows(name, plan, tokens, devices, room, worst):
    wide = plan.slots >= tokens if name == "padded" else plan.received >= devices * tokens
    return wide and room >= worst


def _reached_TN(expert_TK, own, devices):
    """Whether a token has business on each device."""
    return ((expert_TK // own)[:, :, None] == jnp.arange(devices)).any(1)


def _fits(name, expert_TK, plan, chunks, devices, own, room):
    """Whether every device's buffers hold what this batch sends; the same answer on every device."""
    reached_TN = _reached_TN(expert_TK, own, devices)
    sent_CN = reached_TN.reshape(chunks, -1, devices).sum(1)
    visits_TN = ((expert_TK // own)[:, :, None] == jnp.arange(devices)).sum(1)
    received_CN, visits_CN = jax.lax.psum((sent_CN, visits_TN.reshape(chunks, -1, devices).sum(1)), AXIS)
    held = (sent_CN <= plan.slots).all() if name == "padded" else (received_CN <= plan.received).all()
    fits = held & (visits_CN <= room).all()
    return jax.lax.pmin(fits.astype(jnp.int32), jax.sharding.get_abstract_mesh().axis_names) > 0


def _in_pieces(way, arrays, pieces):
    """A piece at a time, each computed again in the backward pass."""
    tokens = arrays[0].shape[0]
    pieces = math.gcd(pieces, tokens)
    stacked = jax.tree.map(lambda a: a.reshape(pieces, tokens // pieces, *a.shape[1:]), arrays)
    y = jax.lax.map(jax.checkpoint(lambda piece: way(*piece)), stacked)
    return y.reshape(tokens, -1)


def _own_experts(x_RD, expert_RK, weight_RK, *, own, weight_on, compute, live):
    """The sums of rows over this device's experts; expert ids are local, `own` for none."""
    width = min(expert_RK.shape[1], own)
    if width < expert_RK.shape[1]:
        order_RK = jnp.argsort(expert_RK, axis=1)[:, :width]
        expert_RK, weight_RK = (jnp.take_along_axis(a, order_RK, axis=1) for a in (expert_RK, weight_RK))
    nothing_RE = jnp.zeros((x_RD.shape[0], own), weight_RK.dtype)
    return compute(x_RD, from_choice(expert_RK, weight_RK, nothing_RE, nothing_RE, weight_on=weight_on), live)


def _local_ids(expert_RK, device, own):
    return jnp.where(expert_RK // own == device, expert_RK % own, own)


def _ring(x_TD, expert_TK, weight_TK, *, finish, live, meet=lambda rows_RD: rows_RD):
    own = finish.keywords["own"]
    x_RD, expert_RK, weight_RK = (jax.lax.all_gather(a, AXIS, axis=0, tiled=True) for a in (x_TD, expert_TK, weight_TK))
    expert_RK = _local_ids(expert_RK, jax.lax.axis_index(AXIS), own)
    y_RO = finish(meet(x_RD), expert_RK, weight_RK, live=min(live, expert_RK.size))
    return jax.lax.psum_scatter(y_RO, AXIS, scatter_dimension=0, tiled=True)


def _departures(expert_TK, own, devices, **layout):
    """Rows for the devices: `Groups` of tokens, each at most once a device."""
    reached_TN = _reached_TN(expert_TK, own, devices)
    flag_TS, device_TS = jax.lax.top_k(reached_TN.astype(jnp.int32), min(expert_TK.shape[1], devices))
    device_TS = jnp.where(flag_TS > 0, device_TS, devices)
    nothing_TN = jnp.zeros(reached_TN.shape, jnp.float32)
    return group(from_choice(device_TS, jnp.ones(device_TS.shape, jnp.float32), nothing_TN, nothing_TN), **layout)


def _letters(expert_TK, weight_TK, groups, device_M, own):
    """What each row tells its device: local ids + 1 (0 for none), and weights, in one array."""
    expert_MK = expert_TK.at[groups.token_M].get(mode="fill", fill_value=-1)
    mine_MK = _local_ids(expert_MK, device_M[:, None], own)
    ids_MK = jnp.where((expert_MK >= 0) & (mine_MK < own), mine_MK + 1, 0)
    return jnp.concatenate([ids_MK.astype(weight_TK.dtype), dispatch(weight_TK, groups)], axis=1)


def _read(letters_RK2, own):
    ids_RK, weight_RK = jnp.split(letters_RK2, 2, axis=1)
    ids_RK = jax.lax.stop_gradient(ids_RK).astype(jnp.int32)
    return jnp.where(ids_RK > 0, ids_RK - 1, own), weight_RK


def _padded(x_TD, expert_TK, weight_TK, *, finish, devices, slots, live, meet):
    own = finish.keywords["own"]
    groups = _departures(expert_TK, own, devices, capacity=slots)
    device_M = jnp.arange(devices * slots) // slots
    letters = _letters(expert_TK, weight_TK, groups, device_M, own)
    travel = functools.partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)
    y_RO = finish(meet(travel(dispatch(x_TD, groups))), *_read(travel(letters), own), live=live)
    return combine(travel(y_RO), groups, weighted=True)


def _ragged(x_TD, expert_TK, weight_TK, *, finish, devices, received, live, meet):
    own = finish.keywords["own"]
    groups = _departures(expert_TK, own, devices, alignment=1, even=False)
    sizes_N, me = groups.sizes_E, jax.lax.axis_index(AXIS)
    starts_N = jnp.cumsum(sizes_N) - sizes_N
    sizes_NN = jax.lax.all_gather(sizes_N, AXIS)  # [from, to]
    before_NN = jnp.cumsum(sizes_NN, axis=0) - sizes_NN  # where each sender's rows start at their receiver
    left_NN = jnp.cumsum(sizes_NN, axis=1) - sizes_NN  # and where they started at the sender
    arrived_N = sizes_NN[:, me]
    arrivals_N = jnp.cumsum(arrived_N) - arrived_N

    def there(a):
        room = jnp.zeros((received, a.shape[1]), a.dtype)
        return jax.lax.ragged_all_to_all(a, room, starts_N, sizes_N, before_NN[me], arrived_N, axis_name=AXIS)

    def back(a):
        room = jnp.zeros((groups.token_M.shape[0], a.shape[1]), a.dtype)
        return jax.lax.ragged_all_to_all(a, room, arrivals_N, arrived_N, left_NN[:, me], sizes_N, axis_name=AXIS)

    row_M = jnp.arange(groups.token_M.shape[0])
    device_M = jnp.searchsorted(jnp.cumsum(sizes_N), row_M, side="right", method="compare_all")
    letters = _letters(expert_TK, weight_TK, groups, device_M, own)
    y_RO = finish(meet(there(dispatch(x_TD, groups))), *_read(there(letters), own), live=live)
    return combine(back(y_RO), groups, weighted=True)
