"""Between router and experts: sorting, capacity, the fused expert MLP, and the one-hot definition of it all."""

from research.ops.dispatch.activations import GATED, activation
from research.ops.dispatch.capacity import expert_capacity, limit_capacity
from research.ops.dispatch.expert_mlp import expert_mlp, swiglu
from research.ops.dispatch.groups import Groups, combine, dispatch, group
from research.ops.dispatch.one_hot import one_hot_combine, one_hot_dispatch, one_hot_mlp

__all__ = [
    "GATED",
    "Groups",
    "activation",
    "combine",
    "dispatch",
    "expert_capacity",
    "expert_mlp",
    "group",
    "limit_capacity",
    "one_hot_combine",
    "one_hot_dispatch",
    "one_hot_mlp",
    "swiglu",
]
