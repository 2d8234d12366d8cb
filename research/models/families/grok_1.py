"""Grok-1 (xAI 2024), in the layout of github.com/xai-org/grok-1: config.json holds what run.py gives ``LanguageModelConfig``
(``model`` what it gives ``TransformerConfig``), and tensors have the paths of model.py's parameters, joined by slashes.

Eight experts, two a token; norms before and after each branch; scores held within ±30.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from research.layers.attention import AttentionConfig
from research.layers.moe import Activation, MoEConfig, TopKRouter
from research.layers.norms import RMSNormConfig
from research.models.config import ModelConfig, Residual
from research.models.hub import Family, Keys, ModelViews, Tensor, joined

SOFTCAP = 30.0


def matches(hub: Mapping[str, Any]) -> bool:
    """Its configuration names no class: known by how it says what others leave unsaid."""
    inner = hub.get("model")
    return isinstance(inner, Mapping) and "attn_output_multiplier" in inner and "embedding_multiplier_scale" in hub


def config(keys: Keys) -> ModelConfig:
    inner = keys.inside("model")
    inner.inert("shard_activations", "data_axis", "model_axis", "capacity_factor", "init_scale", "name", "vocab_size")
    keys.inert("pad_token", "eos_token", "sequence_len", "embedding_init_scale", "fprop_dtype", "shard_embeddings")
    width = inner["emb_size"]
    keys.only("model_size", width, 0)
    hidden = int(inner.get("widening_factor", 4.0) * width) * 2 // 3
    norm = RMSNormConfig(eps=1e-5, centred=False)
    attention = AttentionConfig(
        heads=inner["num_q_heads"],
        key_heads=inner["num_kv_heads"],
        head_width=inner["key_size"],
        rotary_fraction=1.0,
        gated=False,
        qk_norm=None,
        softcap=SOFTCAP,
        scale=inner.get("attn_output_multiplier", 1.0),
    )
    experts = MoEConfig(
        experts=inner["num_experts"],
        per_token=inner.get("num_selected_experts", 1),
        hidden=hidden + -hidden % 8,
        shared_hidden=0,
        activation=Activation("geglu"),
        router=TopKRouter(renormalise=False),
    )
    layer = (
        Residual("attention", attention, pre_norm=norm, post_norm=norm),
        Residual("experts", experts, pre_norm=norm, post_norm=norm),
    )
    return ModelConfig(
        vocab_size=keys["vocab_size"],
        width=width,
        branches=layer,
        pattern=("attention", "experts"),
        repeats=inner["num_layers"],
        final_norm=norm,
        tie_embeddings=True,
        embedding_scale=keys.get("embedding_multiplier_scale", 1.0),
        logit_scale=keys.get("output_multiplier_scale", 1.0),
    )


def tensors(model: ModelViews) -> Iterator[Tensor]:
    yield joined("language_model/in_out_embed/embeddings", model["embedding_VD"])
    yield joined("language_model/rms_norm/scale", model["final_norm.scale_D"])
    for n in range(len(model.branches) // 2):
        attention, mlp = model.branches[2 * n : 2 * n + 2]
        prefix = f"transformer/decoder_layer_{n}/"
        yield joined(f"{prefix}rms_norm/scale", attention["pre_norm.scale_D"])
        yield joined(f"{prefix}rms_norm_1/scale", attention["post_norm.scale_D"])
        yield joined(f"{prefix}rms_norm_2/scale", mlp["pre_norm.scale_D"])
        yield joined(f"{prefix}rms_norm_3/scale", mlp["post_norm.scale_D"])
        c = attention.mixer(AttentionConfig)
        query, key = c.heads * c.head_width, c.key_heads * c.head_width
        projections = attention["mixer.w_in_DN"].cut(1, query, key, key)
        for name, view in zip(("query", "key", "value"), projections, strict=True):
            yield joined(f"{prefix}multi_head_attention/{name}/w", view)
        yield joined(f"{prefix}multi_head_attention/linear/w", attention["mixer.w_out_ND"])
        yield joined(f"{prefix}router/w", mlp["mixer.w_router_DE"])
        hidden = mlp.mixer(MoEConfig).hidden
        gate, up = mlp["mixer.w_in_EDF"].cut(-1, hidden, hidden)
        yield joined(f"{prefix}moe/linear/w", gate)
        yield joined(f"{prefix}moe/linear_v/w", up)
        yield joined(f"{prefix}moe/linear_1/w", mlp["mixer.w_out_EFD"])


FAMILY = Family(model_types=("grok-1",), architectures=(), config=config, tensors=tensors, matches=matches)
