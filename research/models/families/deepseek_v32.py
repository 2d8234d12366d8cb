"""DeepSeek-V3.2 (DeepSeek-AI 2025): V3 with an indexer that chooses the tokens its attention reads."""

from collections.abc import Iterator
from typing import Any

from research.layers.dsa import DSAConfig
from research.models.config import ModelConfig, Residual
from research.models.families import deepseek_v2, deepseek_v3
from research.models.hub import BranchViews, Family, Keys, ModelViews, Tensor, joined, parts


def sparse_attention(keys: Keys) -> dict[str, Any]:
    """The fields of ``DSAConfig``, but for the layout of the indexer's RoPE."""
    if set(keys.get("layer_types", [])) - {"indexed_attention"}:
        keys.refuse(f"layer_types must hold 'indexed_attention' alone, got {keys['layer_types']}")
    return {
        **deepseek_v2.latent_attention(keys),
        "index_heads": keys["index_n_heads"],
        "index_width": keys["index_head_dim"],
        "top_k": keys["index_topk"],
    }


def config(keys: Keys) -> ModelConfig:
    norm, experts = parts.rms_norm(keys), deepseek_v3.experts(keys)
    attention = Residual("attention", DSAConfig(**sparse_attention(keys), index_layout="halves"), pre_norm=norm)
    layers = [(attention, mlp) for mlp in deepseek_v2.feed_forward(keys, experts, norm)]
    model = parts.language_model(keys, layers, norm)
    return deepseek_v3.with_heads(keys, model, (attention, Residual("experts", experts, pre_norm=norm)))


def attend(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    """Latent attention and, where the layer has one, its ``indexer``."""
    yield from parts.latent_attention(prefix, branch)
    if branch.mixer(DSAConfig).indices != "shared":
        yield parts.linear(f"{prefix}indexer.wq_b.weight", branch["mixer.indexer.w_query_RN"])
        yield parts.linear(f"{prefix}indexer.wk.weight", branch["mixer.indexer.w_key_DK"])
        yield joined(f"{prefix}indexer.k_norm.weight", branch["mixer.indexer.scale_K"])
        yield joined(f"{prefix}indexer.k_norm.bias", branch["mixer.indexer.bias_K"])
        yield parts.linear(f"{prefix}indexer.weights_proj.weight", branch["mixer.indexer.w_head_DH"])


def tensors(model: ModelViews) -> Iterator[Tensor]:
    yield from deepseek_v3.tensors(model, attend)


FAMILY = Family(
    model_types=("deepseek_v32",),
    architectures=("DeepseekV32ForCausalLM",),
    config=config,
    tensors=tensors,
    ignored=deepseek_v3.FAMILY.ignored,
)
