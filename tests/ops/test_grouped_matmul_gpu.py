"""The GPU kernels of the grouped product, interpreted on CPU, through the op: y, dx and dw against a float64 loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import gpu
from research.ops.grouped_matmul import grouped_matmul
from tests.ops import moe_oracle
from tests.ops.test_grouped_matmul import arrays

KERNEL = "pallas_gpu_interpret"


@pytest.fixture(autouse=True)
def few_idle_blocks(monkeypatch):
    monkeypatch.setattr(gpu, "_NEIGHBOURS", 2)


@jax.jit
def run(x_MK, w_EKN, sizes_E, dy_MN):
    y_MN, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_E, implementation=KERNEL), x_MK, w_EKN)
    return y_MN, *pull(dy_MN)


def check(x_MK, w_EKN, sizes, dy_MN):
    """bfloat16's rounding of each result and no more; rows past the sum are NaN on the way in, and zero on the way out."""
    live = sum(sizes)
    inputs = [np.array(jnp.asarray(a, jnp.bfloat16)) for a in (x_MK, w_EKN, dy_MN)]
    exact = [a.astype(np.float64) for a in inputs]
    want = moe_oracle.grouped_matmul(*exact[:2], sizes, exact[2])
    inputs[0][live:], inputs[2][live:] = np.nan, np.nan
    got = run(*inputs[:2], np.array(sizes, np.int32), inputs[2])
    for name, a, b in zip(("y", "dx", "dw"), got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8, atol=1e-4, err_msg=f"{name} {sizes}")
    assert not np.any(got[0][live:]) and not np.any(got[1][live:])


def test_equals_the_loop():
    """A whole tile of two warpgroups' rows, parts of tiles of every size of copy, an empty group and rows of none."""
    x_MK, w_EKN, dy_MN = arrays(0, 140, 2, 64, 64)
    check(x_MK, w_EKN, (131, 5), dy_MN)


@pytest.mark.slow
def test_any_load():
    """One warpgroup's rows in a tile, two in one of dw: blocks of columns, several steps, empty and long groups."""
    x_MK, w_EKN, dy_MN = arrays(1, 150, 3, 128, 192)
    for sizes in [(0, 127, 0), (64, 1, 85)]:
        check(x_MK, w_EKN, sizes, dy_MN)


@pytest.mark.slow
def test_vmap_and_fewer_rows_than_a_tile():
    x_MK, w_EKN, _ = (jnp.asarray(a, jnp.bfloat16) for a in arrays(5, 24, 3, 64, 64))
    sizes_BE = jnp.array([[8, 8, 8], [0, 20, 1]])
    one = functools.partial(grouped_matmul, implementation=KERNEL)
    y_BMN = jax.jit(jax.vmap(one, (None, None, 0)))(x_MK, w_EKN, sizes_BE)
    exact = [np.asarray(a, np.float64) for a in (x_MK, w_EKN)]
    for y_MN, sizes_E in zip(y_BMN, sizes_BE, strict=True):
        want, _, _ = moe_oracle.grouped_matmul(*exact, np.asarray(sizes_E), np.zeros((24, 64)))
        np.testing.assert_allclose(np.asarray(y_MN, np.float64), want, rtol=2**-8, atol=1e-4)


def test_refusals():
    sizes_E = jnp.array([2, 2])
    run = functools.partial(grouped_matmul, group_sizes_E=sizes_E, implementation="pallas_gpu")
    with pytest.raises(NotImplementedError, match="GPU kernel cannot serve this call: it takes bfloat16, got float32"):
        run(jnp.zeros((4, 64)), jnp.zeros((2, 64, 64)))
    with pytest.raises(NotImplementedError, match=r"widths that are multiples of 64, got \[64, 96\]"):
        run(jnp.zeros((4, 64), jnp.bfloat16), jnp.zeros((2, 64, 96)))
