"""Capacity: an expert takes so many assignments and no more."""

import dataclasses

import jax.numpy as jnp

from research.axes import Array, Int
from research.ops.routing.assignment import Assignment

PRIORITIES = ("position", "probability")


def expert_capacity(assignments: int, experts: int, factor: float) -> int:
    """Slots of one expert at a capacity factor: ceil(factor · assignments / experts), at least 1."""
    return max(1, int(-(-factor * assignments // experts)))


def limit_capacity(assignment: Assignment, capacity: int, *, by: str = "position") -> tuple[Assignment, Int[Array, ""]]:
    """Drops what exceeds each expert's capacity, and says how many assignments that was.

    A dropped assignment visits no expert (id E, weight 0): its token passes through the residual stream only. What a
    token loses depends on the other tokens of the batch, in a causal model on later ones too with 'probability'.

    by: who is served first. 'position': every token's first choice before any second choice, earlier tokens first
    (GShard, Switch). 'probability': the largest weight first (V-MoE's batch-prioritised routing, arXiv 2106.05974).
    """
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}, it must be at least 1")
    if by not in PRIORITIES:
        raise ValueError(f"by is {by!r}, it must be one of {PRIORITIES}")
    experts = assignment.experts
    rank_A = rank_in_expert(assignment, by)
    kept_A = (rank_A < capacity) & (assignment.expert_A < experts)
    dropped = (assignment.expert_A < experts).sum(dtype=jnp.int32) - kept_A.sum(dtype=jnp.int32)
    limited = dataclasses.replace(
        assignment,
        expert_A=jnp.where(kept_A, assignment.expert_A, experts),
        weight_A=jnp.where(kept_A, assignment.weight_A, 0),
    )
    return limited, dropped


def rank_in_expert(assignment: Assignment, by: str) -> Int[Array, "A"]:
    """Place of each assignment in its expert's queue."""
    expert_A = assignment.expert_A
    count = expert_A.shape[0]
    if by == "probability":
        queue_A = jnp.argsort(-assignment.weight_A, stable=True)
    elif assignment.per_token is None:
        queue_A = jnp.arange(count)
    else:
        queue_A = jnp.arange(count).reshape(-1, assignment.per_token).T.reshape(-1)
    order_A = queue_A[jnp.argsort(expert_A[queue_A], stable=True)]
    sorted_A = expert_A[order_A]
    place_A = jnp.arange(count) - jnp.searchsorted(sorted_A, sorted_A)
    return jnp.zeros(count, jnp.int32).at[order_A].set(place_A.astype(jnp.int32))
