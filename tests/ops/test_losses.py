"""Losses against float64, and the projected one against the product it never makes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.losses import cross_entropy, projected_cross_entropy


def arrays(B=2, T=11, D=5, V=37):
    r = np.random.default_rng(0)
    x, w = r.standard_normal((B, T, D)), r.standard_normal((D, V))
    return x, w, r.integers(0, V, (B, T)).astype(np.int32), r.random((B, T)) < 0.7


def oracle(x, w, targets, mask, scale):
    """float64: nats, and by hand the slopes of x and w."""
    logits = scale * x @ w
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    nats = -np.log(np.take_along_axis(p, targets[..., None], -1))[..., 0]
    slope = scale * (p - np.eye(w.shape[1])[targets]) * mask[..., None]
    return nats[mask].sum(), slope @ w.T, np.einsum("btd,btv->dv", x, slope)


@pytest.mark.parametrize("block_size", [None, 1, 4, 22])
def test_projected_values_and_gradients(block_size):
    """Blocks that divide the tokens and that don't; NaN where the mask does not look."""
    x, w, targets, mask = arrays()
    nats, dx, dw = oracle(x, w, targets, mask, 0.7)
    poisoned = np.where(mask[..., None], x, np.nan)
    with jax.enable_x64(True):
        function = functools.partial(projected_cross_entropy, scale=0.7, block_size=block_size)
        given = jnp.asarray(targets), jnp.asarray(mask)

        def loss(x, w):
            nats, count = function(x, w, *given)
            return 3 * nats, count

        (got, count), (gx, gw) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(poisoned, w)
        value, _ = jax.jit(function)(poisoned, w, *given)
        got, value, count, gx, gw = (np.asarray(a) for a in (got, value, count, gx, gw))
    assert count == mask.sum()
    np.testing.assert_allclose([got / 3, value], nats, rtol=1e-12)
    np.testing.assert_allclose(gx, 3 * dx, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(gw, 3 * dw, rtol=1e-10, atol=1e-12)


def test_projected_is_cross_entropy_of_the_product():
    x, w, targets, mask = arrays()
    low = [jnp.asarray(a, jnp.bfloat16) for a in (x, w)]
    logits = jnp.einsum("btd,dv->btv", *low, preferred_element_type=jnp.float32)
    want = jax.jit(cross_entropy)(logits, targets, mask)
    got = jax.jit(projected_cross_entropy)(*low, targets, mask)
    assert [a.dtype for a in got] == [jnp.float32] * 2
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_projected_keeps_no_logits():
    """The gradient's temporaries stay far below one [T, V] of float32."""
    T, D, V = 4096, 16, 8192
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, T, D), (D, V))]
    rest = jax.ShapeDtypeStruct((1, T), jnp.int32), jax.ShapeDtypeStruct((1, T), jnp.bool_)
    loss = lambda x, w, targets, mask: projected_cross_entropy(x, w, targets, mask, block_size=256)[0]  # noqa: E731
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes, *rest).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T * V * 4 / 4


def test_projected_refuses():
    with pytest.raises(ValueError, match="block_size must be None or positive, got 0"):
        projected_cross_entropy(*(jnp.asarray(a) for a in arrays()), block_size=0)
