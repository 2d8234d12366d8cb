"""Between router and experts: sorting, capacity, the fused expert MLP, and the one-hot definition of it all."""

from research.ops.dispatch.capacity import limit_capacity
from research.ops.dispatch.expert_mlp import expert_mlp, swiglu
from research.ops.dispatch.groups import Groups, combine, dispatch, group
from research.ops.dispatch.one_hot import one_hot_combine, one_hot_dispatch

__all__ = [
    "Groups",
    "combine",
    "dispatch",
    "expert_mlp",
    "group",
    "limit_capacity",
    "one_hot_combine",
    "one_hot_dispatch",
    "swiglu",
]
