"""Routers: one vocabulary from scores to an `Assignment` of tokens to experts; everything after it is shared."""

from research.ops.routing.assignment import Assignment, from_choice
from research.ops.routing.balanced import auction, base, expert_choice, sinkhorn, sinkhorn_plan
from research.ops.routing.fixed import balanced_table, by_token_id, random_table
from research.ops.routing.noisy import gshard_top2, jitter, noisy_top_k, uniform
from research.ops.routing.reinforce import policy, policy_loss
from research.ops.routing.token_choice import GroupLimit, limit_to_groups, scores_from_logits, top_k

__all__ = [
    "Assignment",
    "GroupLimit",
    "auction",
    "balanced_table",
    "base",
    "by_token_id",
    "expert_choice",
    "from_choice",
    "gshard_top2",
    "jitter",
    "limit_to_groups",
    "noisy_top_k",
    "policy",
    "policy_loss",
    "random_table",
    "scores_from_logits",
    "sinkhorn",
    "sinkhorn_plan",
    "top_k",
    "uniform",
]
