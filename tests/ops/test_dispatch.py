"""Dispatch, experts and combine against a loop over assignments in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops.dispatch import (
    combine,
    dispatch,
    expert_mlp,
    group,
    limit_capacity,
    one_hot_combine,
    one_hot_dispatch,
    swiglu,
)
from research.ops.dispatch.capacity import expert_capacity
from research.ops.routing import Assignment
from tests.ops import moe_oracle

T, D, E, K, F = 24, 6, 5, 2, 4


def make_assignment(seed=0, load="uniform", *, weight_on="output", per_token=K):
    rng = np.random.default_rng(seed)
    expert_A = {
        "uniform": lambda: rng.integers(0, E, T * K),
        "with_none": lambda: rng.integers(0, E + 1, T * K),
        "one": lambda: np.full(T * K, 3),
        "none": lambda: np.full(T * K, E),
    }[load]()
    token_A = np.repeat(np.arange(T), K)
    if per_token is None:
        shuffled = rng.permutation(T * K)
        token_A, expert_A = token_A[shuffled], expert_A[shuffled]
    weight_A = np.where(expert_A < E, rng.uniform(0.2, 1.5, T * K), 0)
    zeros_TE = np.zeros((T, E))
    return Assignment(
        token_A.astype(np.int32), expert_A.astype(np.int32), weight_A, zeros_TE, zeros_TE, weight_on, per_token
    )


def arrays(seed=1):
    rng = np.random.default_rng(seed)
    shapes = ((T, D), (E, D, 2 * F), (E, F, D), (T, D))
    return [rng.normal(size=s) for s in shapes]


def fused(x_TD, w_EDN, w_EFD, groups, implementation=None):
    return expert_mlp(x_TD, w_EDN, w_EFD, groups, activation=swiglu, implementation=implementation)


def in_steps(x_TD, w_EDN, w_EFD, groups, implementation=None):
    h_MF = swiglu(groups.matmul(dispatch(x_TD, groups), w_EDN, implementation))
    return combine(groups.matmul(h_MF, w_EFD, implementation), groups)


@functools.partial(jax.jit, static_argnames=("path", "alignment", "capacity", "implementation"))
def forward_and_backward(
    assignment, x_TD, w_EDN, w_EFD, dy_TD, *, path=fused, alignment=None, capacity=None, implementation=None
):
    def function(x_TD, weight_A, w_EDN, w_EFD):
        groups = group(dataclasses.replace(assignment, weight_A=weight_A), alignment, capacity=capacity)
        return path(x_TD, w_EDN, w_EFD, groups, implementation)

    y_TD, pull = jax.vjp(function, x_TD, assignment.weight_A, w_EDN, w_EFD)
    return y_TD, *pull(dy_TD)


def check(assignment, **options):
    x_TD, w_EDN, w_EFD, dy_TD = arrays()
    expected = moe_oracle.experts(
        x_TD, assignment.token_A, assignment.expert_A, assignment.weight_A, w_EDN, w_EFD, dy_TD,
        weight_on=assignment.weight_on,
    )  # fmt: skip
    with jax.enable_x64(True):
        actual = forward_and_backward(assignment, x_TD, w_EDN, w_EFD, dy_TD, **options)
        for name, a, b in zip(("y", "dx", "dweight", "dw_in", "dw_out"), actual, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11, err_msg=f"{name} {options}")


@pytest.mark.parametrize("path", [fused, in_steps])
@pytest.mark.parametrize("load", ["uniform", "with_none", "one", "none"])
def test_equals_the_loop(path, load):
    check(make_assignment(load=load), path=path)


@pytest.mark.parametrize("path", [fused, in_steps])
@pytest.mark.parametrize(
    "options", [{"weight_on": "input"}, {"per_token": None}, {"weight_on": "input", "per_token": None}]
)
def test_input_weights_and_free_order(path, options):
    check(make_assignment(2, "with_none", **options), path=path)


@pytest.mark.parametrize(
    ("alignment", "implementation"), [(1, "tiled"), (4, "tiled"), (4, "ragged_dot"), (16, "dense")]
)
def test_alignment_and_implementation_change_nothing(alignment, implementation):
    check(make_assignment(3), alignment=alignment, implementation=implementation)


@pytest.mark.parametrize("by", ["position", "probability"])
def test_capacity_equals_the_loop_over_what_is_kept(by):
    assignment = make_assignment(4)
    with jax.enable_x64(True):
        limited, dropped = jax.jit(limit_capacity, static_argnums=1, static_argnames="by")(assignment, 6, by=by)
    limited = jax.tree.map(np.asarray, limited)
    assert dropped == (limited.expert_A == E).sum() > 0
    assert np.bincount(limited.expert_A, minlength=E + 1)[:E].max() == 6
    for expert in range(E):
        queue = np.flatnonzero(assignment.expert_A == expert)
        key = (queue % K) * T + queue // K if by == "position" else -assignment.weight_A[queue]
        kept = np.flatnonzero(limited.expert_A == expert)
        np.testing.assert_array_equal(kept, np.sort(queue[np.argsort(key, kind="stable")][:6]))
    check(limited)
    check(limited, capacity=6)


@pytest.mark.parametrize(
    ("weight_on", "capacity", "by"),
    [("output", T * K, "position"), ("input", 6, "position"), ("output", 6, "probability")],
)
def test_one_hot_reference(weight_on, capacity, by):
    """Dropless (capacity = A) and with dropping: the einsum definition gives the same values and gradients."""
    assignment = make_assignment(5, "with_none", weight_on=weight_on)
    *inputs, dy_TD = arrays()

    def reference(assignment, x_TD, w_EDN, w_EFD):
        x_ECD = one_hot_dispatch(x_TD, assignment, capacity, by=by)
        h_ECF = swiglu(jnp.einsum("ecd,edn->ecn", x_ECD, w_EDN))
        return one_hot_combine(jnp.einsum("ecf,efd->ecd", h_ECF, w_EFD), assignment, by=by)

    def sorted_rows(assignment, x_TD, w_EDN, w_EFD):
        return fused(x_TD, w_EDN, w_EFD, group(limit_capacity(assignment, capacity, by=by)[0]))

    @jax.jit
    def both(assignment, x_TD, w_EDN, w_EFD, dy_TD):
        def run(function):
            def weighted(weight_A, *a):
                return function(dataclasses.replace(assignment, weight_A=weight_A), *a)

            y_TD, pull = jax.vjp(weighted, assignment.weight_A, x_TD, w_EDN, w_EFD)
            return y_TD, *pull(dy_TD)

        return run(sorted_rows), run(reference)

    with jax.enable_x64(True):
        for a, b in zip(*both(assignment, *inputs, dy_TD), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_only_capacity_makes_a_token_depend_on_its_batch_mates():
    x_TD, w_EDN, w_EFD, _ = (jnp.asarray(a, jnp.float32) for a in arrays())
    crowded = jax.tree.map(jnp.asarray, make_assignment(load="one"))
    alone = dataclasses.replace(crowded, expert_A=jnp.where(crowded.token_A == T - 1, crowded.expert_A, 0))

    @functools.partial(jax.jit, static_argnames="capacity")
    def last(assignment, capacity):
        limited = limit_capacity(assignment, capacity)[0] if capacity else assignment
        return fused(x_TD, w_EDN, w_EFD, group(limited))[-1]

    np.testing.assert_allclose(last(crowded, None), last(alone, None), rtol=1e-5)
    assert not last(crowded, 4).any() and last(alone, 4).any()


def test_padding_tokens_may_hold_anything():
    assignment = make_assignment(6)
    assignment = dataclasses.replace(assignment, expert_A=np.where(assignment.token_A < 4, E, assignment.expert_A))
    x_TD, w_EDN, w_EFD, dy_TD = (a.astype(np.float32) for a in arrays())
    clean = forward_and_backward(assignment, x_TD, w_EDN, w_EFD, dy_TD)
    x_TD[:4] = np.nan
    for a, b in zip(forward_and_backward(assignment, x_TD, w_EDN, w_EFD, dy_TD), clean, strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16():
    assignment = make_assignment(7)
    x_TD, w_EDN, w_EFD, dy_TD = arrays()
    expected = moe_oracle.experts(
        x_TD, assignment.token_A, assignment.expert_A, assignment.weight_A, w_EDN, w_EFD, dy_TD
    )
    assignment = dataclasses.replace(assignment, weight_A=assignment.weight_A.astype(np.float32))
    actual = forward_and_backward(assignment, *(jnp.asarray(a, jnp.bfloat16) for a in (x_TD, w_EDN, w_EFD, dy_TD)))
    assert actual[0].dtype == jnp.bfloat16 and actual[2].dtype == jnp.float32
    for a, b in zip(actual, expected, strict=True):
        assert np.sqrt(np.mean((np.asarray(a, np.float64) - b) ** 2) / np.mean(b**2)) < 2e-2


def test_gathers_only():
    """Neither direction scatters rows: the only scatters are the integer inverse and the sums over tiles."""
    assignment = jax.tree.map(jnp.asarray, make_assignment())
    arguments = [jnp.asarray(a, jnp.float32) for a in arrays()]
    jaxpr = str(jax.make_jaxpr(functools.partial(forward_and_backward, implementation="ragged_dot"))(
        dataclasses.replace(assignment, weight_A=assignment.weight_A.astype(jnp.float32)), *arguments
    ))  # fmt: skip
    assert not [line for line in jaxpr.splitlines() if "scatter" in line and f",{D}]" in line]


def test_refusals():
    assignment = jax.tree.map(jnp.asarray, make_assignment())
    with pytest.raises(ValueError, match="alignment is 0"):
        group(assignment, 0)
    with pytest.raises(ValueError, match="capacity is 4"):
        group(assignment, 8, capacity=4)
    with pytest.raises(ValueError, match="capacity is 0"):
        limit_capacity(assignment, 0)
    with pytest.raises(ValueError, match="by is 'luck'"):
        limit_capacity(assignment, 4, by="luck")
    assert expert_capacity(48, 5, 1.25) == 12 and expert_capacity(1, 8, 1.0) == 1
