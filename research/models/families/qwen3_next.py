"""Qwen3-Next (Qwen Team 2025): three layers of Gated DeltaNet to one of gated attention, experts and a gated shared one.

Its head ahead (``mtp.*``) is one more layer of attention and experts. It is loaded where config.json says
``num_nextn_predict_layers: 1``, and left out, with a word, where it doesn't.
"""

import dataclasses
from collections.abc import Iterator

from research.layers.attention import AttentionConfig
from research.layers.gated_deltanet import GatedDeltaNetConfig
from research.layers.mlp import MLPConfig
from research.layers.moe import MoEConfig, TopKRouter
from research.layers.norms import RMSNormConfig
from research.models.config import ModelConfig, MTPConfig, Residual
from research.models.hub import BranchViews, Family, Keys, ModelViews, Tensor, joined, parts


def config(keys: Keys) -> ModelConfig:
    keys.only("hidden_act", "silu")
    branches, sparse = mixers(keys), Residual("experts", experts(keys), pre_norm=norm(keys))
    dense = Residual("mlp", MLPConfig(keys["intermediate_size"]), pre_norm=norm(keys))
    layers = [
        (branches[kind], sparse if has_experts else dense)
        for kind, has_experts in zip(layer_types(keys), parts.sparse_layers(keys), strict=True)
    ]
    model = parts.language_model(keys, layers, norm(keys))
    heads = keys.only("num_nextn_predict_layers", 0, 1)
    return with_head(model, (branches["full_attention"], sparse)) if heads else model


def with_head(model: ModelConfig, head: tuple[Residual, ...]) -> ModelConfig:
    """With a head ahead of one layer, these branches."""
    mtp = MTPConfig(pattern=tuple(branch.name for branch in head))
    return dataclasses.replace(model, branches=tuple(dict.fromkeys((*model.branches, *head))), mtp=mtp)


def norm(keys: Keys) -> RMSNormConfig:
    return parts.rms_norm(keys, centred=True)


def mixers(keys: Keys) -> dict[str, Residual]:
    """Attention and Gated DeltaNet by their names in ``layer_types``."""
    bias = keys.get("attention_bias", False)
    attention = AttentionConfig(
        heads=keys["num_attention_heads"],
        key_heads=keys["num_key_value_heads"],
        head_width=keys.get("head_dim", 256),
        gated=True,
        qk_norm=norm(keys),
        bias=bias,
        out_bias=bias,
        **parts.rope(keys, fraction=0.25),
    )
    deltanet = GatedDeltaNetConfig(
        heads=keys["linear_num_value_heads"],
        key_heads=keys["linear_num_key_heads"],
        key_width=keys["linear_key_head_dim"],
        value_width=keys["linear_value_head_dim"],
        taps=keys["linear_conv_kernel_dim"],
        norm_eps=norm(keys).eps,
    )
    return {
        "full_attention": Residual("attention", attention, pre_norm=norm(keys)),
        "linear_attention": Residual("deltanet", deltanet, pre_norm=norm(keys)),
    }


def experts(keys: Keys) -> MoEConfig:
    return MoEConfig(
        experts=keys.either("num_experts", "num_local_experts"),
        per_token=keys["num_experts_per_tok"],
        hidden=keys["moe_intermediate_size"],
        shared_hidden=keys["shared_expert_intermediate_size"],
        shared_gate=True,
        router=TopKRouter(renormalise=keys.get("norm_topk_prob", True)),
    )


def layer_types(keys: Keys) -> list[str]:
    """Said for each layer, or by how many layers there are to one of attention."""
    interval = keys.get("full_attention_interval", 4)
    ours = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(keys["num_hidden_layers"])]
    return keys.get("layer_types", ours)


def gated_deltanet(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    """Projections are stored a key head after the other, each [q | k | v | z] and [b | a] with the value heads that read it."""
    c = branch.mixer(GatedDeltaNetConfig)
    G, R = c.key_heads, c.heads // c.key_heads
    keys, values = G * c.key_width, c.heads * c.value_width
    q, k, v = (view.T.split(0, G, -1) for view in branch["mixer.w_qkv_DN"].cut(1, keys, keys, values))
    z = branch["mixer.w_gate_DN"].T.split(0, G, -1)
    D = branch["mixer.w_out_ND"].shape[1]
    yield joined(f"{prefix}in_proj_qkvz.weight", q, k, v, z, axis=1, shape=(-1, D))
    b, a = (view.T.split(0, G, R) for view in branch["mixer.w_ba_DN"].cut(1, c.heads, c.heads))
    yield joined(f"{prefix}in_proj_ba.weight", b, a, axis=1, shape=(-1, D))
    yield from recurrence(prefix, branch)


def recurrence(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    """What lies between the projections in and the projection out, and that."""
    yield joined(f"{prefix}conv1d.weight", branch["mixer.w_conv_WN"].T.split(0, -1, 1))
    yield joined(f"{prefix}A_log", branch["mixer.log_rate_H"])
    yield joined(f"{prefix}dt_bias", branch["mixer.dt_bias_H"])
    yield joined(f"{prefix}norm.weight", branch["mixer.norm.scale_D"])
    yield parts.linear(f"{prefix}out_proj.weight", branch["mixer.w_out_ND"])


def fused(model: ModelViews) -> Iterator[Tensor]:
    """Experts together, as Qwen3.5's checkpoints have them."""
    feeds = [(f"model.layers.{n}.mlp.", branch) for n, branch in enumerate(model.branches[1::2])]
    feeds += [("mtp.layers.0.mlp.", head.branches[1]) for head in model.heads]
    for prefix, branch in feeds:
        if isinstance(branch.residual.mixer, MoEConfig):
            yield from parts.fused_experts(prefix, branch)


def tensors(model: ModelViews, deltanet=gated_deltanet) -> Iterator[Tensor]:
    yield from parts.ends(model)
    for n in range(len(model.branches) // 2):
        yield from _layer(f"model.layers.{n}.", model.branches[2 * n : 2 * n + 2], deltanet)
    for head in model.heads:
        yield joined("mtp.pre_fc_norm_embedding.weight", head["embedding_norm.scale_D"])
        yield joined("mtp.pre_fc_norm_hidden.weight", head["hidden_norm.scale_D"])
        yield parts.linear("mtp.fc.weight", head["w_merge_ND"])
        yield from _layer("mtp.layers.0.", head.branches, deltanet)
        yield joined("mtp.norm.weight", head["norm.scale_D"])


def _layer(prefix: str, branches: list[BranchViews], deltanet) -> Iterator[Tensor]:
    mixer, mlp = branches
    yield joined(f"{prefix}input_layernorm.weight", mixer["pre_norm.scale_D"])
    if isinstance(mixer.residual.mixer, AttentionConfig):
        yield from parts.attention(f"{prefix}self_attn.", mixer)
    else:
        yield from deltanet(f"{prefix}linear_attn.", mixer)
    yield joined(f"{prefix}post_attention_layernorm.weight", mlp["pre_norm.scale_D"])
    if isinstance(mlp.residual.mixer, MLPConfig):
        yield from parts.gated_mlp(f"{prefix}mlp.", mlp)
    else:
        yield from parts.experts(f"{prefix}mlp.", mlp)
        yield from parts.shared_expert(f"{prefix}mlp.shared_expert.", mlp)
        yield parts.linear(f"{prefix}mlp.shared_expert_gate.weight", mlp["mixer.w_shared_gate_D1"])


FAMILY = Family(
    model_types=("qwen3_next",),
    architectures=("Qwen3NextForCausalLM",),
    config=config,
    tensors=tensors,
    ignored=(r"mtp\..*",),
)
