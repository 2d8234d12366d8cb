"""Qwen3 with experts (Qwen Team 2025, arXiv 2505.09388): 128 of them, 8 a token, none shared."""

from collections.abc import Iterator

from research.layers.mlp import MLPConfig
from research.layers.moe import MoEConfig, TopKRouter
from research.models.config import ModelConfig, Residual
from research.models.families import qwen3
from research.models.hub import Family, Keys, ModelViews, Tensor, parts


def config(keys: Keys) -> ModelConfig:
    keys.only("hidden_act", "silu")
    norm = parts.rms_norm(keys)
    experts = MoEConfig(
        experts=keys.either("num_experts", "num_local_experts"),
        per_token=keys.get("num_experts_per_tok", 8),
        hidden=keys["moe_intermediate_size"],
        shared_hidden=0,
        router=TopKRouter(renormalise=keys.get("norm_topk_prob", False)),
    )
    attention = Residual("attention", qwen3.attention(keys), pre_norm=norm)
    sparse = Residual("experts", experts, pre_norm=norm)
    dense = Residual("mlp", MLPConfig(keys["intermediate_size"]), pre_norm=norm)
    layers = [(attention, sparse if has_experts else dense) for has_experts in parts.sparse_layers(keys)]
    return parts.language_model(keys, layers, norm)


def tensors(model: ModelViews) -> Iterator[Tensor]:
    return parts.decoder(model, parts.attention, parts.feed_forward)


FAMILY = Family(model_types=("qwen3_moe",), architectures=("Qwen3MoeForCausalLM",), config=config, tensors=tensors)
