"""The TPU kernels, interpreted on CPU, through the op: values and every gradient against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.linear_attention import linear_attention, linear_attention_step
from tests.ops.test_linear_attention import MECHANISMS, NAMES, check, expected, make, run

KERNEL = "pallas_tpu_interpret"
# Packed rows: an initial state that ends inside, padding leading, interior and trailing, a row of nothing else.
ROWS = np.stack(
    [
        np.repeat([1, 2, 0, 2, 3], [9, 14, 3, 10, 1]),
        np.repeat([0, 4, 0, 5, 0], [2, 15, 6, 9, 5]),
        np.repeat([0], [37]),
    ]
).astype(np.int32)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in ("gla", "deltanet") else []) for n in MECHANISMS]
)
def test_packed_rows_match_the_oracle(name):
    """Grouped heads, K ≠ V, T between chunks, an initial state, NaN in the padding; then gates up to −inf in one program."""
    x, cotangents = make(0, 3, 37, 1, 2, 8, 6, *MECHANISMS[name])
    for gates in (None, [0, -0.01, -1, -20, -1000, -np.inf]):
        if gates and (x["log_decay"] is None or x["log_decay"].ndim == 1):
            continue
        if gates:
            x["log_decay"] = np.random.default_rng(1).choice(np.float32(gates), x["log_decay"].shape)
        poisoned = {n: None if v is None else v.copy() for n, v in x.items()}
        for n in NAMES[:5]:
            if poisoned[n] is not None and poisoned[n].ndim > 1:
                poisoned[n][ROWS == 0] = np.nan
        got = run(poisoned, cotangents, ROWS, implementation=KERNEL, chunk_size=16)
        check(got, expected(x, cotangents, ROWS))
        np.testing.assert_array_equal(got[1][2], x["initial_state"][2])
        assert not np.asarray(got[0])[ROWS == 0].any()


@pytest.mark.parametrize("name", ["gated_deltanet"])
def test_correlated_keys_with_strong_writes(name):
    """Cosine 0.9 and β 1.9, then β around 0: two 16-blocks, a ladder merge and the merge that is applied."""
    x, cotangents = make(1, 1, 64, 1, 1, 32, 16, *MECHANISMS[name], gate=0.02, cosine=0.9)
    strong = np.full_like(x["beta"], 1.9)
    weak = x["beta"] * np.random.default_rng(0).choice(np.float32([0, 1e-6, 1e-3, 1]), x["beta"].shape)
    for beta in (strong, weak):
        x["beta"] = beta
        got = run(x, cotangents, implementation=KERNEL, chunk_size=64)
        check(got, expected(x, cotangents), bound=3e-6, absolute=1e-3)


@pytest.mark.parametrize(("name", "H"), [("linear", 8), ("gated_deltanet", 2)])
def test_bfloat16_inputs(name, H):
    """With eight heads a step, two heads share a word; with two, heads lie side by side."""
    x, cotangents = make(4, 1, 33, H, H, 16, 24, *MECHANISMS[name])
    low = {n: None if v is None else jnp.asarray(v, jnp.bfloat16) for n, v in x.items()}
    got = run(low, cotangents, implementation=KERNEL, chunk_size=32)
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    want = expected({n: None if v is None else np.asarray(v, np.float32) for n, v in low.items()}, cotangents)
    check(got, want, bound=1e-2, absolute=2e-2)


@pytest.mark.parametrize(
    ("name", "H", "G"), [("mamba2", 3, 1), ("gated_deltanet", 16, 4), ("kda", 8, 8), ("linear", 2, 2)]
)
def test_one_token(name, H, G):
    """The step's kernel in place of one token of the definition, and its gradient; a gate of −inf among the others."""
    x, _ = make(0, 2, 1, G, H, 8, 6, *MECHANISMS[name])
    if x["log_decay"] is not None:
        x["log_decay"].reshape(-1)[0] = -np.inf
    now = {n: None if x[n] is None else x[n][:, 0] for n in (*"qkv", "log_decay", "beta")}

    def both(implementation):
        def run(now, S):
            q, k, v = (now[n] for n in "qkv")
            gates = {"log_decay": now["log_decay"], "beta": now["beta"]}
            return linear_attention_step(q, k, v, S, **gates, scale=0.5, implementation=implementation)

        value, pull = jax.vjp(run, now, x["initial_state"])
        return value, pull(value)

    got, want = jax.jit(both, static_argnums=0)(KERNEL), jax.jit(both, static_argnums=0)("recurrent")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_a_gradient_taken_on_one_platform_is_lowered_for_another():
    """Residuals have one shape: the same jaxpr holds the XLA form and the TPU kernel."""
    x, cotangents = make(0, 1, 40, 1, 1, 8, 6, *MECHANISMS["gated_deltanet"])
    text = str(jax.make_jaxpr(lambda x: run.__wrapped__(x, cotangents))(x))
    assert "linear_attention_forward" in text and "linear_attention_backward" in text


def test_what_the_kernel_refuses():
    x = jnp.ones((1, 300, 1, 4))
    with pytest.raises(NotImplementedError, match=r"pallas_tpu.*chunks are 16 to 128 tokens, got chunk_size=256"):
        linear_attention(x, x, x, implementation="pallas_tpu", chunk_size=256)
    with pytest.raises(NotImplementedError, match="takes float32 and bfloat16, got float16"):
        linear_attention(*[x.astype(jnp.float16)] * 3, implementation="pallas_tpu")
    with jax.enable_x64(True):
        wide = jnp.ones((1, 4, 1, 4), jnp.float64)
        with pytest.raises(NotImplementedError, match="float32 state, and these inputs want float64"):
            linear_attention(wide, wide, wide, implementation="pallas_tpu")
