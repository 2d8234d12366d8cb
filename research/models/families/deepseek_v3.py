"""DeepSeek-V3 and R1 (DeepSeek-AI 2024, arXiv 2412.19437): experts balanced by a bias on their sigmoid scores, and heads
that predict further ahead, whose layers come after the model's own."""

import dataclasses
from collections.abc import Iterator

from research.layers.mla import MLAConfig
from research.layers.moe import MoEConfig, TopKRouter
from research.models.config import ModelConfig, MTPConfig, Residual
from research.models.families import deepseek_v2
from research.models.hub import BranchViews, Family, Keys, ModelViews, Tensor, joined, parts

# Of a head ahead, which has the model's own embedding and head beside it.
COPIES = (r"model\.layers\.\d+\.embed_tokens\.weight", r"model\.layers\.\d+\.shared_head\.head\.weight")


def experts(keys: Keys, groups: int = 8, top_groups: int = 4) -> MoEConfig:
    """``groups`` and ``top_groups`` are what their absence means."""
    keys.only("scoring_func", "sigmoid")
    keys.only("topk_method", "noaux_tc")
    return MoEConfig(
        **deepseek_v2.widths(keys),
        groups=keys.get("n_group", groups),
        router=TopKRouter(
            score="sigmoid",
            renormalise=keys.get("norm_topk_prob", True),
            scale=float(keys.get("routed_scaling_factor", 2.5)),
            top_groups=keys.get("topk_group", top_groups),
            group_score="top2",
        ),
        balance_loss=0.0,
        z_loss=0.0,
        sequence_loss=1e-4,
        bias_rate=1e-3,
    )


def with_heads(keys: Keys, model: ModelConfig, layer: tuple[Residual, ...]) -> ModelConfig:
    """The model with as many heads ahead as config.json announces, each one ``layer``."""
    depth = keys.either("num_nextn_predict_layers", "num_mtp_layers", default=0)
    if not depth:
        return model
    branches = tuple(dict.fromkeys((*model.branches, *layer)))
    mtp = MTPConfig(pattern=tuple(branch.name for branch in layer), depth=depth)
    return dataclasses.replace(model, branches=branches, mtp=mtp)


def config(keys: Keys) -> ModelConfig:
    norm, sparse = parts.rms_norm(keys), experts(keys)
    attention = Residual("attention", MLAConfig(**deepseek_v2.latent_attention(keys)), pre_norm=norm)
    layers = [(attention, mlp) for mlp in deepseek_v2.feed_forward(keys, sparse, norm)]
    model = parts.language_model(keys, layers, norm)
    return with_heads(keys, model, (attention, Residual("experts", sparse, pre_norm=norm)))


def tensors(model: ModelViews, attend=parts.latent_attention) -> Iterator[Tensor]:
    yield from parts.ends(model)
    depth = len(model.branches) // 2
    for n in range(depth):
        yield from _layer(f"model.layers.{n}.", model.branches[2 * n : 2 * n + 2], attend)
    for n, head in enumerate(model.heads, depth):
        prefix = f"model.layers.{n}."
        yield joined(f"{prefix}enorm.weight", head["embedding_norm.scale_D"])
        yield joined(f"{prefix}hnorm.weight", head["hidden_norm.scale_D"])
        yield parts.linear(f"{prefix}eh_proj.weight", head["w_merge_ND"])
        yield from _layer(prefix, head.branches, attend)
        yield joined(f"{prefix}shared_head.norm.weight", head["norm.scale_D"])


def _layer(prefix: str, branches: list[BranchViews], attend) -> Iterator[Tensor]:
    attention, mlp = branches
    yield joined(f"{prefix}input_layernorm.weight", attention["pre_norm.scale_D"])
    yield from attend(f"{prefix}self_attn.", attention)
    yield joined(f"{prefix}post_attention_layernorm.weight", mlp["pre_norm.scale_D"])
    yield from parts.feed_forward(f"{prefix}mlp.", mlp, shared="shared_experts")


FAMILY = Family(
    model_types=("deepseek_v3",),
    architectures=("DeepseekV3ForCausalLM",),
    config=config,
    tensors=tensors,
    ignored=(r".*\.rotary_emb\.inv_freq", *COPIES),
)
