"""DeepSeek-V2 and V2-Lite (DeepSeek-AI 2024, arXiv 2405.04434): latent attention, experts in groups of which a token visits
a few."""

import functools
from collections.abc import Iterator
from typing import Any

from research.layers.mla import MLAConfig
from research.layers.mlp import MLPConfig
from research.layers.moe import MoEConfig, TopKRouter
from research.layers.norms import RMSNormConfig
from research.models.config import ModelConfig, Residual
from research.models.hub import Family, Keys, ModelViews, Tensor, parts


def latent_attention(keys: Keys) -> dict[str, Any]:
    """The fields of ``MLAConfig``, in V2 and all that came of it."""
    keys.only("attention_bias", False)
    # Derived from others, where they are there.
    keys.inert("head_dim", "qk_head_dim", "num_key_value_heads")
    turning = parts.rope(keys)
    if turning.pop("rotary_fraction") != 1:
        keys.refuse("partial_rotary_factor must be 1: qk_rope_head_dim says how much of a head turns")
    return {
        "heads": keys["num_attention_heads"],
        "nope_width": keys["qk_nope_head_dim"],
        "rope_width": keys["qk_rope_head_dim"],
        "value_width": keys["v_head_dim"],
        "latent": keys["kv_lora_rank"],
        "query_latent": keys.get("q_lora_rank"),
        "rope_layout": "pairs" if keys.get("rope_interleave", True) else "halves",
        **turning,
    }


def widths(keys: Keys) -> dict[str, Any]:
    """The fields of ``MoEConfig`` that say how many experts there are, and how wide."""
    keys.only("hidden_act", "silu")
    keys.only("mlp_bias", False)
    keys.only("moe_layer_freq", 1)
    keys.inert("aux_loss_alpha", "seq_aux", "ep_size")
    hidden = keys["moe_intermediate_size"]
    return {
        "experts": keys.either("n_routed_experts", "num_experts", "num_local_experts"),
        "per_token": keys["num_experts_per_tok"],
        "hidden": hidden,
        "shared_hidden": hidden * keys.get("n_shared_experts", 0),
    }


def feed_forward(keys: Keys, experts: MoEConfig, norm: RMSNormConfig) -> list[Residual]:
    """Of each layer: the first few are dense."""
    first = keys.get("first_k_dense_replace", 0)
    dense = Residual("mlp", MLPConfig(keys["intermediate_size"]), pre_norm=norm)
    sparse = Residual("experts", experts, pre_norm=norm)
    ours = ["dense" if n < first else "sparse" for n in range(keys["num_hidden_layers"])]
    return [dense if kind == "dense" else sparse for kind in keys.get("mlp_layer_types", ours)]


def config(keys: Keys) -> ModelConfig:
    keys.only("scoring_func", "softmax")
    keys.only("norm_topk_prob", False)
    limited = keys.only("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy"
    groups, top_groups = keys.get("n_group", 1), keys.get("topk_group", 0)
    experts = MoEConfig(
        **widths(keys),
        groups=groups if limited else 1,
        router=TopKRouter(
            renormalise=False,
            scale=float(keys.get("routed_scaling_factor", 1.0)),
            top_groups=top_groups if limited else 0,
        ),
    )
    norm = parts.rms_norm(keys)
    attention = Residual("attention", MLAConfig(**latent_attention(keys)), pre_norm=norm)
    return parts.language_model(keys, [(attention, mlp) for mlp in feed_forward(keys, experts, norm)], norm)


def tensors(model: ModelViews) -> Iterator[Tensor]:
    return parts.decoder(model, parts.latent_attention, functools.partial(parts.feed_forward, shared="shared_experts"))


FAMILY = Family(
    model_types=("deepseek_v2",),
    architectures=("DeepseekV2ForCausalLM",),
    config=config,
    tensors=tensors,
    ignored=(r".*\.rotary_emb\.inv_freq",),
)
