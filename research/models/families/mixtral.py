"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): eight experts, two a token, weighted by a softmax over the two."""

import functools
from collections.abc import Iterator

from research.layers.attention import AttentionConfig
from research.layers.moe import MoEConfig, TopKRouter
from research.models.config import ModelConfig, Residual
from research.models.hub import Family, Keys, ModelViews, Tensor, parts


def config(keys: Keys) -> ModelConfig:
    keys.only("hidden_act", "silu")
    norm, heads = parts.rms_norm(keys, eps=1e-5), keys["num_attention_heads"]
    attention = AttentionConfig(
        heads=heads,
        key_heads=keys.get("num_key_value_heads", heads),
        head_width=keys.get("head_dim", keys["hidden_size"] // heads),
        gated=False,
        qk_norm=None,
        window=keys.get("sliding_window"),
        **parts.rope(keys, theta=1_000_000.0),
    )
    experts = MoEConfig(
        experts=keys["num_local_experts"],
        per_token=keys.get("num_experts_per_tok", 2),
        hidden=keys["intermediate_size"],
        shared_hidden=0,
        router=TopKRouter(renormalise=True),
    )
    layer = (Residual("attention", attention, pre_norm=norm), Residual("experts", experts, pre_norm=norm))
    return parts.language_model(keys, [layer] * keys["num_hidden_layers"], norm)


def tensors(model: ModelViews) -> Iterator[Tensor]:
    experts = functools.partial(parts.experts, names=("w1", "w3", "w2"))
    return parts.decoder(model, parts.attention, experts, inner="block_sparse_moe.")


FAMILY = Family(
    model_types=("mixtral",),
    architectures=("MixtralForCausalLM",),
    config=config,
    tensors=tensors,
    ignored=(r".*\.rotary_emb\.inv_freq",),
)
