"""The causal convolution against its definition, token by token; packed, padded, split and stepped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from research.ops.causal_conv import causal_conv, causal_conv_step

T, D = 24, 3
ROWS = np.array(
    [
        [1] * 24,
        [0, 0, 3, 3, 0, 3, 3, 0, 0, 4, 4, 4, 0, 4, 5, 0, 6, 6, 6, 6, 6, 0, 0, 0],
        [0] * 24,
        [0] + [2] * 11 + [7] * 12,
    ],
    np.int32,
)


def make(W, seed=0):
    r = np.random.default_rng(seed)
    B = len(ROWS)
    shapes = {"x": (B, T, D), "w": (W, D), "bias": (D,), "tail": (B, W - 1, D)}
    return {name: r.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def oracle(x, w, bias, tail, segment_ids):
    """float64, by the definition: a queue of the last W − 1 real tokens, emptied when the segment changes."""
    x, w, bias, tail = (np.asarray(a, np.float64) for a in (x, w, bias, tail))
    W = len(w)
    y, new_tail = np.zeros(x.shape), np.zeros(tail.shape)
    for b, row in enumerate(segment_ids):
        queue, last = list(tail[b]), 0
        for t, segment in enumerate(row):
            if segment == 0:
                continue
            if last and segment != last:
                queue = [np.zeros(x.shape[-1])] * (W - 1)
            last = segment
            taps = [*queue, x[b, t]]
            y[b, t] = bias + sum(a * c for a, c in zip(w, taps, strict=True))
            queue = taps[1:]
        if W > 1:
            new_tail[b] = np.stack(queue)
    return y, new_tail


@functools.partial(jax.jit, static_argnames="activation")
def conv(x, segment_ids, activation=None):
    return causal_conv(x["x"], x["w"], x["bias"], tail=x["tail"], segment_ids=segment_ids, activation=activation)


@pytest.mark.parametrize("W", [1, 2, 4])
def test_packed_and_padded_with_nan_in_the_padding(W):
    x = make(W)
    y, tail = oracle(*x.values(), ROWS)
    poisoned = x | {"x": np.where(ROWS[..., None] == 0, np.nan, x["x"]).astype(np.float32)}
    got_y, got_tail = conv(poisoned, ROWS)
    np.testing.assert_allclose(got_y, y, atol=2e-6)
    np.testing.assert_allclose(got_tail, tail, atol=0)
    silu, _ = conv(poisoned, ROWS, activation="silu")
    np.testing.assert_allclose(silu, np.where(ROWS[..., None] > 0, y / (1 + np.exp(-y)), 0), atol=2e-6)


def test_without_segments_is_one_segment():
    x = make(4)
    ones = np.ones_like(ROWS)
    for a, b in zip(conv(x, None), conv(x, ones), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("W", [1, 4])
def test_split_anywhere_is_whole(W):
    x = make(W)
    row = np.where(ROWS[:1] > 0, 5, 0)
    x = {n: a[:1] if n in ("x", "tail") else a for n, a in x.items()}
    whole, final = conv(x, row)
    for cut in range(1, T):
        y1, tail = conv(x, np.where(np.arange(T) < cut, row, 0))
        y2, tail = conv(x | {"tail": tail}, np.where(np.arange(T) >= cut, row, 0))
        np.testing.assert_allclose(y1 + y2, whole, atol=1e-6)
        np.testing.assert_array_equal(tail, final)


def test_steps_are_the_sequence():
    x = jax.tree.map(jnp.asarray, make(4))
    whole, final = conv(x, None)
    step = jax.jit(lambda x_BD, tail: causal_conv_step(x_BD, x["w"], x["bias"], tail=tail))
    tail = x["tail"]
    for t in range(T):
        y, tail = step(x["x"][:, t], tail)
        np.testing.assert_allclose(y, whole[:, t], atol=1e-6)
    np.testing.assert_array_equal(tail, final)


def test_gradients_stay_in_the_segment_and_match_differences():
    x = make(3)
    r = np.random.default_rng(1)
    cy, ct = r.standard_normal((len(ROWS), T, D)), r.standard_normal((len(ROWS), 2, D))

    @jax.jit
    @jax.grad
    def gradient(x):
        ids = jnp.asarray(ROWS)
        y, tail = causal_conv(x["x"], x["w"], x["bias"], tail=x["tail"], segment_ids=ids)
        return jnp.sum(y * jnp.where(ROWS[..., None] > 0, cy, jnp.nan), where=ROWS[..., None] > 0) + jnp.sum(tail * ct)

    def loss(x):
        y, tail = oracle(*x.values(), ROWS)
        return np.sum(y * cy) + np.sum(tail * ct)

    poisoned = x | {"x": np.where(ROWS[..., None] == 0, np.nan, x["x"]).astype(np.float32)}
    got = gradient(poisoned)
    for name, value in x.items():
        for index in r.integers(0, value.shape, size=(12, value.ndim)):
            spot = tuple(index)
            low, high = {**x, name: value.astype(np.float64)}, {**x, name: value.astype(np.float64)}
            low[name][spot] -= 0.5
            high[name][spot] += 0.5
            np.testing.assert_allclose(got[name][spot], loss(high) - loss(low), atol=3e-5, err_msg=f"{name}{spot}")
    assert not np.asarray(got["x"])[ROWS == 0].any()


def test_bfloat16_accumulates_in_float32():
    x = {name: jnp.asarray(a, jnp.bfloat16) for name, a in make(4).items()}
    y, tail = conv(x, ROWS)
    assert y.dtype == jnp.bfloat16 and tail.dtype == jnp.bfloat16
    exact, _ = oracle(*(np.asarray(a, np.float32) for a in x.values()), ROWS)
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, rtol=4e-3, atol=1e-6)


@pytest.mark.parametrize("W", [1, 4])
@pytest.mark.parametrize("packed", [True, False])
def test_a_sequence_over_eight_devices_is_whole(W, packed):
    """Shards of three tokens: the taps reach over several, and segments cross them. Outputs, tail and every gradient."""
    mesh = jax.make_mesh((8,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    x, ids = make(W), jnp.asarray(ROWS) if packed else None
    split = P(None, "context")

    def whole(x):
        return causal_conv(x["x"], x["w"], x["bias"], tail=x["tail"], segment_ids=ids, activation="silu")

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=({n: split if n == "x" else P() for n in x}, split), out_specs=(split, P())
    )
    def shard(x, ids):
        options = {"segment_ids": ids, "activation": "silu", "axis_name": "context"}
        return causal_conv(x["x"], x["w"], x["bias"], tail=x["tail"], **options)

    def with_gradients(function):
        out, pull = jax.vjp(function, x)
        return out, pull(jax.tree.map(jnp.cos, out))

    ours, theirs = jax.jit(lambda: (with_gradients(lambda x: shard(x, ids)), with_gradients(whole)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6), ours, theirs)


def test_one_tap_on_a_mesh():
    """Its tail is empty, and XLA:CPU (jax 0.11.2) dies while it compiles the sum over devices of an empty gradient."""
    x = make(1)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])

    def loss(x_BTD, w_WD):
        return jnp.sum(jnp.sin(causal_conv(x_BTD, w_WD, segment_ids=jnp.asarray(ROWS))[0]))

    want = jax.jit(jax.grad(loss, argnums=(0, 1)))(x["x"], x["w"])
    with jax.set_mesh(mesh):
        rows_BTD = jax.device_put(x["x"], jax.NamedSharding(mesh, jax.P("data")))
        got = jax.jit(jax.grad(loss, argnums=(0, 1)))(rows_BTD, x["w"])
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5), got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation must be None or 'silu', got 'relu'"),
        ({"tail": np.zeros((4, 4, D))}, r"tail must have shape \(4, 3, 3\), got \(4, 4, 3\)"),
        ({"w_WD": np.zeros((4, D + 1))}, r"w must be \[W, D\] with W at least 1 and D=3, got shape \(4, 4\)"),
        ({"segment_ids": np.zeros((4, T + 1))}, "segment_ids must have shape"),
    ],
)
def test_errors_name_the_argument(change, message):
    from research.ops.causal_conv import check_arguments

    x = make(4)
    good = {"x_BTD": x["x"], "w_WD": x["w"], "bias_D": x["bias"], "tail": x["tail"], "segment_ids": ROWS}
    with pytest.raises(ValueError, match=message):
        check_arguments(**{**good, "activation": None, **change})
