"""Qwen3.5 with experts, its language model (Qwen Team 2026)."""

from research.models.config import ModelConfig, Residual
from research.models.families import qwen3_5, qwen3_next
from research.models.hub import Family, Keys


def config(keys: Keys) -> ModelConfig:
    # Weights of the chosen experts always add up to one.
    keys.only("norm_topk_prob", True)
    keys.inert("intermediate_size")
    return qwen3_5.model(keys, Residual("experts", qwen3_next.experts(keys), pre_norm=qwen3_next.norm(keys)))


FAMILY = Family(
    model_types=("qwen3_5_moe_text",),
    architectures=("Qwen3_5MoeForCausalLM",),
    config=config,
    tensors=qwen3_5.tensors,
    ignored=qwen3_5.FAMILY.ignored,
    multimodal=("Qwen3_5MoeForConditionalGeneration",),
    spellings=qwen3_5.FAMILY.spellings,
    fused=qwen3_next.fused,
)
