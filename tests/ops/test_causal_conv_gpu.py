"""The GPU kernel of the causal convolution, interpreted on CPU, through the op: values and every gradient in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.causal_conv import gpu
from research.ops.causal_conv import causal_conv
from tests.ops.test_causal_conv_pallas import NAMES, PACKED, SCATTERED, T, make, oracle

KERNEL = "pallas_gpu_interpret"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Chunks of two steps; the last of them is short."""
    monkeypatch.setattr(gpu, "_CHUNKS", (8,))
    monkeypatch.setattr(gpu, "_AHEAD", 4)


def check(x, dy, ids, activation, *, packed=True, relative=0.0, bound=3e-6):
    """NaN in padding, on the way in; zero on the way out."""

    @jax.jit
    def both(x, dy, ids):
        def run(x):
            options = {"tail": x["tail"], "segment_ids": ids if packed else None, "activation": activation}
            return causal_conv(x["x"], x["w"], x["bias"], implementation=KERNEL, **options)[0]

        y, pull = jax.vjp(run, x)
        return y, pull(dy)[0]

    padding = (ids == 0)[..., None]
    poisoned = x | {"x": jnp.where(padding, jnp.nan, x["x"]).astype(x["x"].dtype)}
    y, grads = both(poisoned, jnp.where(padding, jnp.nan, dy).astype(dy.dtype), ids)
    exact = {n: np.asarray(a, np.float32) for n, a in x.items()}
    want_y, want = oracle(*exact.values(), ids, activation == "silu", np.asarray(dy, np.float32))
    assert y.dtype == x["x"].dtype and all(grads[n].dtype == x[n].dtype for n in NAMES)
    np.testing.assert_allclose(np.asarray(y, np.float32), want_y, rtol=relative, atol=bound)
    for n in NAMES:
        np.testing.assert_allclose(np.asarray(grads[n], np.float32), want[n], rtol=relative, atol=10 * bound, err_msg=n)
    assert not np.asarray(y)[ids == 0].any() and not np.asarray(grads["x"])[ids == 0].any()


def test_packed_documents(monkeypatch):
    """A document ends in the tail's reach, one crosses chunks; padding behind."""
    monkeypatch.setattr(gpu, "_CHUNKS", (4,))
    monkeypatch.setattr(gpu, "_AHEAD", 2)
    x, dy = make(3, 128)
    x = {n: a[:1, :10] if n == "x" else a[:1] if n == "tail" else a for n, a in x.items()}
    check(x, dy[:1, :10], np.repeat([7, 3, 4, 0], [1, 1, 7, 1])[None].astype(np.int32), "silu")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [PACKED, SCATTERED], ids=["packed", "scattered"])
def test_documents(rows):
    x, dy = make(4, 128)
    check(x, dy, rows, "silu")


@pytest.mark.slow
def test_bfloat16_accumulates_in_float32():
    """Several blocks of channels; no documents."""
    x, dy = make(4, 768)
    low = {n: jnp.asarray(a, jnp.bfloat16) for n, a in x.items()}
    check(
        low, jnp.asarray(dy, jnp.bfloat16), np.ones((2, T), np.int32), "silu", packed=False, relative=2**-8, bound=1e-5
    )


@pytest.mark.slow
def test_one_tap_without_activation():
    x, dy = make(1, 128)
    check(x, dy, SCATTERED, None)


def test_the_kernels_are_traced_on_a_mesh():
    """Each device runs its rows and channels."""
    kind = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind, kind), devices=jax.devices()[:4])
    loss = lambda x, w: jnp.sum(causal_conv(x, w, implementation="pallas_gpu")[0])  # noqa: E731
    with jax.set_mesh(mesh):
        x_BTD = jax.device_put(jnp.ones((2, 12, 256)), jax.NamedSharding(mesh, jax.P("data", None, "tensor")))
        assert "causal_conv_backward" in str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x_BTD, jnp.ones((4, 256))))


def test_platform_is_chosen_when_lowered():
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, 32, 128), (4, 128))]
    traced = jax.jit(lambda x, w: causal_conv(x, w)[0]).trace(*shapes)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_refusals():
    x, w = jnp.zeros((1, 32, 128)), jnp.zeros((5, 128))
    with pytest.raises(NotImplementedError, match="at most 4 taps, got 5"):
        causal_conv(x, w, implementation="pallas_gpu")
    with pytest.raises(NotImplementedError, match="takes float32 and bfloat16, got float16"):
        causal_conv(x.astype(jnp.float16), w[:4], implementation="pallas_gpu")
    with pytest.raises(NotImplementedError, match="channels in multiples of 128, got 96"):
        causal_conv(x[..., :96], w[:4, :96], implementation="pallas_gpu")
