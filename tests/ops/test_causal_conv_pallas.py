"""The TPU kernel of the causal convolution, interpreted on CPU, through the op: values and every gradient in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.causal_conv import tpu
from research.ops.causal_conv import causal_conv

T = 40
NAMES = ("x", "w", "bias", "tail")
# Packed with padding behind; a first document shorter than the taps; padding before, between and behind; nothing else.
PACKED = np.stack([np.repeat([7, 3, 4, 9, 0], [2, 1, 14, 20, 3]), np.repeat([1, 2, 2, 3, 3], 8)]).astype(np.int32)
SCATTERED = np.stack([np.repeat([0, 3, 0, 3, 4, 0], [5, 2, 7, 3, 20, 3]), np.zeros(T, int)]).astype(np.int32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three chunks, the last of them half empty."""
    monkeypatch.setattr(tpu, "_CHUNK", 16)
    monkeypatch.setattr(tpu, "_CHANNELS", 128)


def make(W, D, seed=0):
    r = np.random.default_rng(seed)
    shapes = {"x": (2, T, D), "w": (W, D), "bias": (D,), "tail": (2, W - 1, D)}
    return {name: r.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}, r.standard_normal(
        (2, T, D)
    ).astype(np.float32)


def oracle(x, w, bias, tail, segment_ids, silu, dy):
    """float64, token by token: what each tap sees, then the chain rule."""
    x, w, bias, tail, dy = (np.asarray(a, np.float64) for a in (x, w, bias, tail, dy))
    W = len(w)
    y, grads = np.zeros(x.shape), {n: np.zeros(a.shape) for n, a in zip(NAMES, (x, w, bias, tail), strict=True)}
    for b, row in enumerate(segment_ids):
        queue, last = [("tail", j) for j in range(W - 1)], 0
        for t, segment in enumerate(row):
            if segment == 0:
                continue
            if last and segment != last:
                queue = [None] * (W - 1)
            last = segment
            seen = [*queue, ("x", t)]
            values = [np.zeros(x.shape[-1]) if s is None else {"x": x, "tail": tail}[s[0]][b, s[1]] for s in seen]
            total = bias + sum(a * c for a, c in zip(w, values, strict=True))
            s = 1 / (1 + np.exp(-total))
            y[b, t] = total * s if silu else total
            d = dy[b, t] * ((s + total * s * (1 - s)) if silu else 1)
            grads["bias"] += d
            for n, source in enumerate(seen):
                grads["w"][n] += d * values[n]
                if source is not None:
                    grads[source[0]][b, source[1]] += d * w[n]
            queue = seen[1:]
    return y, grads


@functools.cache
def program(activation, packed):
    def both(x, dy, ids):
        def run(x):
            options = {"tail": x["tail"], "segment_ids": ids if packed else None, "activation": activation}
            return causal_conv(x["x"], x["w"], x["bias"], implementation="pallas_tpu_interpret", **options)[0]

        y, pull = jax.vjp(run, x)
        return y, pull(dy)[0]

    return jax.jit(both)


@pytest.mark.parametrize("rows", [PACKED, SCATTERED, None], ids=["packed", "scattered", "whole"])
def test_values_and_gradients(rows):
    x, dy = make(4, 130 if rows is None else 3)
    ids = np.ones((2, T), np.int32) if rows is None else rows
    poisoned = x | {"x": np.where(ids[..., None] == 0, np.nan, x["x"]).astype(np.float32)}
    poisoned_dy = np.where(ids[..., None] == 0, np.nan, dy).astype(np.float32)
    y, grads = program("silu", rows is not None)(poisoned, poisoned_dy, ids)
    want_y, want = oracle(*x.values(), ids, True, dy)
    np.testing.assert_allclose(y, want_y, atol=3e-6)
    for name in NAMES:
        np.testing.assert_allclose(grads[name], want[name], atol=2e-5, err_msg=name)
    assert not np.asarray(y)[ids == 0].any() and not np.asarray(grads["x"])[ids == 0].any()


@pytest.mark.parametrize(("W", "rows"), [(1, SCATTERED), (2, None), (9, PACKED)])
def test_other_numbers_of_taps_without_activation(W, rows):
    x, dy = make(W, 3, seed=W)
    ids = np.ones((2, T), np.int32) if rows is None else rows
    y, grads = program(None, rows is not None)(x, dy, ids)
    want_y, want = oracle(*x.values(), ids, False, dy)
    np.testing.assert_allclose(y, want_y, atol=3e-6)
    for name in NAMES:
        np.testing.assert_allclose(grads[name], want[name], atol=2e-5, err_msg=name)


def test_bfloat16_accumulates_in_float32():
    x, dy = make(4, 3)
    low = {n: jnp.asarray(a, jnp.bfloat16) for n, a in x.items()}
    y, grads = program("silu", True)(low, jnp.asarray(dy, jnp.bfloat16), PACKED)
    assert y.dtype == jnp.bfloat16 and grads["x"].dtype == jnp.bfloat16
    exact = {n: np.asarray(a, np.float32) for n, a in low.items()}
    want_y, want = oracle(*exact.values(), PACKED, True, np.asarray(jnp.asarray(dy, jnp.bfloat16), np.float32))
    np.testing.assert_allclose(np.asarray(y, np.float32), want_y, rtol=4e-3, atol=1e-5)
    for name in NAMES:
        scale = np.abs(want[name]).max()
        np.testing.assert_allclose(np.asarray(grads[name], np.float32), want[name], atol=4e-3 * scale, err_msg=name)


def test_on_a_mesh():
    """Each device runs its rows and channels; T does not fill the last chunk, and there are no documents."""
    (x, _), kind = make(4, 4), jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind, kind), devices=jax.devices()[:4])

    def loss(x_BTD, w_WD):
        return jnp.sum(jnp.sin(causal_conv(x_BTD, w_WD, activation="silu")[0]))

    want = jax.jit(jax.grad(loss, argnums=(0, 1)))(x["x"], x["w"])
    with jax.set_mesh(mesh):
        rows_BTD = jax.device_put(x["x"], jax.NamedSharding(mesh, jax.P("data", None, "tensor")))
        got = jax.jit(jax.grad(loss, argnums=(0, 1)))(rows_BTD, x["w"])
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5), got, want)


def test_platform_is_chosen_when_lowered():
    x = jnp.zeros((1, 32, 4))
    text = str(jax.make_jaxpr(lambda x: jax.vjp(lambda x: causal_conv(x, jnp.ones((4, 4)))[0], x)[1](x))(x))
    assert "causal_conv_forward" in text and "causal_conv_backward" in text


def test_refusals():
    x, w = jnp.zeros((1, 32, 4)), jnp.zeros((10, 4))
    with pytest.raises(NotImplementedError, match="at most 9 taps, got 10"):
        causal_conv(x, w, implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match="takes float32 and bfloat16, got float16"):
        causal_conv(x.astype(jnp.float16), w[:4], implementation="pallas_tpu")
    with pytest.raises(ValueError, match="implementation must be None or one of xla, pallas_tpu"):
        causal_conv(x, w[:4], implementation="fast")
