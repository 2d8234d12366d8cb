"""The whole expert MLP between router and residual stream, as one differentiable step."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.axes import Array, Float
from research.ops.dispatch.groups import Groups, combine, dispatch, gather_sum, spread, zero_groups
from research.ops.grouped_matmul import check_implementation, clean_leg
from research.ops.grouped_matmul.activated import activated_product, activated_transposed
from research.ops.kept import keepable


def expert_mlp(
    x_TD: Float[Array, "T D"],
    w_EDN: Float[Array, "E D N"],
    w_EFD: Float[Array, "E F O"],
    groups: Groups,
    *,
    activation: Callable[[Array], Array],
    b_EN: Float[Array, "E N"] | None = None,
    b_EO: Float[Array, "E O"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "T O"]:
    """``combine(activation(dispatch(x) @ w_EDN) @ w_EFD)`` with the memory traffic of both ends taken out.

    Kept for the backward pass: x_TD (not its K copies) and the hidden rows before the activation; the rest is computed
    again, which costs less than writing and reading it. On TPU the activation and its gradient belong to the products' kernels
    (`activated_product`). Weights act on the hidden rows: both products are linear, and
    the gradient of a weight is then a sum over F, with nothing of the model's width to keep (SonicMoE,
    arXiv 2512.14080).

    Args:
      x_TD: tokens.
      w_EDN: into the hidden width; N = 2F for gated activations, gate first.
      w_EFD: out of it.
      groups: from `group`.
      activation: a pure function of rows [..., N] -> [..., F], such as `swiglu`; zero of zero, with a finite gradient there.
        Each of its F columns comes from the same column of its halves (or of h), for kernels see some columns at a time.
        Compared by identity: pass the same function every time.
      b_EN, b_EO: biases after the first and the second matrix. With either the steps are taken one by one.
      implementation: of `grouped_matmul`.

    Raises:
      ValueError, NotImplementedError: as `grouped_matmul`.
    """
    check_implementation(implementation)
    weights = (w_EDN.astype(x_TD.dtype), w_EFD.astype(x_TD.dtype))
    if b_EN is not None or b_EO is not None:
        add_in, add_out = (_bias_rows(b, groups, x_TD.dtype) for b in (b_EN, b_EO))
        h_MN = keepable(groups.matmul(dispatch(x_TD, groups), weights[0], implementation) + add_in, "experts")
        y_MO = groups.matmul(activation(h_MN), weights[1], implementation) + add_out
        return keepable(combine(keepable(y_MO, "experts"), groups), "experts")
    return _expert_mlp(x_TD, *weights, groups.weight_M, groups, activation, implementation)


def swiglu(h: Float[Array, "*B N"]) -> Float[Array, "*B F"]:
    """silu(gate)·up of rows that hold the gate first (Shazeer 2020)."""
    gate, up = jnp.split(h, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _bias_rows(b_EN, groups, dtype):
    """Each row's bias; what padding rows get is multiplied by their weight, zero, in the end."""
    if b_EN is None:
        return jnp.zeros((), dtype)
    rows = groups.token_M.shape[0]
    expert_M = jnp.searchsorted(jnp.cumsum(groups.sizes_E), jnp.arange(rows), side="right", method="compare_all")
    return b_EN.astype(dtype).at[expert_M].get(mode="fill", fill_value=0)


def _leg(leg, a, b, groups, implementation):
    return clean_leg(leg, a, b, groups.sizes_E, alignment=groups.alignment, implementation=implementation)


@functools.cache
def _weighted(activation, weight_on):
    """The activation and the rows' weights in one; the same object for the same arguments."""
    if weight_on == "input":
        return lambda h, weight: activation(h * weight)
    return lambda h, weight: activation(h) * weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _expert_mlp(*arguments):
    return _run(*arguments, keep=False)[0]


def _run(x_TD, w_EDN, w_EFD, weight_M, groups, activation, implementation, *, keep):
    a_MF, h_MN = activated_product(
        spread(x_TD, groups), w_EDN, weight_M, groups.sizes_E, **_options(groups, activation, implementation), keep=keep
    )
    h_MN = keepable(h_MN, "experts")
    y_TO = keepable(gather_sum(_leg("product", a_MF, w_EFD, groups, implementation), groups), "experts")
    return y_TO, h_MN


def _options(groups, activation, implementation):
    weighted = _weighted(activation, groups.weight_on)
    return {"activation": weighted, "alignment": groups.alignment, "implementation": implementation}


def _expert_mlp_forward(x_TD, w_EDN, w_EFD, weight_M, groups, activation, implementation):
    y_TO, h_MN = _run(x_TD, w_EDN, w_EFD, weight_M, groups, activation, implementation, keep=True)
    return y_TO, (x_TD, w_EDN, w_EFD, weight_M, groups, h_MN)


def _expert_mlp_backward(activation, implementation, residuals, dy_TO):
    x_TD, w_EDN, w_EFD, weight_M, groups, h_MN = residuals
    dy_MO = spread(dy_TO, groups)
    dh_MN, a_MF, dweight_M = activated_transposed(
        dy_MO, w_EFD, h_MN, weight_M, groups.sizes_E, **_options(groups, activation, implementation)
    )
    dw_EFD = _leg("outer", a_MF, dy_MO, groups, implementation)
    dx_TD = gather_sum(_leg("transposed", dh_MN, w_EDN, groups, implementation), groups)
    dw_EDN = _leg("outer", spread(x_TD, groups), dh_MN, groups, implementation)
    return dx_TD, dw_EDN, dw_EFD, dweight_M, zero_groups(groups)


_expert_mlp.defvjp(_expert_mlp_forward, _expert_mlp_backward)
