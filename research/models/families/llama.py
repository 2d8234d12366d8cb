"""Llama 2 and 3 (Meta 2023, arXiv 2307.09288; 2024, arXiv 2407.21783): the dense baseline."""

from collections.abc import Iterator

from research.layers.attention import AttentionConfig
from research.layers.mlp import MLPConfig
from research.models.config import ModelConfig, Residual
from research.models.hub import Family, Keys, ModelViews, Tensor, parts


def config(keys: Keys) -> ModelConfig:
    keys.only("hidden_act", "silu")
    keys.only("mlp_bias", False)
    norm, heads, bias = parts.rms_norm(keys), keys["num_attention_heads"], keys.get("attention_bias", False)
    attention = AttentionConfig(
        heads=heads,
        key_heads=keys.get("num_key_value_heads", heads),
        head_width=keys.get("head_dim", keys["hidden_size"] // heads),
        gated=False,
        qk_norm=None,
        bias=bias,
        out_bias=bias,
        **parts.rope(keys),
    )
    layer = (
        Residual("attention", attention, pre_norm=norm),
        Residual("mlp", MLPConfig(keys["intermediate_size"]), pre_norm=norm),
    )
    return parts.language_model(keys, [layer] * keys["num_hidden_layers"], norm)


def tensors(model: ModelViews) -> Iterator[Tensor]:
    return parts.decoder(model, parts.attention, parts.gated_mlp)


FAMILY = Family(
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    config=config,
    tensors=tensors,
    ignored=(r".*\.rotary_emb\.inv_freq",),
)
