"""A mixture of experts: any router, any balance, dropless or with a capacity, on one device or spread over many."""

from research.layers.moe.config import Activation, Capacity, Dropless, MoEConfig
from research.layers.moe.layer import HashTable, MoE, NoiseSeed, RouterBias
from research.layers.moe.routers import (
    BASERouter,
    ExpertChoiceRouter,
    GShardRouter,
    HashRouter,
    NoisyTopKRouter,
    RandomRouter,
    ReinforceRouter,
    Router,
    SinkhornRouter,
    TopKRouter,
)

__all__ = [
    "Activation",
    "BASERouter",
    "Capacity",
    "Dropless",
    "ExpertChoiceRouter",
    "GShardRouter",
    "HashRouter",
    "HashTable",
    "MoE",
    "MoEConfig",
    "NoiseSeed",
    "NoisyTopKRouter",
    "RandomRouter",
    "ReinforceRouter",
    "Router",
    "RouterBias",
    "SinkhornRouter",
    "TopKRouter",
]
