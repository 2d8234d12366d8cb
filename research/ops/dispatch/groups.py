"""Rows to their experts and back.

``group`` sorts an `Assignment` by expert into rows that suit `grouped_matmul`: every expert's rows are padded to a
multiple of `alignment`, so that the matrix products between `dispatch` and `combine` share one tile layout and gather
nothing. Both directions are gathers, forwards and backwards: the transpose of a permutation gather is the gather by
its inverse, never a scatter-add. Dropless: every assignment has a row under any load.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from research.axes import Array, Float, Int
from research.ops.grouped_matmul import aligned_rows, grouped_matmul, tile_rows
from research.ops.routing.assignment import Assignment


@typing.no_type_check  # jax rebuilds the class around things that are not arrays: specs, cotangents, sentinels
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


def group(assignment: Assignment, alignment: int | None = None, *, capacity: int | None = None) -> Groups:
    """Sorts assignments by expert into rows, each expert's padded to a multiple of `alignment`.

    alignment None chooses a tile that suits the mean group. The number of rows M is static: the worst case over all
    loads, A + E·(alignment − 1) rounded down to a multiple.

    capacity: every expert has exactly that many rows, M = E·capacity, whatever its load; an expert with more
    assignments than that loses the last ones. Give it what `limit_capacity` returned for the same capacity, which
    decides and counts what is dropped.
    """
    if capacity is not None:
        if capacity < 1 or alignment not in (None, capacity):
            raise ValueError(
                f"capacity is {capacity}, it must be at least 1, and alignment is then not yours to choose"
            )
        alignment = capacity
    count, experts = assignment.expert_A.shape[0], assignment.experts
    alignment = tile_rows(count, experts) if alignment is None else alignment
    if alignment < 1:
        raise ValueError(f"alignment is {alignment}, it must be at least 1")
    rows = aligned_rows(count, experts, alignment) if capacity is None else experts * capacity
    order_A = _sort_by_expert(assignment.expert_A, experts)
    counts_E = assignment.counts_E()
    sizes_E = -(-counts_E // alignment) * alignment if capacity is None else jnp.full(experts, capacity, jnp.int32)
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


def spread(x_TD, groups):
    return _take(x_TD, groups.token_M)


def gather_sum(y_MD, groups):
    """Sum of each token's rows, [T, D]."""
    if groups.per_token is None:
        return jnp.zeros((groups.tokens, y_MD.shape[1]), y_MD.dtype).at[groups.token_M].add(y_MD, mode="drop")
    row_TK = groups.row_A.reshape(groups.tokens, groups.per_token)
    wide = jnp.promote_types(y_MD.dtype, jnp.float32)
    # One gather a choice, added up as they are read: no [T, K, D] array.
    parts = [_take(y_MD, row_TK[:, k]).astype(wide) for k in range(groups.per_token)]
    return functools.reduce(jnp.add, parts).astype(y_MD.dtype)


def zero_groups(groups):
    return jax.tree.map(
        lambda a: jnp.zeros_like(a) if jnp.issubdtype(a.dtype, jnp.floating) else _no_gradient(a), groups
    )


@jax.custom_vjp
def _dispatch(x_TD, groups):
    return spread(x_TD, groups)


_dispatch.defvjp(
    lambda x_TD, groups: (spread(x_TD, groups), groups),
    lambda groups, dx_MD: (gather_sum(dx_MD, groups), zero_groups(groups)),
)


@jax.custom_vjp
def _combine(y_MD, groups):
    return gather_sum(y_MD, groups)


_combine.defvjp(
    lambda y_MD, groups: (gather_sum(y_MD, groups), groups),
    lambda groups, dy_TD: (spread(dy_TD, groups), zero_groups(groups)),
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
