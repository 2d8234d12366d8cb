"""Products with their activation, interpreted on CPU, against the definition in float64; the whole expert MLP over them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.dispatch import expert_mlp, group, swiglu
from research.ops.grouped_matmul.activated import activated_product, activated_transposed
from research.ops.routing import Assignment
from tests.ops import moe_oracle

M, D, F, E = 384, 24, 128, 3  # three tiles of 128 rows
KERNEL = "pallas_tpu_interpret"


def gated(h, weight):
    return swiglu(h) * weight


def squared(h, weight):
    return jnp.square(jax.nn.relu(h * weight))


@functools.partial(jax.jit, static_argnums=(0, 1))
def both(activation, implementation, x_MD, w_EDN, w_EFD, weight_M, sizes_E, dy_MD):
    options = {"activation": activation, "alignment": 1, "implementation": implementation}
    a_MF, h_MN = activated_product(x_MD, w_EDN, weight_M, sizes_E, **options, keep=True)
    return a_MF, h_MN, *activated_transposed(dy_MD, w_EFD, h_MN, weight_M, sizes_E, **options)


def arrays(width, live):
    r = np.random.default_rng(0)
    x_MD, dy_MD = (r.standard_normal((M, D)) * (np.arange(M) < live)[:, None] for _ in range(2))
    return x_MD, r.standard_normal((E, D, width)), r.standard_normal((E, F, D)), r.uniform(0.2, 1.5, M), dy_MD


def check(got, want, bound):
    for name, a, b in zip(("a", "h", "dh", "a again", "dweight"), got, want, strict=True):
        error = np.asarray(a, np.float64) - b
        assert np.sqrt((error**2).mean()) <= bound * np.sqrt((b**2).mean()) + 1e-12, name


@pytest.mark.parametrize(
    ("activation", "width", "dtype", "bound"),
    [
        (gated, 2 * F, jnp.float32, 1e-6),
        pytest.param(squared, F, jnp.bfloat16, 8e-3, marks=pytest.mark.slow),
    ],
)
def test_equals_the_definition(activation, width, dtype, bound):
    for sizes in ((130, 0, 120), (0, 384, 0), (1, 100, 3)):
        *x, dy_MD = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in arrays(width, sum(sizes)))
        with jax.enable_x64(True):
            want = both(activation, "dense", *x, np.array(sizes, np.int32), dy_MD)
            want = [np.asarray(a) for a in want]
        low = [jnp.asarray(a, jnp.float32 if a.ndim == 1 else dtype) for a in (*x, dy_MD)]
        check(both(activation, KERNEL, *low[:4], jnp.array(sizes, jnp.int32), low[4]), want, bound)


@pytest.mark.slow
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_expert_mlp(weight_on):
    """Values and every gradient of experts over the kernels, against a loop in float64."""
    T, K = 64, 2
    r = np.random.default_rng(1)
    shapes = (T, D), (E, D, 2 * F), (E, F, D), (T, D), (T * K,)
    x_TD, w_EDN, w_EFD, dy_TD, weight_A = (jnp.asarray(r.standard_normal(shape), jnp.float32) for shape in shapes)
    expert_A, token_A = r.integers(0, E + 1, T * K, dtype=np.int32), np.repeat(np.arange(T, dtype=np.int32), K)
    weight_A = jnp.where(expert_A < E, weight_A, 0)
    zeros_TE = np.zeros((T, E), np.float32)
    assignment = Assignment(*map(jnp.asarray, (token_A, expert_A, weight_A, zeros_TE, zeros_TE)), weight_on, K)

    @jax.jit
    def run(x_TD, weight_A, w_EDN, w_EFD):
        def function(x_TD, weight_A, w_EDN, w_EFD):
            groups = group(dataclasses.replace(assignment, weight_A=weight_A))
            return expert_mlp(x_TD, w_EDN, w_EFD, groups, activation=swiglu, implementation=KERNEL)

        y_TD, pull = jax.vjp(function, x_TD, weight_A, w_EDN, w_EFD)
        return y_TD, *pull(dy_TD)

    exact = [np.asarray(a, np.float64) for a in (weight_A, w_EDN, w_EFD, dy_TD)]
    want = moe_oracle.experts(np.asarray(x_TD, np.float64), token_A, expert_A, *exact, weight_on=weight_on)
    for name, a, b in zip(
        ("y", "dx", "dweight", "dw_in", "dw_out"), run(x_TD, weight_A, w_EDN, w_EFD), want, strict=True
    ):
        if name == "dweight":  # of an assignment without an expert the oracle has none
            a, b = (np.where(expert_A < E, g, 0) for g in (a, b))
        error = np.asarray(a, np.float64) - b
        assert np.sqrt((error**2).mean()) <= 1e-6 * np.sqrt((b**2).mean()), name
