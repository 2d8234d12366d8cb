"""Every form against the float64 oracle: outputs, final state and every gradient."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.linear_attention import linear_attention, linear_attention_step
from tests.ops import linear_attention_oracle as oracle

NAMES = ("q", "k", "v", "log_decay", "beta", "initial_state")
# name: (decay, delta rule)
MECHANISMS = {
    "linear": (None, False),
    "lightning": ("head", False),
    "mamba2": ("token", False),
    "gla": ("channel", False),
    "deltanet": (None, True),
    "gated_deltanet": ("token", True),
    "kda": ("channel", True),
}


def make(seed, B, T, G, H, K, V, decay, delta, gate=1.0, cosine=0.0):
    """Float32 numpy arguments: unit keys (of a given mean cosine), a random state, gates −gate·|N(0, 1)|."""
    r = np.random.default_rng(seed)
    normal = lambda *shape: r.standard_normal(shape)  # noqa: E731
    k = normal(B, T, G, K)
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    if cosine:
        common = normal(B, 1, G, K)
        k = np.sqrt(cosine) * common / np.linalg.norm(common, axis=-1, keepdims=True) + np.sqrt(1 - cosine) * k
        k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    shape = {None: None, "head": (H,), "token": (B, T, H), "channel": (B, T, H, K)}[decay]
    x = {
        "q": normal(B, T, G, K),
        "k": k,
        "v": normal(B, T, H, V),
        "log_decay": None if shape is None else -gate * np.abs(normal(*shape)),
        "beta": r.uniform(0.05, 1, (B, T, H)) if delta else None,
        "initial_state": normal(B, H, K, V),
    }
    x = {name: None if value is None else value.astype(np.float32) for name, value in x.items()}
    return x, (normal(B, T, H, V).astype(np.float32), normal(B, H, K, V).astype(np.float32))


def run_eagerly(x, cotangents, segment_ids=None, implementation=None, chunk_size=None, scale=0.5):
    """(o, state, gradients by name) under the given cotangents."""

    def op(x):
        options = dict(scale=scale, segment_ids=segment_ids, implementation=implementation, chunk_size=chunk_size)
        return linear_attention(x["q"], x["k"], x["v"], **{n: x[n] for n in NAMES[3:]}, **options)

    (o, state), pull = jax.vjp(op, x)
    return o, state, pull((cotangents[0].astype(o.dtype), cotangents[1]))[0]


_STATIC = ("implementation", "chunk_size", "scale")
as_shipped = jax.jit(run_eagerly, static_argnames=_STATIC)
# The same program compiled with few optimisations: half the compile time, which is most of what these tests cost.
run = jax.jit(run_eagerly, static_argnames=_STATIC, compiler_options={"xla_backend_optimization_level": 0})


def expected(x, cotangents, segment_ids=None, scale=0.5):
    arguments = {n: None if v is None else np.asarray(v, np.float64) for n, v in x.items()}
    q, k, v = (arguments.pop(n) for n in "qkv")
    return oracle.value_and_gradients(q, k, v, *cotangents, scale=scale, segment_ids=segment_ids, **arguments)


def error(got, want, floor=1e-30):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.isfinite(got).all()
    size = np.sqrt(np.mean(want**2))
    return 0.0 if not got.any() and not want.any() else np.sqrt(np.mean((got - want) ** 2)) / max(size, floor)


def check(got, want, bound=2e-6, absolute=1e-4, head_bound=5e-6, floor=1e-30):
    """RMSE ratio and largest absolute error (in units of the reference's largest value, at least 1)."""
    o, state, grads = got
    pairs = {"o": (o, want[0]), "state": (state, want[1])} | {n: (grads[n], want[2][n]) for n in want[2]}
    for name, (a, b) in pairs.items():
        limit = head_bound if name == "log_decay" and np.ndim(b) == 1 else bound
        assert error(a, b, floor) <= limit, f"{name}: {error(a, b, floor):.2e} > {limit}"
        worst = np.max(np.abs(np.asarray(a, np.float64) - b)) / max(1.0, np.max(np.abs(b)))
        assert worst <= absolute, f"{name}: absolute {worst:.2e} > {absolute}"


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("implementation", ["recurrent", "chunked"])
def test_every_mechanism_matches_the_oracle(name, implementation):
    x, cotangents = make(0, 2, 65, 2, 4, 8, 6, *MECHANISMS[name])
    check(run(x, cotangents, implementation=implementation), expected(x, cotangents))


@pytest.mark.parametrize("name", ["lightning", "gla", "deltanet", "kda"])
def test_the_quadratic_form_matches_the_oracle(name):
    x, cotangents = make(0, 2, 31, 2, 4, 8, 6, *MECHANISMS[name])
    check(run(x, cotangents, implementation="quadratic"), expected(x, cotangents))


@pytest.mark.parametrize("name", ["gated_deltanet", "gla"])
def test_the_default_as_shipped(name):
    x, cotangents = make(0, 2, 65, 2, 4, 8, 6, *MECHANISMS[name])
    check(as_shipped(x, cotangents), expected(x, cotangents))


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 2, 15, 63, 64, 65, 500, 1024])
@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("implementation", ["recurrent", "quadratic", "chunked"])
def test_every_length(implementation, name, T):
    x, cotangents = make(T, 1, T, 1, 2, 16, 12, *MECHANISMS[name])
    check(run(x, cotangents, implementation=implementation), expected(x, cotangents))


DELTA = ("deltanet", "gated_deltanet", "kda")
LONG = [(name, form, T) for name in DELTA for form in ("recurrent", "chunked") for T in (256, 1024)]


@pytest.mark.parametrize(
    ("name", "implementation", "T"),
    [
        *[("deltanet", "chunked", 256), ("gated_deltanet", "chunked", 64), ("kda", "chunked", 64)],
        ("gated_deltanet", "quadratic", 64),
        *[pytest.param(*case, marks=pytest.mark.slow) for case in LONG],
    ],
)
def test_correlated_keys_with_strong_writes(name, implementation, T):
    """Cosine 0.9 and β 1.9: Newton–Schulz and Neumann series lose every digit here."""
    x, cotangents = make(1, 1, T, 1, 1, 32, 16, *MECHANISMS[name], gate=0.02, cosine=0.9)
    x["beta"] = np.full_like(x["beta"], 1.9)
    check(run(x, cotangents, implementation=implementation), expected(x, cotangents), bound=3e-6, absolute=1e-3)


def test_a_write_strength_of_zero_has_its_gradient():
    x, cotangents = make(7, 1, 33, 1, 1, 8, 6, *MECHANISMS["gated_deltanet"])
    x["beta"] = x["beta"] * np.random.default_rng(0).choice([0, 1e-6, 1e-3, 1], size=x["beta"].shape).astype(np.float32)
    check(run(x, cotangents), expected(x, cotangents))


@pytest.mark.parametrize("name", ["mamba2", "gla", "gated_deltanet", "kda"])
def test_any_gate_is_finite_and_exact(name):
    """Gates of 0, −0.01, −20, −1000 and −inf mixed: no span is a difference of running sums."""
    x, cotangents = make(2, 2, 130, 1, 2, 8, 6, *MECHANISMS[name])
    r = np.random.default_rng(3)
    levels = np.array([0, -0.01, -1, -20, -1000, -np.inf], np.float32)
    for trial, weights in enumerate(([0.3, 0.4, 0.2, 0.04, 0.03, 0.03], [0, 0, 0, 0.3, 0.3, 0.4], [1, 0, 0, 0, 0, 0])):
        x["log_decay"] = r.choice(levels, size=x["log_decay"].shape, p=weights)
        got = run(x, cotangents, implementation="chunked")
        # A gradient that is zero in exact arithmetic has no ratio; gates that only erase are such.
        want = expected(x, cotangents)
        assert np.isfinite(got[2]["log_decay"]).all(), trial
        if trial == 1:
            np.testing.assert_allclose(got[2]["log_decay"], want[2].pop("log_decay"), atol=1e-6)
        check(got, want)
    x["log_decay"] = np.full_like(x["log_decay"], -np.inf)
    for implementation in ("recurrent", "chunked"):
        got = run(x, cotangents, implementation=implementation)
        assert not np.asarray(got[2]["log_decay"]).any() and not np.asarray(got[2]["initial_state"]).any()
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(got))


@pytest.mark.parametrize("name", ["mamba2", "gated_deltanet", "kda"])
def test_bfloat16_inputs(name):
    x, cotangents = make(4, 1, 128, 1, 2, 32, 32, *MECHANISMS[name])
    low = {n: None if v is None else jnp.asarray(v, jnp.bfloat16) for n, v in x.items()}
    got = run(low, cotangents, implementation="chunked")
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    want = expected({n: None if v is None else np.asarray(v, np.float32) for n, v in low.items()}, cotangents)
    check(got, want, bound=1e-2, absolute=2e-2)


def test_float64_under_x64():
    x, cotangents = make(5, 1, 37, 1, 2, 8, 6, *MECHANISMS["kda"])
    with jax.enable_x64(True):
        x64 = {n: None if v is None else jnp.asarray(v, jnp.float64) for n, v in x.items()}
        c64 = tuple(jnp.asarray(c, jnp.float64) for c in cotangents)
        for implementation in ("recurrent", "chunked"):
            got = run(x64, c64, implementation=implementation)
            assert got[0].dtype == jnp.float64 and got[1].dtype == jnp.float64
            check(got, expected(x, cotangents), bound=1e-13, absolute=1e-12)


@pytest.mark.slow
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True, phases=[hypothesis.Phase.generate])
@hypothesis.given(
    T=st.integers(1, 80),
    heads=st.sampled_from([(1, 1), (1, 3), (2, 4)]),
    K=st.sampled_from([1, 3, 16]),
    V=st.sampled_from([1, 5, 8]),
    name=st.sampled_from(sorted(MECHANISMS)),
    chunk_size=st.sampled_from([None, 1, 4, 32]),
)
def test_any_shape(T, heads, K, V, name, chunk_size):
    x, cotangents = make(T, 1, T, *heads, K, V, *MECHANISMS[name])
    got = run(x, cotangents, implementation="chunked", chunk_size=chunk_size)
    # In one dimension the delta rule's map of a chunk, 1 − k X β k, is a small number left of one: what cancels has no ratio.
    check(got, expected(x, cotangents), bound=2e-6 if K > 1 else 1e-5, floor=1e-2)


@pytest.mark.parametrize("name", MECHANISMS)
def test_step_is_the_scan(name):
    x, _ = make(6, 2, 5, 2, 4, 8, 6, *MECHANISMS[name])
    o, state, _ = oracle.forward(x["q"], x["k"], x["v"], **{n: x[n] for n in NAMES[3:]}, scale=0.5)
    S = jnp.asarray(x["initial_state"])
    step = jax.jit(functools.partial(linear_attention_step, scale=0.5))
    for t in range(5):
        g = x["log_decay"]
        g = g if g is None or g.ndim == 1 else g[:, t]
        beta = None if x["beta"] is None else x["beta"][:, t]
        got, S = step(x["q"][:, t], x["k"][:, t], x["v"][:, t], S, log_decay=g, beta=beta)
        assert error(got, o[:, t]) < 1e-6
    assert error(S, state) < 1e-6
