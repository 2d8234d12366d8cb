"""MiniCPM-MoE (Hu et al. 2024, arXiv 2404.06395), upcycled from the dense MiniCPM, which is read as well: embeddings, branches
and what the head reads are scaled."""

from collections.abc import Iterator

from research.layers.attention import AttentionConfig
from research.layers.mlp import MLPConfig
from research.layers.moe import MoEConfig, TopKRouter
from research.models.config import ModelConfig, Residual
from research.models.hub import BranchViews, Family, Keys, ModelViews, Tensor, parts


def config(keys: Keys) -> ModelConfig:
    keys.only("hidden_act", "silu")
    norm, heads, width = parts.rms_norm(keys, eps=1e-5), keys["num_attention_heads"], keys["hidden_size"]
    depth, bias = keys["num_hidden_layers"], keys.get("attention_bias", False)
    attention = AttentionConfig(
        heads=heads,
        key_heads=keys.get("num_key_value_heads", heads),
        head_width=width // heads,
        gated=False,
        qk_norm=None,
        bias=bias,
        out_bias=bias,
        **parts.rope(keys),
    )
    experts, per_token, hidden = (
        keys.get("num_experts", 0), keys.get("num_experts_per_tok", 2), keys["intermediate_size"]
    )  # fmt: skip
    scale = keys.get("scale_depth", 1.0) / depth**0.5
    if experts:
        mlp = MoEConfig(
            experts=experts, per_token=per_token, hidden=hidden, shared_hidden=0, router=TopKRouter(renormalise=True)
        )
    else:
        mlp = MLPConfig(hidden)
    layer = (
        Residual("attention", attention, pre_norm=norm, branch_scale=scale),
        Residual("experts" if experts else "mlp", mlp, pre_norm=norm, branch_scale=scale),
    )
    return parts.language_model(
        keys,
        [layer] * depth,
        norm,
        tied=True,
        embedding_scale=float(keys.get("scale_emb", 1.0)),
        logit_scale=keys.get("dim_model_base", width) / width,
    )


def feed_forward(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    if isinstance(branch.residual.mixer, MLPConfig):
        return parts.gated_mlp(prefix, branch)
    return parts.experts(prefix, branch, ("w1", "w3", "w2"))


def tensors(model: ModelViews) -> Iterator[Tensor]:
    return parts.decoder(model, parts.attention, feed_forward)


FAMILY = Family(
    model_types=("minicpm",),
    architectures=("MiniCPMForCausalLM",),
    config=config,
    tensors=tensors,
    # The head is the embedding; some files hold it twice.
    ignored=(r".*\.rotary_emb\.inv_freq", r"lm_head\.weight"),
)
