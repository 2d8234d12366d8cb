"""One token of a Gated DeltaNet mixer: its definition in float64 against NumPy, and the TPU kernel, interpreted, against both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.gated_deltanet_step import gated_deltanet_step

B, G, H, K, V, W = 3, 2, 4, 128, 128, 4
N, M = 2 * G * K + H * V, H * V
NAMES = ("x", "gate", "strength", "decay", "tail", "state", "w", "log_rate", "dt_bias", "norm")


def arrays(seed=0):
    r = np.random.default_rng(seed)
    shapes = (B, N), (B, M), (B, H), (B, H), (B, W - 1, N), (B, H, K, V), (W, N), (H,), (H,), (V,)
    return dict(zip(NAMES, (r.standard_normal(shape) for shape in shapes), strict=True))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def defined(x, strongest, eps):
    total = (x["w"][:-1] * x["tail"]).sum(1) + x["w"][-1] * x["x"]
    q, k, v = np.split(total * sigmoid(total), [G * K, 2 * G * K], axis=1)
    unit = lambda a: a / np.sqrt((a**2).sum(-1, keepdims=True) + 1e-6)  # noqa: E731
    q, k = (np.repeat(unit(a.reshape(B, G, K)), H // G, axis=1) for a in (q, k))
    decay = np.exp(-np.exp(x["log_rate"]) * np.log1p(np.exp(x["decay"] + x["dt_bias"])))
    S = x["state"] * decay[..., None, None]
    u = strongest * sigmoid(x["strength"])[..., None] * (v.reshape(B, H, V) - np.einsum("bhkv,bhk->bhv", S, k))
    S = S + k[..., None] * u[:, :, None]
    o = np.einsum("bhkv,bhk->bhv", S, q) * K**-0.5
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + eps) * x["norm"]
    o = o.reshape(B, M) * x["gate"] * sigmoid(x["gate"])
    return o, np.concatenate([x["tail"][:, 1:], x["x"][:, None]], axis=1), S


@functools.cache
def program(implementation):
    call = functools.partial(gated_deltanet_step, eps=1e-5, strongest=2.0, implementation=implementation)
    return jax.jit(lambda x: call(*(x[name] for name in NAMES)))


def check(got, expected, bound):
    for a, b in zip(got, expected, strict=True):
        error = np.asarray(a, np.float64) - b
        assert np.sqrt((error**2).mean()) <= bound * np.sqrt((b**2).mean())
        np.testing.assert_allclose(error, 0, atol=30 * bound)


def test_definition():
    with jax.enable_x64(True):
        got = program("xla")({name: jnp.asarray(a) for name, a in arrays().items()})
        assert {a.dtype for a in got} == {jnp.dtype("float64")}
    check([np.asarray(a) for a in got], defined(arrays(), 2.0, 1e-5), 1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 3e-3)])
def test_kernel(dtype, bound):
    """bfloat16 as layers have it: projections, tail and taps, beside a float32 state."""
    low = ("x", "gate", "tail", "w")
    x = {name: jnp.asarray(a, dtype if name in low else jnp.float32) for name, a in arrays(1).items()}
    got = program("pallas_tpu_interpret")(x)
    assert [a.dtype for a in got] == [dtype, dtype, jnp.float32]
    check(got, defined({name: np.asarray(a, np.float64) for name, a in x.items()}, 2.0, 1e-5), bound)


@pytest.mark.slow
def test_gradients_are_the_definitions():
    x = {name: jnp.asarray(a, jnp.float32) for name, a in arrays(2).items()}
    loss = lambda implementation: lambda x: sum(jnp.sum(jnp.sin(y)) for y in program(implementation)(x))  # noqa: E731
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        *(jax.jit(jax.grad(loss(form)))(x) for form in ("xla", "pallas_tpu_interpret")),
    )


def test_refusals():
    x = {name: jnp.asarray(a, jnp.float32) for name, a in arrays().items()}
    with pytest.raises(ValueError, match="number of heads that divides 4, got 1000 channels"):
        gated_deltanet_step(
            *(x | {"x": x["x"][:, :1000]} | {"tail": x["tail"][..., :1000], "w": x["w"][:, :1000]}).values()
        )
    with pytest.raises(ValueError, match="implementation must be one of"):
        program("fast")(x)
    small = x | {"state": x["state"][:, :, :64], "x": x["x"][:, : N - 2 * G * 64]}
    small |= {"tail": small["tail"][..., : N - 2 * G * 64], "w": small["w"][:, : N - 2 * G * 64]}
    with pytest.raises(NotImplementedError, match="at most 128 heads of 128 by 128, got 4 of 64 by 128"):
        program("pallas_tpu_interpret")(small)
