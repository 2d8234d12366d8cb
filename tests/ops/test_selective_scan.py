"""Mamba-1's scan against a float64 oracle written from the paper: output, state and every gradient; packed, split, stepped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.selective_scan import check_arguments, selective_scan, selective_scan_step
from tests.ops.test_linear_attention import error

NAMES = ("x", "dt", "A", "B", "C", "skip", "dt_bias", "initial_state")
T = 37
ROWS = np.array(
    [
        [1] * 37,
        [0, 0, 3, 3, 0, 3, 3, 0, 0, *[4] * 9, 0, 4, 5, 0, *[6] * 11, 0, 0, 0, 0],
        [0] * 37,
    ],
    np.int32,
)


def make(T=T, B=3, D=6, K=5, seed=0):
    r = np.random.default_rng(seed)
    normal = lambda *shape: r.standard_normal(shape)  # noqa: E731
    x = {
        "x": normal(B, T, D), "dt": normal(B, T, D), "A": -np.exp(normal(D, K)), "B": normal(B, T, K),
        "C": normal(B, T, K), "skip": normal(D), "dt_bias": normal(D), "initial_state": normal(B, D, K),
    }  # fmt: skip
    cotangents = (normal(B, T, D), normal(B, D, K))
    return jax.tree.map(np.float32, (x, cotangents))


def oracle(x, cotangents, segment_ids=None, softplus=True):
    """(y, state, gradients) in float64, token by token: Algorithm 2 of the paper and its chain rule by hand."""
    u, dt, A, Bm, Cm, skip, bias, start = (np.asarray(x[n], np.float64) for n in NAMES)
    dy, dh = (np.array(c, np.float64) for c in cotangents)
    rows, length, _ = u.shape
    ids = np.ones((rows, length), int) if segment_ids is None else segment_ids
    raw = dt + bias
    step = np.logaddexp(0, raw) if softplus else raw
    y, h, tape = np.zeros_like(u), start.copy(), []
    last = np.zeros(rows, int)
    for t in range(length):
        real, reset = ids[:, t] > 0, (ids[:, t] > 0) & (last > 0) & (last != ids[:, t])
        last = np.where(real, ids[:, t], last)
        decay = np.exp(step[:, t, :, None] * A) * ~reset[:, None, None]
        new = decay * h + (step[:, t] * u[:, t])[..., None] * Bm[:, t, None]
        tape.append((real, decay, h))
        h = np.where(real[:, None, None], new, h)
        y[:, t] = real[:, None] * (np.einsum("bdk,bk->bd", h, Cm[:, t]) + skip * u[:, t])
    final, g = h, {n: np.zeros_like(np.asarray(x[n], np.float64)) for n in NAMES}
    for t in reversed(range(length)):
        real, decay, before = tape[t]
        on = real[:, None]
        new = decay * before + (step[:, t] * u[:, t])[..., None] * Bm[:, t, None]
        dyt = np.where(on, dy[:, t], 0)
        d = np.where(on[..., None], dh + dyt[..., None] * Cm[:, t, None], 0)
        g["C"][:, t] = np.einsum("bd,bdk->bk", dyt, new)
        g["skip"] += np.sum(dyt * u[:, t], axis=0)
        through = d * before * decay
        g["A"] += np.einsum("bdk,bd->dk", through, step[:, t])
        write = np.einsum("bdk,bk->bd", d, Bm[:, t])
        dstep = np.einsum("bdk,dk->bd", through, A) + write * u[:, t]
        g["B"][:, t] = np.einsum("bdk,bd->bk", d, step[:, t] * u[:, t])
        g["x"][:, t] = write * step[:, t] + dyt * skip
        g["dt"][:, t] = dstep / (1 + np.exp(-raw[:, t])) if softplus else dstep
        dh = np.where(on[..., None], decay * d, dh)
    g["dt_bias"], g["initial_state"] = g["dt"].sum((0, 1)), dh
    return y, final, g


@functools.partial(jax.jit, static_argnames=("implementation", "chunk_size", "softplus"))
def run(x, cotangents, segment_ids=None, implementation=None, chunk_size=None, softplus=True):
    def op(x):
        return selective_scan(
            *(x[n] for n in NAMES[:5]), skip_D=x["skip"], dt_bias_D=x["dt_bias"], dt_softplus=softplus,
            initial_state=x["initial_state"], segment_ids=segment_ids, implementation=implementation,
            chunk_size=chunk_size,
        )  # fmt: skip

    (y, state), pull = jax.vjp(op, x)
    return y, state, pull((cotangents[0].astype(y.dtype), cotangents[1]))[0]


def check(got, want, bound=2e-6, absolute=1e-4):
    pairs = {"y": (got[0], want[0]), "state": (got[1], want[1])} | {n: (got[2][n], want[2][n]) for n in NAMES}
    for name, (a, b) in pairs.items():
        assert error(a, b) <= bound, f"{name}: {error(a, b):.2e} > {bound}"
        worst = np.max(np.abs(np.asarray(a, np.float64) - b)) / max(1.0, np.max(np.abs(b)))
        assert worst <= absolute, f"{name}: absolute {worst:.2e} > {absolute}"


@pytest.mark.parametrize(
    ("implementation", "length", "chunk_size"),
    [("recurrent", T, None), ("chunked", T, 8), ("chunked", 1, None), ("chunked", 130, None), (None, 70, None)],
)
def test_every_form_matches_the_oracle(implementation, length, chunk_size):
    x, cotangents = make(length)
    check(run(x, cotangents, None, implementation, chunk_size), oracle(x, cotangents))


@pytest.mark.parametrize("implementation", ["recurrent", "chunked"])
def test_packed_rows_match_the_oracle_with_nan_in_the_padding(implementation):
    x, cotangents = make()
    poisoned = {n: v.copy() for n, v in x.items()}
    bad = cotangents[0].copy()
    for value in (bad, *(poisoned[n] for n in ("x", "dt", "B", "C"))):
        value[ROWS == 0] = np.nan
    got = run(poisoned, (bad, cotangents[1]), ROWS, implementation, 8 if implementation == "chunked" else None)
    check(got, oracle(x, cotangents, ROWS))
    assert not np.asarray(got[0])[ROWS == 0].any()
    np.testing.assert_array_equal(got[1][2], x["initial_state"][2])
    for n in ("x", "dt", "B", "C"):
        assert not np.asarray(got[2][n])[ROWS == 0].any(), n


def test_any_step_is_finite_and_exact():
    """Steps from 0 to 10,000 mixed: e^{dt A} from 1 to 0."""
    x, cotangents = make()
    r = np.random.default_rng(1)
    x["dt"] = r.choice([0, 1e-3, 1, 50, 1e4], size=x["dt"].shape, p=[0.3, 0.3, 0.3, 0.05, 0.05]).astype(np.float32)
    x["dt_bias"] = np.zeros_like(x["dt_bias"])
    for implementation in ("recurrent", "chunked"):
        check(run(x, cotangents, None, implementation, softplus=False), oracle(x, cotangents, softplus=False))


def test_float64_and_bfloat16():
    x, cotangents = make(20)
    want = oracle(x, cotangents)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (x, cotangents))
        got = run(*wide, chunk_size=8)
        assert got[0].dtype == jnp.float64 and got[1].dtype == jnp.float64
        check(got, want, bound=1e-13, absolute=1e-12)
    low = {n: jnp.asarray(v, jnp.bfloat16) for n, v in x.items()}
    got = run(low, cotangents, chunk_size=8)
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    check(got, oracle(jax.tree.map(np.float32, low), cotangents), bound=1e-2, absolute=2e-2)


@functools.partial(jax.jit, static_argnames="chunk_size")
def forward(x, segment_ids, chunk_size=8):
    return selective_scan(
        *(x[n] for n in NAMES[:5]), skip_D=x["skip"], dt_bias_D=x["dt_bias"], dt_softplus=True,
        initial_state=x["initial_state"], segment_ids=segment_ids, chunk_size=chunk_size,
    )  # fmt: skip


def test_split_anywhere_is_whole_and_steps_are_the_sequence():
    x, _ = make(B=1)
    row = np.where(ROWS[1:2] > 0, 5, 0)
    whole, final = forward(x, row)
    for cut in range(1, T):
        y1, state = forward(x, np.where(np.arange(T) < cut, row, 0))
        y2, state = forward(x | {"initial_state": state}, np.where(np.arange(T) >= cut, row, 0))
        np.testing.assert_allclose(y1 + y2, whole, atol=1e-5)
        np.testing.assert_allclose(state, final, atol=1e-5)
    step = jax.jit(functools.partial(selective_scan_step, dt_softplus=True))
    state = x["initial_state"]
    for t in np.flatnonzero(row[0]):
        token = (x["x"][:, t], x["dt"][:, t], x["A"], x["B"][:, t], x["C"][:, t])
        y, state = step(*token, state, skip_D=x["skip"], dt_bias_D=x["dt_bias"])
        np.testing.assert_allclose(y, whole[:, t], atol=1e-5)
    np.testing.assert_allclose(state, final, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch():
    x, _ = make()
    batched = ("x", "dt", "B", "C", "initial_state")
    whole = forward(x, ROWS)
    order = np.array([2, 0, 1])
    pick = lambda rows: forward(x | {n: x[n][rows] for n in batched}, ROWS[rows])  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, pick(order), tuple(a[order] for a in whole))
    jax.tree.map(np.testing.assert_array_equal, pick(np.array([1])), tuple(a[1:2] for a in whole))


def test_the_gradient_keeps_no_states_of_tokens():
    """Memory of the gradient within a few times the arguments: every token's state would be K = 16 times x."""
    B, T, D, K = 1, 8192, 64, 16
    shapes = [(B, T, D), (B, T, D), (D, K), (B, T, K), (B, T, K)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    gradient = jax.grad(lambda *a: jnp.sum(jnp.square(selective_scan(*a)[0])), argnums=range(5))
    memory = jax.jit(gradient).lower(*arguments).compile().memory_analysis()
    inputs = sum(4 * np.prod(shape) for shape in shapes)
    assert memory.temp_size_in_bytes <= 3 * inputs


def test_a_mesh_runs_each_device_on_its_own_rows_and_channels():
    x, cotangents = make(9, B=4)
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    rows, channels = jax.P("data", None, "model"), jax.P("model")
    specs = {
        "x": rows, "dt": rows, "A": channels, "B": jax.P("data"), "C": jax.P("data"), "skip": channels,
        "dt_bias": channels, "initial_state": jax.P("data", "model"),
    }  # fmt: skip
    with jax.set_mesh(mesh):
        put = lambda value, spec: jax.device_put(value, jax.NamedSharding(mesh, spec))  # noqa: E731
        placed = {n: put(v, specs[n]) for n, v in x.items()}
        got = run(placed, (put(cotangents[0], rows), put(cotangents[1], jax.P("data", "model"))))
        assert got[0].sharding.spec == rows
    check(got, oracle(x, cotangents))


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_a_sequence_over_eight_devices_is_whole(packed):
    x, cotangents = make(48)
    ids = np.pad(ROWS, [(0, 0), (6, 5)], constant_values=9) if packed else None
    mesh = jax.make_mesh((8,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    tokens, whole = jax.P(None, "context"), jax.P()
    specs = {n: tokens if n in ("x", "dt", "B", "C") else whole for n in NAMES}

    @jax.jit
    def run(x, cotangents, ids):
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs, tokens), out_specs=(tokens, whole))
        def op(x, ids):
            return selective_scan(
                *(x[n] for n in NAMES[:5]), skip_D=x["skip"], dt_bias_D=x["dt_bias"], dt_softplus=True,
                initial_state=x["initial_state"], segment_ids=ids, axis_name="context",
            )  # fmt: skip

        (y, state), pull = jax.vjp(lambda x: op(x, ids), x)
        return y, state, pull(cotangents)[0]

    check(run(x, cotangents, ids), oracle(x, cotangents, ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((3, 9))}, r"x must be \[B, T, D\] with T at least 1, got shape \(3, 9\)"),
        ({"A": np.zeros((7, 5))}, r"A must be \[D, K\] with D=6, got shape \(7, 5\)"),
        ({"C": np.zeros((3, T, 4))}, r"C must have shape \(3, 37, 5\), got \(3, 37, 4\)"),
        ({"initial_state": np.zeros((3, 5, 6))}, r"initial_state must have shape \(3, 6, 5\), got \(3, 5, 6\)"),
    ],
)
def test_errors_name_the_argument(change, message):
    x = make()[0] | change
    with pytest.raises(ValueError, match=message):
        check_arguments(*(x[n] for n in NAMES), None)


def test_forms_that_cannot_serve_refuse():
    x, _ = make(3)
    arguments = [jnp.asarray(x[n]) for n in NAMES[:5]]
    with pytest.raises(ValueError, match="implementation must be None, 'recurrent' or 'chunked'; got 'fast'"):
        selective_scan(*arguments, implementation="fast")
    with pytest.raises(NotImplementedError, match="power of two, got 12"):
        selective_scan(*arguments, chunk_size=12)
    with pytest.raises(NotImplementedError, match="'recurrent' has no chunks; got chunk_size=4"):
        selective_scan(*arguments, implementation="recurrent", chunk_size=4)
