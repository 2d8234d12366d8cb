"""Rows to their experts and back.

``group`` sorts an `Assignment` by expert into rows that suit `grouped_matmul`: every expert's rows are padded to a
multiple of `alignment`, so that the matrix products between `dispatch` and `combine` share one tile layout and gather
nothing. Both directions are gathers, forwards and backwards: the transpose of a permutation gather is the gather by
its inverse, never a scatter-add. Dropless: every assignment has a row under any load.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from research.axes import Array, Float, Int
from research.ops.grouped_matmul import aligned_rows, check_implementation, clean_leg, grouped_matmul, tile_rows
from research.ops.routing.assignment import Assignment


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("sizes_E", "token_M", "assignment_M", "row_A", "token_A", "weight_M", "weight_A"),
    meta_fields=("tokens", "alignment", "weight_on", "per_token"),
)
@dataclasses.dataclass(frozen=True)
class Groups:
    """Rows sorted by expert.

    Attributes:
      sizes_E: rows of each expert, padding rows included: multiples of `alignment`.
      token_M: token of each row; T at padding rows.
      assignment_M: assignment of each row; A at padding rows.
      row_A: row of each assignment; M where its expert is none.
      token_A: token of each assignment.
      weight_M, weight_A: weights in both orders; zero at padding.
      tokens: T. alignment, weight_on, per_token: static, see `group` and `Assignment`.
    """

    sizes_E: Int[Array, "E"]
    token_M: Int[Array, "M"]
    assignment_M: Int[Array, "M"]
    row_A: Int[Array, "A"]
    token_A: Int[Array, "A"]
    weight_M: Float[Array, "M"]
    weight_A: Float[Array, "A"]
    tokens: int
    alignment: int
    weight_on: str
    per_token: int | None

    def matmul(self, x_MK: Float[Array, "M K"], w_EKN: Float[Array, "E K N"], implementation: str | None = None):
        """`grouped_matmul` over these rows."""
        return grouped_matmul(x_MK, w_EKN, self.sizes_E, alignment=self.alignment, implementation=implementation)


def _sort_by_expert(expert_A, experts):
    """Assignments in order of expert, first come first. One packed key sorts faster than key and value."""
    count = expert_A.shape[0]
    if (experts + 1) * count < 2**31:
        return jnp.sort(expert_A * count + jnp.arange(count, dtype=jnp.int32)) % count
    return jnp.argsort(expert_A, stable=True).astype(jnp.int32)


def group(assignment: Assignment, alignment: int | None = None) -> Groups:
    """Sorts assignments by expert into rows, each expert's padded to a multiple of `alignment`.

    alignment None chooses a tile that suits the mean group. The number of rows M is static: the worst case over all
    loads, A + E·(alignment − 1) rounded down to a multiple.
    """
    count, experts = assignment.expert_A.shape[0], assignment.experts
    alignment = tile_rows(count, experts) if alignment is None else alignment
    if alignment < 1:
        raise ValueError(f"alignment is {alignment}, it must be at least 1")
    rows = aligned_rows(count, experts, alignment)
    order_A = _sort_by_expert(assignment.expert_A, experts)
    counts_E = assignment.counts_E()
    sizes_E = -(-counts_E // alignment) * alignment
    first_E, start_E = jnp.cumsum(sizes_E) - sizes_E, jnp.cumsum(counts_E) - counts_E
    # Per tile first: rows of one tile share their expert.
    tiles = rows // alignment
    expert_I = jnp.searchsorted(first_E + sizes_E, jnp.arange(tiles) * alignment, side="right", method="compare_all")
    safe_I = jnp.minimum(expert_I, experts - 1)
    index_IC = (jnp.arange(tiles) * alignment - first_E[safe_I])[:, None] + jnp.arange(alignment)
    filled_IC = (index_IC < counts_E[safe_I][:, None]) & (expert_I < experts)[:, None]
    filled_M = filled_IC.reshape(-1)
    place_M = (index_IC + start_E[safe_I][:, None]).reshape(-1)
    assignment_M = jnp.where(filled_M, order_A[jnp.where(filled_M, place_M, 0)], count)
    row_A = jnp.full(count, rows, jnp.int32)
    row_A = row_A.at[assignment_M].set(jnp.arange(rows, dtype=jnp.int32), mode="drop", unique_indices=True)
    return Groups(
        sizes_E=sizes_E,
        token_M=assignment.token_A.at[assignment_M].get(mode="fill", fill_value=assignment.tokens),
        assignment_M=assignment_M,
        row_A=row_A,
        token_A=assignment.token_A,
        weight_M=_permute(assignment.weight_A, assignment_M, row_A),
        weight_A=assignment.weight_A,
        tokens=assignment.tokens,
        alignment=alignment,
        weight_on=assignment.weight_on,
        per_token=assignment.per_token,
    )


def _take(x, index):
    """Rows of x; zero where the index lies outside."""
    return x.at[index].get(mode="fill", fill_value=0)


def _no_gradient(index):
    return np.zeros(index.shape, jax.dtypes.float0)


@jax.custom_vjp
def _permute(x_A, assignment_M, row_A):
    """x_A in row order. The transpose is the gather by the inverse."""
    return _take(x_A, assignment_M)


def _permute_forward(x_A, assignment_M, row_A):
    return _take(x_A, assignment_M), (assignment_M, row_A)


def _permute_backward(residuals, dx_M):
    assignment_M, row_A = residuals
    return _take(dx_M, row_A), _no_gradient(assignment_M), _no_gradient(row_A)


_permute.defvjp(_permute_forward, _permute_backward)


def _spread(x_TD, groups):
    return _take(x_TD, groups.token_M)


def _gather_sum(y_MD, groups):
    """Sum of each token's rows, [T, D]."""
    if groups.per_token is None:
        return jnp.zeros((groups.tokens, y_MD.shape[1]), y_MD.dtype).at[groups.token_M].add(y_MD, mode="drop")
    row_TK = groups.row_A.reshape(groups.tokens, groups.per_token)
    wide = jnp.promote_types(y_MD.dtype, jnp.float32)
    # One gather a choice, added up as they are read: no [T, K, D] array.
    parts = [_take(y_MD, row_TK[:, k]).astype(wide) for k in range(groups.per_token)]
    return functools.reduce(jnp.add, parts).astype(y_MD.dtype)


def _zero_groups(groups):
    return jax.tree.map(
        lambda a: jnp.zeros_like(a) if jnp.issubdtype(a.dtype, jnp.floating) else _no_gradient(a), groups
    )


@jax.custom_vjp
def _dispatch(x_TD, groups):
    return _spread(x_TD, groups)


_dispatch.defvjp(
    lambda x_TD, groups: (_spread(x_TD, groups), groups),
    lambda groups, dx_MD: (_gather_sum(dx_MD, groups), _zero_groups(groups)),
)


@jax.custom_vjp
def _combine(y_MD, groups):
    return _gather_sum(y_MD, groups)


_combine.defvjp(
    lambda y_MD, groups: (_gather_sum(y_MD, groups), groups),
    lambda groups, dy_TD: (_spread(dy_TD, groups), _zero_groups(groups)),
)


def dispatch(x_TD: Float[Array, "T D"], groups: Groups) -> Float[Array, "M D"]:
    """Rows for the experts: ``x[token_M]``, zero at padding rows; weighted here if the weights are on the input."""
    x_MD = _dispatch(x_TD, groups)
    return x_MD * groups.weight_M[:, None].astype(x_MD.dtype) if groups.weight_on == "input" else x_MD


def combine(y_MD: Float[Array, "M D"], groups: Groups, *, weighted: bool = False) -> Float[Array, "T D"]:
    """Each token's sum over its rows, times their weights if the weights are on the output.

    weighted: the rows carry their weights already. An expert whose last step is a matrix product without a bias may
    multiply its hidden rows by ``groups.weight_M`` instead: the same function, and the gradient of the weight is then
    a sum over the hidden width, with nothing of the model's width to keep.
    """
    if groups.weight_on == "output" and not weighted:
        y_MD = y_MD * groups.weight_M[:, None].astype(y_MD.dtype)
    return _combine(y_MD, groups)


def expert_mlp(
    x_TD: Float[Array, "T D"],
    w_EDN: Float[Array, "E D N"],
    w_EFD: Float[Array, "E F O"],
    groups: Groups,
    *,
    activation: Callable[[Array], Array],
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
        pass the same function every time. Experts with biases use `dispatch`, `Groups.matmul` and `combine`.
      implementation: of `grouped_matmul`.

    Raises:
      ValueError, NotImplementedError: as `grouped_matmul`.
    """
    check_implementation(implementation)
    weights = (w_EDN.astype(x_TD.dtype), w_EFD.astype(x_TD.dtype))
    return _expert_mlp(x_TD, *weights, groups.weight_M, groups, activation, implementation)


def swiglu(h: Float[Array, "*B N"]) -> Float[Array, "*B F"]:
    """silu(gate)·up of rows that hold the gate first (Shazeer 2020)."""
    gate, up = jnp.split(h, 2, axis=-1)
    return jax.nn.silu(gate) * up


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
    h_MN = checkpoint_name(_leg("product", _spread(x_TD, groups), w_EDN, groups, implementation), "expert_hidden")
    a_MF = _weighted_activation(h_MN, weight_M, groups, activation)
    y_TO = _gather_sum(_leg("product", a_MF, w_EFD, groups, implementation), groups)
    return y_TO, (x_TD, w_EDN, w_EFD, weight_M, groups, h_MN)


def _expert_mlp_backward(activation, implementation, residuals, dy_TO):
    x_TD, w_EDN, w_EFD, weight_M, groups, h_MN = residuals
    dy_MO = _spread(dy_TO, groups)
    again = functools.partial(_weighted_activation, groups=groups, activation=activation)
    a_MF, pull = jax.vjp(again, h_MN, weight_M)
    dw_EFD = _leg("outer", a_MF, dy_MO, groups, implementation)
    dh_MN, dweight_M = pull(_leg("transposed", dy_MO, w_EFD, groups, implementation))
    dx_TD = _gather_sum(_leg("transposed", dh_MN, w_EDN, groups, implementation), groups)
    dw_EDN = _leg("outer", _spread(x_TD, groups), dh_MN, groups, implementation)
    return dx_TD, dw_EDN, dw_EFD, dweight_M, _zero_groups(groups)


_expert_mlp.defvjp(_expert_mlp_forward, _expert_mlp_backward)
