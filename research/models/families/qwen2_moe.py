"""Qwen1.5-MoE and Qwen2-MoE (Qwen Team 2024, arXiv 2407.10671): fine-grained experts beside a shared one that is gated."""

import dataclasses
from collections.abc import Iterator

from research.layers.mlp import MLPConfig
from research.layers.moe import MoEConfig, TopKRouter
from research.models.config import ModelConfig, Residual
from research.models.families import qwen3
from research.models.hub import Family, Keys, ModelViews, Tensor, parts


def config(keys: Keys) -> ModelConfig:
    keys.only("hidden_act", "silu")
    norm = parts.rms_norm(keys)
    attention = dataclasses.replace(
        qwen3.attention(keys), qk_norm=None, bias=keys.get("qkv_bias", True), out_bias=False
    )
    experts = MoEConfig(
        experts=keys.either("num_experts", "num_local_experts"),
        per_token=keys.get("num_experts_per_tok", 4),
        hidden=keys["moe_intermediate_size"],
        shared_hidden=keys["shared_expert_intermediate_size"],
        shared_gate=True,
        router=TopKRouter(renormalise=keys.get("norm_topk_prob", False)),
    )
    mixer = Residual("attention", attention, pre_norm=norm)
    sparse = Residual("experts", experts, pre_norm=norm)
    dense = Residual("mlp", MLPConfig(keys["intermediate_size"]), pre_norm=norm)
    layers = [(mixer, sparse if has_experts else dense) for has_experts in parts.sparse_layers(keys)]
    return parts.language_model(keys, layers, norm)


def tensors(model: ModelViews) -> Iterator[Tensor]:
    return parts.decoder(model, parts.attention, parts.feed_forward)


FAMILY = Family(model_types=("qwen2_moe",), architectures=("Qwen2MoeForCausalLM",), config=config, tensors=tensors)
