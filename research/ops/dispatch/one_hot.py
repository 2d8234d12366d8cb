"""Dispatch by the definition: one-hot tensors over tokens, experts and slots (GShard), for reference and for tests."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.axes import Array, Float
from research.ops.dispatch.capacity import rank_in_expert
from research.ops.routing.assignment import Assignment


def _slots(assignment: Assignment, capacity: int, by: str, weights_A) -> Float[Array, "T E C"]:
    """weights_A[a] at (token, expert, slot) of each assignment that has a slot."""
    rank_A = rank_in_expert(assignment, by)
    kind = weights_A.dtype
    token_AT = jax.nn.one_hot(assignment.token_A, assignment.tokens, dtype=kind)
    expert_AE = jax.nn.one_hot(assignment.expert_A, assignment.experts, dtype=kind)
    slot_AC = jax.nn.one_hot(rank_A, capacity, dtype=kind)
    expert_AEC = expert_AE[:, :, None] * (slot_AC * weights_A[:, None])[:, None, :]
    return jnp.einsum("at,aec->tec", token_AT, expert_AEC)


def one_hot_dispatch(
    x_TD: Float[Array, "T D"], assignment: Assignment, capacity: int, *, by: str = "position"
) -> Float[Array, "E C D"]:
    """Each expert's slots, zero where empty. capacity = A is dropless. Costs T·E·C·D: a definition, not a program."""
    ones_A = jnp.ones_like(assignment.weight_A)
    weights_A = assignment.weight_A if assignment.weight_on == "input" else ones_A
    return jnp.einsum("tec,td->ecd", _slots(assignment, capacity, by, weights_A).astype(x_TD.dtype), x_TD)


def one_hot_combine(
    y_ECD: Float[Array, "E C D"], assignment: Assignment, *, by: str = "position"
) -> Float[Array, "T D"]:
    """Each token's weighted sum over its slots."""
    ones_A = jnp.ones_like(assignment.weight_A)
    weights_A = assignment.weight_A if assignment.weight_on == "output" else ones_A
    slots_TEC = _slots(assignment, y_ECD.shape[1], by, weights_A)
    return jnp.einsum("tec,ecd->td", slots_TEC.astype(y_ECD.dtype), y_ECD)


def one_hot_mlp(
    x_TD: Float[Array, "T D"],
    w_EDN: Float[Array, "E D N"],
    w_EFO: Float[Array, "E F O"],
    assignment: Assignment,
    *,
    activation: Callable[[Array], Array],
    b_EN: Float[Array, "E N"] | None = None,
    b_EO: Float[Array, "E O"] | None = None,
    capacity: int | None = None,
) -> Float[Array, "T O"]:
    """What `expert_mlp` computes, by the definition; every assignment has a slot unless a capacity says otherwise."""
    capacity = assignment.expert_A.shape[0] if capacity is None else capacity
    x_ECD = one_hot_dispatch(x_TD, assignment, capacity)
    h_ECN = jnp.einsum("ecd,edn->ecn", x_ECD, w_EDN.astype(x_TD.dtype))
    h_ECN = h_ECN if b_EN is None else h_ECN + b_EN[:, None].astype(x_TD.dtype)
    y_ECO = jnp.einsum("ecf,efo->eco", activation(h_ECN), w_EFO.astype(x_TD.dtype))
    y_ECO = y_ECO if b_EO is None else y_ECO + b_EO[:, None].astype(x_TD.dtype)
    return one_hot_combine(y_ECO, assignment)
