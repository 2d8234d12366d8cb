"""The GPU kernels, interpreted on CPU, through the op: values and every gradient against the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.linear_attention import gpu
from research.ops.linear_attention import linear_attention, linear_attention_step
from tests.ops.test_linear_attention import MECHANISMS, NAMES, check, expected, make, run

KERNEL = "pallas_gpu_interpret"
ADDITIVE = ("linear", "lightning", "mamba2")
# RMSE ratios with bfloat16 products: additive; by the delta rule with random keys; with keys at cosine 0.9 written 1.9 times.
BOUNDS = {"additive": 5e-3, "delta": 7e-3, "correlated": 2e-2}
# Packed rows: an initial state that ends inside, padding leading, interior and trailing, a row of nothing else.
ROWS = np.stack(
    [
        np.repeat([1, 2, 0, 2, 3], [9, 44, 3, 10, 4]),
        np.repeat([0, 4, 0, 5, 0], [2, 15, 6, 43, 4]),
        np.repeat([0], [70]),
    ]
).astype(np.int32)


def low(x, cotangents):
    """q, k, v and do in bfloat16, and what the oracle is to be given for them."""
    x = {n: jnp.asarray(v, jnp.bfloat16) if n in "qkv" else v for n, v in x.items()}
    cotangents = (jnp.asarray(cotangents[0], jnp.bfloat16), cotangents[1])
    wide = {n: None if v is None else np.asarray(v, np.float32) for n, v in x.items()}
    return x, cotangents, wide, tuple(np.asarray(c, np.float32) for c in cotangents)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n != "mamba2" else []) for n in (*ADDITIVE, "gla", "gated_deltanet")],
)
def test_packed_rows_match_the_oracle(name):
    """Grouped heads, K ≠ V, two chunks, an initial state, NaN in the padding, gates up to −inf."""
    width = (8, 6) if name in ADDITIVE else (40, 24)
    x, cotangents = make(0, 3, 70, 1, 2, *width, *MECHANISMS[name])
    if MECHANISMS[name][0] in ("token", "channel"):
        gates = np.float32([0, -0.01, -1, -20, -1000, -np.inf])
        x["log_decay"] = np.random.default_rng(1).choice(
            gates, x["log_decay"].shape, p=[0.3, 0.3, 0.3, 0.04, 0.03, 0.03]
        )
    x, cotangents, wide, wide_cotangents = low(x, cotangents)
    want = expected(wide, wide_cotangents, ROWS)
    for n in NAMES[:5]:
        if x[n] is not None and x[n].ndim > 1:
            x[n] = jnp.where((ROWS == 0).reshape(*ROWS.shape, *[1] * (x[n].ndim - 2)), jnp.nan, x[n])
    got = run(x, cotangents, ROWS, implementation=KERNEL)
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    bound = BOUNDS["delta" if MECHANISMS[name][1] else "additive"]
    check(got, want, bound=bound, absolute=2e-2, head_bound=bound)
    np.testing.assert_array_equal(got[1][2], x["initial_state"][2])
    assert not np.asarray(got[0])[ROWS == 0].any()


@pytest.mark.parametrize(("name", "T"), [("deltanet", 70), ("gla", 60)])
def test_a_short_last_chunk(name, T):
    """Two chunks by the delta rule with no gates; one, with a gate a token and channel."""
    *x, wide, wide_cotangents = low(*make(0, 1, T, 1, 1, 40, 24, *MECHANISMS[name]))
    bound = BOUNDS["delta" if MECHANISMS[name][1] else "additive"]
    check(run(*x, implementation=KERNEL), expected(wide, wide_cotangents), bound=bound, absolute=2e-2)


@pytest.mark.slow
def test_correlated_keys_with_strong_writes_and_with_hardly_any():
    """Cosine 0.9 and β 1.9, where a solve in one bfloat16 pass would double the error; then β down to 0, whose gradient is its
    own all the same."""
    x, cotangents = make(1, 1, 64, 1, 1, 64, 16, *MECHANISMS["gated_deltanet"], gate=0.02, cosine=0.9)
    strong = np.full_like(x["beta"], 1.9)
    weak = x["beta"] * np.random.default_rng(0).choice(np.float32([0, 1e-6, 1e-3, 1]), x["beta"].shape)
    for beta, regime in ((strong, "correlated"), (weak, "delta")):
        *given, wide, wide_cotangents = low({**x, "beta": beta}, cotangents)
        got = run(*given, implementation=KERNEL)
        check(got, expected(wide, wide_cotangents), bound=BOUNDS[regime], absolute=3e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "T", "K", "V"),
    [("mamba2", 150, 64, 64), ("mamba2", 300, 128, 70), ("gated_deltanet", 300, 128, 70), ("gla", 300, 128, 24)],
)
def test_a_sequence_cut_into_parts(monkeypatch, name, T, K, V):
    """One head cannot fill a card: three parts of one chunk, or of two with a state between saved ones and K = 128."""
    monkeypatch.setattr(gpu, "_SHORTEST_PART", 1)
    *x, wide, wide_cotangents = low(*make(3, 1, T, 1, 1, K, V, *MECHANISMS[name], gate=0.1))
    assert gpu._Call(*(x[0][n] for n in NAMES[:5]), 1.0, K, None, None).parts == 3
    bound = BOUNDS["delta" if MECHANISMS[name][1] else "additive"]
    check(run(*x, implementation=KERNEL), expected(wide, wide_cotangents), bound=bound, absolute=2e-2)


@pytest.mark.slow
def test_gates_that_only_erase():
    """Nothing goes from token to token: no gate and no initial state has a gradient."""
    x, cotangents = make(2, 1, 70, 1, 1, 8, 6, *MECHANISMS["mamba2"])
    x["log_decay"] = np.full_like(x["log_decay"], -np.inf)
    x, cotangents, wide, wide_cotangents = low(x, cotangents)
    got, want = run(x, cotangents, implementation=KERNEL), expected(wide, wide_cotangents)
    assert not np.asarray(got[2]["log_decay"]).any() and not np.asarray(got[2]["initial_state"]).any()
    check(got, want, bound=5e-3, absolute=2e-2)


@pytest.mark.parametrize(
    ("name", "H", "G", "K"), [("gated_deltanet", 2, 1, 128), ("kda", 1, 1, 64), ("linear", 1, 1, 64)]
)
def test_one_token(name, H, G, K):
    """The step's kernel in place of one token of the definition; a gate of −inf among the others."""
    x, _ = make(0, 2, 1, G, H, K, 64, *MECHANISMS[name])
    if x["log_decay"] is not None:
        x["log_decay"].reshape(-1)[0] = -np.inf
    now = {n: None if x[n] is None else jnp.asarray(x[n][:, 0]) for n in (*"qkv", "log_decay", "beta")}
    state = jnp.asarray(x["initial_state"])
    step = functools.partial(linear_attention_step, now["q"], now["k"], now["v"], state, scale=0.5)
    options = {n: now[n] for n in ("log_decay", "beta")}
    got = step(**options, implementation=KERNEL)
    want = step(**options, implementation="recurrent")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_the_spans_of_a_chunk_are_exact():
    """Fixed-point running sums: the difference of two is the span's sum, −1000 and −inf among the gates."""
    r = np.random.default_rng(0)
    g = r.choice(np.float32([0, -1e-3, -0.3, -7.1, -1000, -np.inf]), (1, 128, 1)) * r.uniform(0.5, 1, (1, 128, 1))
    g = jnp.asarray(g, jnp.float32)
    x = jnp.zeros((1, 128, 1, 64), jnp.bfloat16)
    coarse, fine = np.asarray(gpu._Call(x, x, x, g, None, 1.0, 64, None, None).gates(g))[0, 0, 1, :2]
    sums = np.cumsum(np.maximum(np.asarray(g, np.float64)[0, 64:, 0], -200))
    i, j = np.tril_indices(64)
    got = np.exp2((coarse[i] - coarse[j]) + (fine[i] - fine[j]))
    np.testing.assert_allclose(got, np.exp(sums[i] - sums[j]), rtol=1e-6, atol=1e-38)


def test_the_same_jaxpr_holds_the_kernels_of_both_platforms():
    """None chooses when the call is lowered: the GPU's kernels are there where they serve the call, and only there."""
    text = lambda x: str(jax.make_jaxpr(lambda x: run.__wrapped__(x, cotangents))(x))  # noqa: E731
    for name, kernel in (
        ("mamba2", "linear_attention_backward_keys"),
        ("gla", "linear_attention_backward_channels"),
        ("gated_deltanet", "linear_attention_inverse"),
    ):
        x, cotangents = make(0, 1, 70, 1, 2, 40, 6, *MECHANISMS[name])
        served = text({n: jnp.asarray(v, jnp.bfloat16) if n in "qkv" else v for n, v in x.items()})
        assert kernel in served and kernel not in text(x)


def test_the_kernels_are_traced_on_a_mesh():
    """On an explicit mesh every device runs its rows and heads, in the platform's kernel."""
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    x, _ = make(0, 4, 20, 2, 2, 8, 6, *MECHANISMS["gated_deltanet"])
    with jax.set_mesh(mesh):
        spec = NamedSharding(mesh, P("data", None, "model"))
        y = {n: jax.device_put(jnp.asarray(x[n], jnp.bfloat16), spec) for n in NAMES[:5]}

        def loss(y):
            return jnp.sum(linear_attention(y["q"], y["k"], y["v"], log_decay=y["log_decay"], beta=y["beta"])[0] ** 2)

        assert "linear_attention_inverse" in str(jax.make_jaxpr(jax.grad(loss))(y))
        del y["beta"]
        assert "linear_attention_inverse" not in str(jax.make_jaxpr(jax.grad(lambda y: loss({**y, "beta": None})))(y))
        spec = NamedSharding(mesh, P("data", "model"))
        q, v, S = (jax.device_put(jnp.ones((4, 2, *rest)), spec) for rest in ((64,), (64,), (64, 64)))
        assert "linear_attention_step" in str(jax.make_jaxpr(linear_attention_step)(q, q, v, S))


def test_what_the_kernel_refuses():
    x = jnp.ones((1, 300, 1, 4), jnp.bfloat16)

    def refused(match, q=x, v=x, **options):
        with pytest.raises(NotImplementedError, match=f"pallas_gpu.*{match}"):
            linear_attention(q, q, v, implementation="pallas_gpu", **options)

    refused("takes bfloat16, got float16 queries, float16 keys and bfloat16 values", x.astype(jnp.float16))
    refused("takes K up to 128, got K = 160", jnp.ones((1, 300, 1, 160), jnp.bfloat16))
    refused("chunks are 64 tokens, and states are saved every 32", beta=jnp.ones((1, 300, 1)))
    refused("chunks are 64 tokens, and states are saved every 32", log_decay=-jnp.ones((1, 300, 1, 4)))
    kda = dict(log_decay=-jnp.ones((1, 300, 1, 4)), beta=jnp.ones((1, 300, 1)))
    refused("delta rule takes gates one a token and head, and log_decay has one a channel", **kda)
    refused("chunks are 64 tokens, got chunk_size=128", chunk_size=128)
    refused("chunks are 64 tokens, and states are saved every 16", chunk_size=16)
    token = jnp.ones((1, 1, 32))
    with pytest.raises(NotImplementedError, match=r"pallas_gpu.*multiples of 64.*got K = 32 and V = 32"):
        linear_attention_step(token, token, token, jnp.ones((1, 1, 32, 32)), implementation="pallas_gpu")
