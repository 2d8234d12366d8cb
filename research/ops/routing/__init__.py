"""Routers: one vocabulary from scores to an `Assignment` of tokens to experts; everything after it is shared."""

from research.ops.routing.assignment import Assignment, from_choice
from research.ops.routing.token_choice import GroupLimit, scores_from_logits, top_k

__all__ = ["Assignment", "GroupLimit", "from_choice", "scores_from_logits", "top_k"]
