"""One token of a Mamba-2 mixer: its definition in float64 against NumPy, and the TPU kernel, interpreted, against both."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.layers import mamba2
from research.layers.context import Context
from research.ops.mamba2_step import mamba2_step

G, H, K, V, W = 2, 4, 128, 64, 4
M, N = H * V, H * V + 2 * G * K
NAMES = ("x", "gate", "dt", "tail", "state", "w", "bias", "log_rate", "dt_bias", "skip", "norm")
OPTIONS = {"dt_limits": (0.05, 1.5), "norm_groups": 2}


def arrays(B, seed=0):
    r = np.random.default_rng(seed)
    shapes = (B, N), (B, M), (B, H), (B, W - 1, N), (B, H, K, V), (W, N), (N,), (H,), (H,), (H,), (M,)
    return dict(zip(NAMES, (r.standard_normal(shape) for shape in shapes), strict=True))


def silu(x):
    return x / (1 + np.exp(-x))


def defined(x, limits, groups, eps):
    """Head by head, the state transposed, as the authors have it."""
    B = len(x["x"])
    u, k, q = np.split(silu((x["w"][:-1] * x["tail"]).sum(1) + x["w"][-1] * x["x"] + x["bias"]), [M, M + G * K], axis=1)
    u, k, q = u.reshape(B, H, V), k.reshape(B, G, K), q.reshape(B, G, K)
    dt = np.clip(np.log1p(np.exp(x["dt"] + x["dt_bias"])), *limits)
    S, y = np.zeros((B, H, V, K)), np.zeros((B, H, V))
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            decay = np.exp(-np.exp(x["log_rate"][h]) * dt[b, h])
            S[b, h] = decay * x["state"][b, h].T + dt[b, h] * np.outer(u[b, h], k[b, g])
            y[b, h] = S[b, h] @ q[b, g] + x["skip"][h] * u[b, h]
    y = (y.reshape(B, M) * silu(x["gate"])).reshape(B, groups, -1)
    y = (y / np.sqrt((y**2).mean(-1, keepdims=True) + eps)).reshape(B, M) * x["norm"]
    return y, np.concatenate([x["tail"][:, 1:], x["x"][:, None]], axis=1), S.swapaxes(2, 3)


@functools.cache
def program(implementation):
    call = functools.partial(mamba2_step, **OPTIONS, implementation=implementation)
    return jax.jit(lambda x: call(*(x[name] for name in NAMES)))


def check(got, x, bound):
    expected = defined({name: np.asarray(a, np.float64) for name, a in x.items()}, (0.05, 1.5), 2, 1e-5)
    for a, b in zip(got, expected, strict=True):
        error = np.asarray(a, np.float64) - b
        assert np.sqrt((error**2).mean()) <= bound * np.sqrt((b**2).mean())
        np.testing.assert_allclose(error, 0, atol=30 * bound)


def test_definition():
    with jax.enable_x64(True):
        got = program("xla")({name: jnp.asarray(a) for name, a in arrays(2).items()})
        assert {a.dtype for a in got} == {jnp.dtype("float64")}
    check(got, arrays(2), 1e-12)


@pytest.mark.parametrize(
    ("dtype", "B", "bound"),
    [(jnp.float32, 1, 1e-6), pytest.param(jnp.bfloat16, 11, 3e-3, marks=pytest.mark.slow)],
)
def test_kernel(dtype, B, bound):
    """One row, and eight and three. bfloat16 as layers have it: projections, tail, taps and bias, beside a float32 state."""
    low = ("x", "gate", "dt", "tail", "w", "bias")
    x = {name: jnp.asarray(a, dtype if name in low else jnp.float32) for name, a in arrays(B, 1).items()}
    got = program("pallas_tpu_interpret")(x)
    assert [a.dtype for a in got] == [dtype, dtype, jnp.float32]
    check(got, x, bound)


@pytest.mark.slow
def test_layer_decodes_by_the_kernel(monkeypatch):
    """A prompt in parallel, then one token through the kernel: what the parallel form says of all of them. No bias."""
    config = mamba2.Mamba2Config(heads=4, groups=2, norm_groups=2, dt_limits=(0.05, 1.5), conv_bias=False, chunk_size=4)
    layer = config.build(16, depth=1, rngs=nnx.Rngs(params=0), param_dtype=jnp.float32)
    x_BTD = jnp.asarray(np.random.default_rng(3).standard_normal((3, 6, 16)), jnp.float32)
    calls = []

    def kernel(*x, **options):
        calls.append(x[0].shape)
        return mamba2_step(*x, **options, implementation="pallas_tpu_interpret")

    monkeypatch.setattr(mamba2, "mamba2_step", kernel)

    @jax.jit
    def run(layer, x_BTD):
        call = lambda x_BTD, state: layer(x_BTD, state, Context(jnp.zeros(x_BTD.shape[:2], jnp.int32)))[:2]  # noqa: E731
        empty = layer.init_state(3, 6, jnp.float32)
        _, state = call(x_BTD[:, :5], empty)
        return call(x_BTD, empty), call(x_BTD[:, 5:], state)

    (whole_BTD, whole), (last_B1D, last) = run(layer, x_BTD)
    assert calls == [(3, N)]
    np.testing.assert_allclose(last_B1D, whole_BTD[:, 5:], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), last, whole)


@pytest.mark.slow
def test_gradients_are_the_definitions():
    x = {name: jnp.asarray(a, jnp.float32) for name, a in arrays(2, 2).items()}
    loss = lambda implementation: lambda x: sum(jnp.sum(jnp.sin(y)) for y in program(implementation)(x))  # noqa: E731
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        *(jax.jit(jax.grad(loss(form)))(x) for form in ("xla", "pallas_tpu_interpret")),
    )


def test_refusals():
    x = {name: jax.ShapeDtypeStruct(a.shape, jnp.float32) for name, a in arrays(2).items()}
    call = lambda x, **options: jax.eval_shape(  # noqa: E731
        lambda x: mamba2_step(*(x[name] for name in NAMES), **{**OPTIONS, **options}), x
    )
    narrow = lambda name, size: jax.ShapeDtypeStruct((*x[name].shape[:-1], size), jnp.float32)  # noqa: E731
    with pytest.raises(ValueError, match="number of groups that divides 4, got 700 channels"):
        call(x | {name: narrow(name, 700) for name in ("x", "tail", "w", "bias")})
    with pytest.raises(ValueError, match="implementation must be one of"):
        call(x, implementation="fast")
    with pytest.raises(ValueError, match="norm_groups must divide the 256 channels of all heads, got 3"):
        call(x, norm_groups=3)
    with pytest.raises(NotImplementedError, match="multiple of 128 channels, got 64"):
        call(x, norm_groups=4, implementation="pallas_tpu_interpret")
    small = x | {name: narrow(name, N - 4 * 32) for name in ("x", "tail", "w", "bias")}
    small |= {"state": narrow("state", 32), "gate": narrow("gate", 128), "norm": narrow("norm", 128)}
    with pytest.raises(NotImplementedError, match="at most 256 heads of 128 by 64, got 4 of 128 by 32"):
        call(small, norm_groups=1, implementation="pallas_tpu_interpret")
