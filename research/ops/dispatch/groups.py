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
from research.ops.grouped_matmul import aligned_rows, grouped_matmul, padded_sizes, tile_rows
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
      sizes_E: rows of each expert, padding rows included: multiples of `alignment`, or all M / E.
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
    """Assignments in order of expert, first come first, and the expert of each place. One packed key sorts faster than
    key and value."""
    count = expert_A.shape[0]
    if (experts + 1) * count < 2**31:
        packed_A = jnp.sort(expert_A * count + jnp.arange(count, dtype=jnp.int32))
        return packed_A % count, packed_A // count
    order_A = jnp.argsort(expert_A, stable=True).astype(jnp.int32)
    return order_A, expert_A[order_A]


def group(
    assignment: Assignment,
    alignment: int | None = None,
    *,
    capacity: int | None = None,
    live: int | None = None,
    even: bool = True,
) -> Groups:
    """Sorts assignments by expert into rows, each expert's padded to a multiple of `alignment`, or to equal shares of
    the rows where those are enough (`padded_sizes`).

    alignment None chooses a tile that suits the mean group. The number of rows M is static, the worst case over all
    loads: at least A + E·(alignment − 1) rounded down to a multiple.

    capacity: every expert has exactly that many rows, M = E·capacity, whatever its load; an expert with more
    assignments than that loses the last ones. Give it what `limit_capacity` returned for the same capacity, which
    decides and counts what is dropped.

    live: a promise that at most so many assignments have an expert, which makes M smaller; those past it are lost.
    even: False never deals equal shares.
    """
    if capacity is not None:
        if capacity < 1 or alignment not in (None, capacity):
            raise ValueError(
                f"capacity is {capacity}, it must be at least 1, and alignment is then not yours to choose"
            )
        alignment = capacity
    count, experts = assignment.expert_A.shape[0], assignment.experts
    live = count if live is None else min(live, count)
    if alignment is None:
        # Where most experts have no row, those of the others are not padded.
        alignment = 1 if live <= experts else tile_rows(live, experts)
    if alignment < 1:
        raise ValueError(f"alignment is {alignment}, it must be at least 1")
    rows = aligned_rows(live, experts, alignment) if capacity is None else experts * capacity
    order_A, sorted_A = _sort_by_expert(assignment.expert_A, experts)
    counts_E = assignment.counts_E()
    if capacity is None:
        sizes_E = padded_sizes(counts_E, rows, alignment) if even else -(-counts_E // alignment) * alignment
    else:
        sizes_E = jnp.full(experts, capacity, jnp.int32)
    safe_A = jnp.minimum(sorted_A, experts - 1)
    index_A = jnp.arange(count, dtype=jnp.int32) - (jnp.cumsum(counts_E) - counts_E)[safe_A]
    slot_A = (jnp.cumsum(sizes_E) - sizes_E)[safe_A] + index_A
    slot_A = jnp.where((sorted_A < experts) & (index_A < sizes_E[safe_A]), slot_A, rows).astype(jnp.int32)
    assignment_M = jnp.full(rows, count, jnp.int32).at[slot_A].set(order_A, mode="drop", unique_indices=True)
    row_A = jnp.zeros(count, jnp.int32).at[order_A].set(slot_A, unique_indices=True)
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


def to_rows(x_AD: Float[Array, "A D"], groups: Groups) -> Float[Array, "M D"]:
    """What each assignment brings, rather than its token, in row order; zero at padding rows. Unweighted."""
    return _permute(x_AD, groups.assignment_M, groups.row_A)


def from_rows(y_MD: Float[Array, "M D"], groups: Groups) -> Float[Array, "A D"]:
    """Rows back in the order of assignments, unsummed and unweighted; zero where an assignment has no expert."""
    return _permute(y_MD, groups.row_A, groups.assignment_M)
