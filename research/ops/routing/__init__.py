"""Routers: one vocabulary from scores to an `Assignment` of tokens to experts; everything after it is shared."""

from research.ops.routing.assignment import Assignment, as_token_choice, flatten_rows, from_choice, slice_tokens
from research.ops.routing.balanced import auction, base, expert_choice, sinkhorn, sinkhorn_plan
from research.ops.routing.fixed import balanced_table, by_token_id, random_table
from research.ops.routing.noisy import gshard_top2, jitter, noisy_top_k, uniform
from research.ops.routing.reinforce import PolicyTerms, policy, policy_loss, policy_terms, reinforce
from research.ops.routing.token_choice import GroupLimit, limit_to_groups, scores_from_logits, top_k

__all__ = [
    "Assignment",
    "GroupLimit",
    "PolicyTerms",
    "as_token_choice",
    "auction",
    "balanced_table",
    "base",
    "by_token_id",
    "expert_choice",
    "flatten_rows",
    "from_choice",
    "gshard_top2",
    "jitter",
    "limit_to_groups",
    "noisy_top_k",
    "policy",
    "policy_loss",
    "policy_terms",
    "random_table",
    "reinforce",
    "scores_from_logits",
    "sinkhorn",
    "sinkhorn_plan",
    "slice_tokens",
    "top_k",
    "uniform",
]
