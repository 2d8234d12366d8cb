"""DeepSeekMoE 16B (Dai et al. 2024, arXiv 2401.06066), as the hub has it: fine-grained experts and two that all tokens visit."""

import functools
from collections.abc import Iterator

from research.layers.attention import AttentionConfig
from research.layers.moe import MoEConfig, TopKRouter
from research.models.config import ModelConfig, Residual
from research.models.families import deepseek_v2
from research.models.hub import Family, Keys, ModelViews, Tensor, parts


def config(keys: Keys) -> ModelConfig:
    keys.only("scoring_func", "softmax")
    norm, heads, bias = parts.rms_norm(keys), keys["num_attention_heads"], keys.get("attention_bias", False)
    attention = AttentionConfig(
        heads=heads,
        key_heads=keys.get("num_key_value_heads", heads),
        head_width=keys["hidden_size"] // heads,
        gated=False,
        qk_norm=None,
        bias=bias,
        out_bias=bias,
        **parts.rope(keys),
    )
    router = TopKRouter(renormalise=keys.get("norm_topk_prob", False))
    experts = MoEConfig(**deepseek_v2.widths(keys), router=router)
    mixer = Residual("attention", attention, pre_norm=norm)
    return parts.language_model(keys, [(mixer, mlp) for mlp in deepseek_v2.feed_forward(keys, experts, norm)], norm)


def tensors(model: ModelViews) -> Iterator[Tensor]:
    return parts.decoder(model, parts.attention, functools.partial(parts.feed_forward, shared="shared_experts"))


FAMILY = Family(
    model_types=("deepseek",),
    architectures=("DeepseekForCausalLM",),
    config=config,
    tensors=tensors,
    ignored=(r".*\.rotary_emb\.inv_freq",),
)
