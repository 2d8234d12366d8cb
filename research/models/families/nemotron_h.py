"""Nemotron-H (NVIDIA 2025, arXiv 2504.03624) and Nemotron 3 (arXiv 2512.20848): one mixer a block, mostly Mamba-2, a few of
attention without positions, and MLPs or experts of relu²; in the larger ones experts work in a latent."""

from collections.abc import Iterator

from research.layers.attention import AttentionConfig
from research.layers.mamba2 import Mamba2Config
from research.layers.mlp import MLPConfig
from research.layers.moe import Activation, MoEConfig, TopKRouter
from research.layers.norms import RMSNormConfig
from research.models.config import ModelConfig, Residual
from research.models.families import mamba2
from research.models.hub import BranchViews, Family, Keys, ModelViews, Tensor, joined, parts

KINDS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
OLD_KINDS = {"mamba": "linear_attention", "attention": "full_attention"}
RELU2 = Activation("relu2")


def config(keys: Keys) -> ModelConfig:
    keys.only("mamba_hidden_act", "silu")
    keys.only("mlp_hidden_act", "relu2")
    keys.only("sliding_window", None)
    for name in ("attention_bias", "mlp_bias"):
        keys.only(name, False)
    # Attention has no positions; transformers knows no heads that predict further ahead.
    keys.inert("rope_theta", "partial_rotary_factor", "num_nextn_predict_layers", "mtp_layers_block_type")
    keys.inert("mtp_hybrid_override_pattern", "mamba_proj_bias", "num_logits_to_keep", "moe_shared_expert_overlap")
    keys.inert("chunk_size", "mamba_ssm_cache_dtype", "use_mamba_kernels", "residual_in_fp32", "hidden_act")
    keys.inert("rescale_prenorm_residual", "time_step_floor", "time_step_max", "time_step_min", "time_step_rank")
    eps = keys.either("layer_norm_epsilon", "norm_eps", "rms_norm_eps", default=1e-5)
    norm, kinds = RMSNormConfig(eps=eps, centred=False), layer_types(keys)
    mixers = {
        "linear_attention": mamba,
        "full_attention": attention,
        "mlp": lambda keys, eps: MLPConfig(keys["intermediate_size"], RELU2),
        "moe": experts,
    }
    unused = {
        "linear_attention": MAMBA_KEYS,
        "full_attention": ("num_attention_heads", "num_key_value_heads", "head_dim", "attention_head_dim"),
        "mlp": ("intermediate_size",),
        "moe": EXPERT_KEYS,
    }
    branches = {kind: (Residual(kind, mixers[kind](keys, eps), pre_norm=norm),) for kind in dict.fromkeys(kinds)}
    for kind, names in unused.items():
        if kind not in branches:
            keys.inert(*names)
    return parts.language_model(keys, [branches[kind] for kind in kinds], norm)


MAMBA_KEYS = (
    "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "time_step_limit", "conv_kernel", "use_bias",
    "use_conv_bias", "expand",
)  # fmt: skip
EXPERT_KEYS = (
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
    "moe_latent_size", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "n_shared_experts",
)  # fmt: skip


def layer_types(keys: Keys) -> list[str]:
    """Listed, or a letter each."""
    listed: list[str] = keys.get("layers_block_type") or list(keys["hybrid_override_pattern"])
    keys.inert("hybrid_override_pattern")
    known = {**KINDS, **OLD_KINDS}
    kinds = [known.get(kind, kind) for kind in listed]
    for kind in dict.fromkeys(kinds):
        if kind not in KINDS.values():
            keys.refuse(f"layers_block_type must hold {', '.join(KINDS.values())}, got {kind!r}")
    return [kind for kind in kinds if kind in KINDS.values()]


def mamba(keys: Keys, eps: float) -> Mamba2Config:
    # The width is that of all heads; ``expand`` has a say in the initialisation only.
    keys.inert("expand")
    return Mamba2Config(
        heads=keys["mamba_num_heads"],
        head_width=keys["mamba_head_dim"],
        groups=keys["n_groups"],
        state_width=keys["ssm_state_size"],
        dt_limits=mamba2.step_limits(keys),
        taps=keys["conv_kernel"],
        bias=keys.get("use_bias", False),
        conv_bias=keys.get("use_conv_bias", True),
        norm_eps=eps,
    )


def attention(keys: Keys, eps: float) -> AttentionConfig:
    return AttentionConfig(
        heads=keys["num_attention_heads"],
        key_heads=keys["num_key_value_heads"],
        head_width=keys.either("head_dim", "attention_head_dim", default=128),
        rotary_fraction=0.0,
        gated=False,
        qk_norm=None,
    )


def experts(keys: Keys, eps: float) -> MoEConfig:
    keys.only("n_shared_experts", 1)
    groups = keys.get("n_group", 1)
    return MoEConfig(
        experts=keys["n_routed_experts"],
        per_token=keys["num_experts_per_tok"],
        hidden=keys["moe_intermediate_size"],
        shared_hidden=keys["moe_shared_expert_intermediate_size"],
        latent=keys.get("moe_latent_size", 0),
        activation=RELU2,
        router=TopKRouter(
            score="sigmoid",
            renormalise=keys.get("norm_topk_prob", True),
            scale=float(keys.get("routed_scaling_factor", 1.0)),
            top_groups=keys.get("topk_group", 1),
            group_score="top2",
        ),
        groups=groups,
        bias_rate=1e-3,
    )


def mlp(prefix: str, branch: BranchViews, into: str, out: str) -> Iterator[Tensor]:
    yield parts.linear(f"{prefix}up_proj.weight", branch[into])
    yield parts.linear(f"{prefix}down_proj.weight", branch[out])


def moe(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    yield parts.linear(f"{prefix}gate.weight", branch["mixer.w_router_DE"])
    yield joined(f"{prefix}gate.e_score_correction_bias", branch["mixer.bias_E"])
    for e in range(branch.mixer(MoEConfig).experts):
        yield parts.linear(f"{prefix}experts.{e}.up_proj.weight", branch["mixer.w_in_EDF"][e])
        yield parts.linear(f"{prefix}experts.{e}.down_proj.weight", branch["mixer.w_out_EFD"][e])
    yield from mlp(f"{prefix}shared_experts.", branch, "mixer.w_shared_in_DF", "mixer.w_shared_out_FD")
    if branch.mixer(MoEConfig).latent:
        yield parts.linear(f"{prefix}fc1_latent_proj.weight", branch["mixer.w_down_DL"])
        yield parts.linear(f"{prefix}fc2_latent_proj.weight", branch["mixer.w_up_LD"])


def mixer(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    match branch.residual.mixer:
        case Mamba2Config():
            return mamba2.mixer(prefix, branch)
        case AttentionConfig():
            return parts.attention(prefix, branch)
        case MoEConfig():
            return moe(prefix, branch)
        case _:
            return mlp(prefix, branch, "mixer.w_in_DF", "mixer.w_out_FD")


def tensors(model: ModelViews) -> Iterator[Tensor]:
    return parts.backbone(model, mixer)


FAMILY = Family(
    model_types=("nemotron_h",),
    architectures=("NemotronHForCausalLM",),
    config=config,
    tensors=tensors,
    ignored=(r"mtp\..*",),
)
