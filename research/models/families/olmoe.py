"""OLMoE (Muennighoff et al. 2024, arXiv 2409.02060): 64 experts, 8 a token; one norm over all queries, one over all keys."""

from research.layers.attention import AttentionConfig
from research.layers.moe import MoEConfig, TopKRouter
from research.models.config import ModelConfig, Residual
from research.models.families import qwen3_moe
from research.models.hub import Family, Keys, parts


def config(keys: Keys) -> ModelConfig:
    keys.only("hidden_act", "silu")
    norm = parts.rms_norm(keys, eps=1e-5)
    heads, bias = keys["num_attention_heads"], keys.get("attention_bias", False)
    attention = AttentionConfig(
        heads=heads,
        key_heads=keys.get("num_key_value_heads", heads),
        head_width=keys["hidden_size"] // heads,
        gated=False,
        qk_norm=norm,
        qk_norm_over="projection",
        clip_qkv=keys.get("clip_qkv"),
        bias=bias,
        out_bias=bias,
        **parts.rope(keys),
    )
    experts = MoEConfig(
        experts=keys.either("num_experts", "num_local_experts"),
        per_token=keys.get("num_experts_per_tok", 8),
        hidden=keys["intermediate_size"],
        shared_hidden=0,
        router=TopKRouter(renormalise=keys.get("norm_topk_prob", False)),
    )
    layer = (Residual("attention", attention, pre_norm=norm), Residual("experts", experts, pre_norm=norm))
    return parts.language_model(keys, [layer] * keys["num_hidden_layers"], norm)


FAMILY = Family(model_types=("olmoe",), architectures=("OlmoeForCausalLM",), config=config, tensors=qwen3_moe.tensors)
