"""The TPU kernels of the grouped product, interpreted on CPU, through the op: y, dx and dw against a float64 loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import tpu
from research.ops.grouped_matmul import grouped_matmul
from tests.ops import moe_oracle
from tests.ops.test_grouped_matmul import arrays

KERNEL = "pallas_tpu_interpret"


@jax.jit
def run(x_MK, w_EKN, sizes_E, dy_MN):
    y_MN, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_E, implementation=KERNEL), x_MK, w_EKN)
    return y_MN, *pull(dy_MN)


def check(x_MK, w_EKN, sizes, dy_MN, *, run=run, bound=1e-6):
    """Rows past the sum are NaN on the way in, and zero on the way out."""
    live = sum(sizes)
    poisoned = [np.array(a, np.float32) for a in (x_MK, w_EKN, dy_MN)]
    exact = [a.astype(np.float64) for a in poisoned]
    want = moe_oracle.grouped_matmul(*exact[:2], sizes, exact[2])
    poisoned[0][live:], poisoned[2][live:] = np.nan, np.nan
    got = run(*poisoned[:2], np.array(sizes, np.int32), poisoned[2])
    for name, a, b in zip(("y", "dx", "dw"), got, want, strict=True):
        scale = np.sqrt(np.mean(np.square(b))) + 1e-9
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=20 * bound * scale, err_msg=str(name))
        assert np.sqrt(np.mean(np.square(np.asarray(a, np.float64) - b))) <= bound * scale, (name, sizes)
    assert not np.any(got[0][live:]) and not np.any(got[1][live:])


@pytest.mark.parametrize(
    "sizes", [(130, 0, 100, 20), (300, 0, 0, 0), (0, 0, 0, 300), (0, 0, 0, 0), (1, 2, 126, 171), (0, 127, 1, 128)]
)
def test_equals_the_loop(sizes):
    """Three tiles, the last of them short: shared, empty and whole groups, and rows of none."""
    check(*arrays(0, 300, 4)[:2], sizes, arrays(0, 300, 4)[2])


def test_random_groups_smaller_than_a_tile():
    r = np.random.default_rng(1)
    for _ in range(8):
        edges = np.sort(r.integers(0, 300, 8))
        sizes = tuple(int(n) for n in np.diff(edges, prepend=0))
        check(*arrays(1, 300, 8, 3, 2)[:2], sizes, arrays(1, 300, 8, 3, 2)[2])


def test_blocks_of_columns(monkeypatch):
    """Several blocks of both widths, the last of them short."""
    monkeypatch.setattr(tpu, "_product_tiles", lambda *_: (32, 128))
    monkeypatch.setattr(tpu, "_outer_tiles", lambda *_: (32, 128, 128))
    x_MK, w_EKN, dy_MN = arrays(2, 70, 3, 130, 200)
    check(x_MK, w_EKN, (20, 30, 10), dy_MN, run=jax.jit(run.__wrapped__))


def test_bfloat16_accumulates_in_float32():
    x_MK, w_EKN, dy_MN = (jnp.asarray(a, jnp.bfloat16) for a in arrays(3, 40, 2))
    got = run(x_MK, w_EKN, jnp.array([25, 15]), dy_MN)
    exact = [np.asarray(a, np.float64) for a in (x_MK, w_EKN, dy_MN)]
    for a, b in zip(got, moe_oracle.grouped_matmul(*exact[:2], (25, 15), exact[2]), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=4e-3, atol=1e-3)


def test_vmap():
    x_MK, w_EKN, _ = (jnp.asarray(a, jnp.float32) for a in arrays(5, 24, 3))
    sizes_BE = jnp.array([[8, 8, 8], [0, 20, 1]])
    one = functools.partial(grouped_matmul, implementation=KERNEL)
    y_BMN = jax.jit(jax.vmap(one, (None, None, 0)))(x_MK, w_EKN, sizes_BE)
    for y_MN, sizes_E in zip(y_BMN, sizes_BE, strict=True):
        want, _, _ = moe_oracle.grouped_matmul(*(np.asarray(a) for a in (x_MK, w_EKN, sizes_E)), np.zeros((24, 5)))
        np.testing.assert_allclose(y_MN, want, atol=1e-5)


def test_refusals():
    w_EKN, sizes_E = jnp.zeros((2, 2, 2)), jnp.array([2, 2])
    with pytest.raises(NotImplementedError, match="takes float32 and bfloat16, got float16"):
        grouped_matmul(jnp.zeros((4, 2), jnp.float16), w_EKN, sizes_E, implementation=KERNEL)
    wide = jax.ShapeDtypeStruct((4, 1 << 20), jnp.float32), jax.ShapeDtypeStruct((2, 1 << 20, 2), jnp.float32)
    with pytest.raises(NotImplementedError, match="blocks end at about"):
        jax.eval_shape(functools.partial(grouped_matmul, implementation=KERNEL), *wide, sizes_E)
