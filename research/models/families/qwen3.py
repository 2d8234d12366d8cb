"""Qwen3, dense (Qwen Team 2025, arXiv 2505.09388): queries and keys normalised per head."""

from research.layers.attention import AttentionConfig
from research.layers.mlp import MLPConfig
from research.models.config import ModelConfig, Residual
from research.models.families import llama
from research.models.hub import Family, Keys, parts


def attention(keys: Keys) -> AttentionConfig:
    """Of Qwen3, dense or with experts."""
    keys.only("use_sliding_window", False)
    keys.inert("sliding_window", "max_window_layers")
    for kind in keys.get("layer_types", []):
        if kind != "full_attention":
            keys.refuse(f"layer_types must hold 'full_attention' alone, got {kind!r}")
    bias, heads = keys.get("attention_bias", False), keys["num_attention_heads"]
    return AttentionConfig(
        heads=heads,
        key_heads=keys.get("num_key_value_heads", heads),
        head_width=keys.get("head_dim", keys["hidden_size"] // heads),
        gated=False,
        qk_norm=parts.rms_norm(keys),
        bias=bias,
        out_bias=bias,
        **parts.rope(keys),
    )


def config(keys: Keys) -> ModelConfig:
    keys.only("hidden_act", "silu")
    norm = parts.rms_norm(keys)
    layer = (
        Residual("attention", attention(keys), pre_norm=norm),
        Residual("mlp", MLPConfig(keys["intermediate_size"]), pre_norm=norm),
    )
    return parts.language_model(keys, [layer] * keys["num_hidden_layers"], norm)


FAMILY = Family(model_types=("qwen3",), architectures=("Qwen3ForCausalLM",), config=config, tensors=llama.tensors)
