"""The whole expert MLP between router and residual stream, as one differentiable step."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.axes import Array, Float
from research.ops.dispatch.groups import Groups, combine, dispatch, gather_sum, spread, zero_groups
from research.ops.grouped_matmul import check_implementation, clean_leg
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
    again, which costs less than writing and reading it. Weights act on the hidden rows: both products are linear, and
    the gradient of a weight is then a sum over F, with nothing of the model's width to keep (SonicMoE,
    arXiv 2512.14080).

    Args:
      x_TD: tokens.
      w_EDN: into the hidden width; N = 2F for gated activations, gate first.
      w_EFD: out of it.
      groups: from `group`.
      activation: a pure function of rows [..., N] -> [..., F], such as `swiglu`; finite at zero. Compared by identity:
        pass the same function every time.
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


def _weighted_activation(h_MN, weight_M, groups, activation):
    wide = jnp.promote_types(h_MN.dtype, weight_M.dtype)
    h, weight_M1 = h_MN.astype(wide), weight_M[:, None].astype(wide)
    a = activation(h * weight_M1) if groups.weight_on == "input" else activation(h) * weight_M1
    return a.astype(h_MN.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _expert_mlp(*arguments):
    return _expert_mlp_forward(*arguments)[0]


def _expert_mlp_forward(x_TD, w_EDN, w_EFD, weight_M, groups, activation, implementation):
    h_MN = keepable(_leg("product", spread(x_TD, groups), w_EDN, groups, implementation), "experts")
    a_MF = _weighted_activation(h_MN, weight_M, groups, activation)
    y_TO = keepable(gather_sum(_leg("product", a_MF, w_EFD, groups, implementation), groups), "experts")
    return y_TO, (x_TD, w_EDN, w_EFD, weight_M, groups, h_MN)


def _expert_mlp_backward(activation, implementation, residuals, dy_TO):
    x_TD, w_EDN, w_EFD, weight_M, groups, h_MN = residuals
    dy_MO = spread(dy_TO, groups)
    again = functools.partial(_weighted_activation, groups=groups, activation=activation)
    a_MF, pull = jax.vjp(again, h_MN, weight_M)
    dw_EFD = _leg("outer", a_MF, dy_MO, groups, implementation)
    dh_MN, dweight_M = pull(_leg("transposed", dy_MO, w_EFD, groups, implementation))
    dx_TD = gather_sum(_leg("transposed", dh_MN, w_EDN, groups, implementation), groups)
    dw_EDN = _leg("outer", spread(x_TD, groups), dh_MN, groups, implementation)
    return dx_TD, dw_EDN, dw_EFD, dweight_M, zero_groups(groups)


_expert_mlp.defvjp(_expert_mlp_forward, _expert_mlp_backward)
