"""Normalised linear attention against a float64 oracle written from the paper: weights, averages, gradients by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.normalised_linear_attention import (
    FEATURE_MAPS,
    feature_map,
    normalised_linear_attention,
    normalised_linear_attention_step,
)
from tests.ops.test_linear_attention import error

NAMES = ("q", "k", "v", "initial_state")
T, G, H, K, V = 23, 2, 4, 6, 3
ROWS = np.array([[1] * 23, [0, 2, 2, 2, 0, 0, 2, *[5] * 8, 0, *[6] * 6, 0], [0] * 23], np.int32)


def make(name, B=3, seed=0):
    r = np.random.default_rng(seed)
    normal = lambda *shape: r.standard_normal(shape)  # noqa: E731
    x = {"q": normal(B, T, G, K), "k": normal(B, T, G, K), "v": normal(B, T, H, V)}
    if name == "identity":  # weights that are positive, as an average asks for
        x["q"], x["k"] = np.abs(x["q"]), np.abs(x["k"])
    # What four tokens before left behind.
    before, values = np.abs(normal(B, H, 4, K)), normal(B, H, 4, V)
    sums = np.einsum("bhtk,bhtv->bhkv", before, values)
    x["initial_state"] = np.concatenate([sums, before.sum(2)[..., None]], axis=-1)
    return jax.tree.map(np.float32, (x, (normal(B, T, H, V), normal(B, H, K, V + 1))))


def features(x, name):
    """(φ(x), what maps a cotangent of φ to one of x)."""
    if name == "elu":
        return np.where(
            x > 0, x + 1, np.exp(np.minimum(x, 0))
        ), lambda d: d * np.where(x > 0, 1, np.exp(np.minimum(x, 0)))
    if name == "relu":
        return np.maximum(x, 0), lambda d: d * (x > 0)
    if name == "softmax":
        e = np.exp(x - x.max(-1, keepdims=True))
        p = e / e.sum(-1, keepdims=True)
        return p, lambda d: p * (d - np.sum(p * d, axis=-1, keepdims=True))
    return x, lambda d: d


def oracle(x, cotangents, name, segment_ids=None):
    """(o, state, gradients) in float64: the matrix of weights, row by row and head by head."""
    x = {n: np.asarray(v, np.float64) for n, v in x.items()}
    do, dstate = (np.asarray(c, np.float64) for c in cotangents)
    B, length = x["q"].shape[:2]
    ids = np.ones((B, length), int) if segment_ids is None else segment_ids
    (fq, back_q), (fk, back_k) = features(x["q"], name), features(x["k"], name)
    o, state = np.zeros_like(x["v"]), np.zeros_like(x["initial_state"])
    dfq, dfk, dv, d0 = np.zeros_like(fq), np.zeros_like(fk), np.zeros_like(x["v"]), np.zeros_like(state)
    for b in range(B):
        seen = ids[b][ids[b] > 0]
        first, last = (seen[0], seen[-1]) if len(seen) else (None, None)
        for h in range(H):
            g, S = h // (H // G), x["initial_state"][b, h]
            kept = np.flatnonzero(ids[b] == last) if len(seen) else np.array([], int)
            ones = np.concatenate([x["v"][b, kept, h], np.ones((len(kept), 1))], axis=1)
            from_start = last == first
            state[b, h] = fk[b, kept, g].T @ ones + (S if from_start else 0)
            dfk[b, kept, g] += ones @ dstate[b, h].T
            dv[b, kept, h] += fk[b, kept, g] @ dstate[b, h, :, :V]
            d0[b, h] += dstate[b, h] if from_start else 0
            for t in np.flatnonzero(ids[b]):
                past = np.flatnonzero((ids[b] == ids[b, t]) & (np.arange(length) <= t))
                S_t = S if ids[b, t] == first else np.zeros_like(S)
                q, k, v = fq[b, t, g], fk[b, past, g], x["v"][b, past, h]
                total, weight = (k @ q) @ v + q @ S_t[:, :V], (k @ q).sum() + q @ S_t[:, V]
                if weight == 0:
                    continue
                o[b, t, h] = total / weight
                dtotal, dweight = do[b, t, h] / weight, -do[b, t, h] @ o[b, t, h] / weight
                dw = v @ dtotal + dweight
                dfq[b, t, g] += dw @ k + S_t[:, :V] @ dtotal + S_t[:, V] * dweight
                dfk[b, past, g] += dw[:, None] * q
                dv[b, past, h] += (k @ q)[:, None] * dtotal
                if ids[b, t] == first:
                    d0[b, h] += q[:, None] * np.append(dtotal, dweight)
    return o, state, {"q": back_q(dfq), "k": back_k(dfk), "v": dv, "initial_state": d0}


@functools.partial(jax.jit, static_argnames=("name", "implementation", "chunk_size"))
def run(x, cotangents, segment_ids, name, implementation=None, chunk_size=None):
    def op(x):
        return normalised_linear_attention(
            x["q"], x["k"], x["v"], feature_map=name, initial_state=x["initial_state"], segment_ids=segment_ids,
            implementation=implementation, chunk_size=chunk_size,
        )  # fmt: skip

    (o, state), pull = jax.vjp(op, x)
    return o, state, pull((cotangents[0].astype(o.dtype), cotangents[1]))[0]


def check(got, want, bound=2e-6, absolute=1e-4):
    pairs = {"o": (got[0], want[0]), "state": (got[1], want[1])} | {n: (got[2][n], want[2][n]) for n in NAMES}
    for name, (a, b) in pairs.items():
        assert error(a, b) <= bound, f"{name}: {error(a, b):.2e} > {bound}"
        worst = np.max(np.abs(np.asarray(a, np.float64) - b)) / max(1.0, np.max(np.abs(b)))
        assert worst <= absolute, f"{name}: absolute {worst:.2e} > {absolute}"


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_packed_rows_match_the_oracle_with_nan_in_the_padding(name):
    x, cotangents = make(name)
    poisoned = {n: v.copy() for n, v in x.items()}
    bad = cotangents[0].copy()
    for value in (bad, *(poisoned[n] for n in "qkv")):
        value[ROWS == 0] = np.nan
    got = run(poisoned, (bad, cotangents[1]), ROWS, name, chunk_size=8)
    check(got, oracle(x, cotangents, name, ROWS))
    assert not np.asarray(got[0])[ROWS == 0].any()
    np.testing.assert_array_equal(got[1][2], x["initial_state"][2])
    for n in "qkv":
        assert not np.asarray(got[2][n])[ROWS == 0].any(), n


def test_the_definition_and_float64():
    x, cotangents = make("elu")
    want = oracle(x, cotangents, "elu")
    check(run(x, cotangents, None, "elu", "recurrent"), want)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (x, cotangents))
        got = run(*wide, None, "elu")
        assert got[0].dtype == jnp.float64 and got[1].dtype == jnp.float64
        check(got, want, bound=1e-13, absolute=1e-12)


def test_bfloat16_values_divide_in_float32():
    x, cotangents = make("elu")
    low = {n: jnp.asarray(v, jnp.bfloat16) for n, v in x.items()}
    o, state, _ = run(low, cotangents, None, "elu")
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    want = oracle(jax.tree.map(np.float32, low), cotangents, "elu")
    assert error(np.asarray(o, np.float32), want[0]) <= 3e-3 and error(state, want[1]) <= 1e-6


def test_weights_that_sum_to_nothing_give_zero():
    x, cotangents = make("relu")
    x["q"][:, 3:9] = -1
    x["k"][:, :12] = -1
    x["initial_state"] *= 0
    o, _, gradients = run(x, cotangents, None, "relu")
    assert not np.asarray(o)[:, :12].any() and np.asarray(o)[:, 12:].any()
    assert all(np.isfinite(a).all() for a in gradients.values())
    assert not np.asarray(gradients["q"])[:, :12].any()


def test_an_average_stays_within_its_values():
    x, cotangents = make("softmax")
    x["initial_state"] *= 0
    o = np.asarray(run(x, cotangents, None, "softmax")[0])
    assert (o <= x["v"].max(1, keepdims=True) + 1e-5).all() and (o >= x["v"].min(1, keepdims=True) - 1e-5).all()


def test_steps_are_the_sequence():
    x, cotangents = make("elu")
    whole, final, _ = run(x, cotangents, None, "elu")
    state = jnp.asarray(x["initial_state"])
    step = jax.jit(normalised_linear_attention_step)
    for t in range(T):
        o, state = step(x["q"][:, t], x["k"][:, t], x["v"][:, t], state)
        np.testing.assert_allclose(o, whole[:, t], atol=1e-5)
    np.testing.assert_allclose(state, final, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
def test_a_sequence_over_eight_devices_is_whole():
    x, cotangents = make("elu")
    pad = lambda a: np.pad(a, [(0, 0), (0, 1)] + [(0, 0)] * (a.ndim - 2))  # noqa: E731
    x = {n: a if n == "initial_state" else pad(a) for n, a in x.items()}
    cotangents, ids = (pad(cotangents[0]), cotangents[1]), pad(ROWS)
    mesh = jax.make_mesh((8,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    tokens, whole = jax.P(None, "context"), jax.P()
    specs = {n: whole if n == "initial_state" else tokens for n in NAMES}

    @jax.jit
    def run(x, cotangents):
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs, tokens), out_specs=(tokens, whole))
        def op(x, ids):
            options = {"initial_state": x["initial_state"], "segment_ids": ids, "axis_name": "context"}
            return normalised_linear_attention(x["q"], x["k"], x["v"], **options)

        (o, state), pull = jax.vjp(lambda x: op(x, ids), x)
        return o, state, pull(cotangents)[0]

    check(run(x, cotangents), oracle(x, cotangents, "elu", ids))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="feature_map must be one of identity, elu, relu, softmax; got 'exp'"):
        feature_map(jnp.ones((1, 2)), "exp")
