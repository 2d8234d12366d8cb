"""Mamba (Gu & Dao 2023, arXiv 2312.00752) as transformers stores it."""

from collections.abc import Iterator

from research.layers.mamba import MambaConfig
from research.layers.norms import RMSNormConfig
from research.models.config import ModelConfig, Residual
from research.models.hub import BranchViews, Family, Keys, ModelViews, Tensor, joined, parts


def config(keys: Keys) -> ModelConfig:
    return model(keys)


def model(keys: Keys, select_norm_eps: float | None = None) -> ModelConfig:
    """Of Mamba and Falcon Mamba."""
    keys.only("hidden_act", "silu")
    # A residual stream in float32 where the model computes in less: a matter of rounding.
    keys.inert("residual_in_fp32", "rescale_prenorm_residual", "use_associative_scan", "use_mambapy")
    keys.inert("time_step_floor", "time_step_init_scheme", "time_step_max", "time_step_min", "time_step_scale")
    # Of the authors' own configuration, left in some directories; what they say, the keys above repeat.
    keys.inert("d_inner", "d_model", "fused_add_norm", "n_layer", "rms_norm", "ssm_cfg", "pad_vocab_size_multiple")
    width, rank = keys["hidden_size"], keys.get("time_step_rank", "auto")
    mamba = MambaConfig(
        # Falcon Mamba's says expand: 16 beside the intermediate_size that its tensors have.
        channels=keys.get("intermediate_size", int(keys.get("expand", 2) * width)),
        state_width=keys["state_size"],
        dt_rank=-(-width // 16) if rank == "auto" else rank,
        taps=keys["conv_kernel"],
        bias=keys.get("use_bias", False),
        conv_bias=keys.get("use_conv_bias", True),
        select_norm_eps=select_norm_eps,
    )
    norm = RMSNormConfig(eps=keys.get("layer_norm_epsilon", 1e-5), centred=False)
    layer = (Residual("mamba", mamba, pre_norm=norm),)
    return parts.language_model(keys, [layer] * keys["num_hidden_layers"], norm, tied=True)


def mixer(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    c = branch.mixer(MambaConfig)
    yield parts.linear(f"{prefix}in_proj.weight", branch["mixer.w_in_DN"])
    yield joined(f"{prefix}conv1d.weight", branch["mixer.w_conv_WN"].T.split(0, -1, 1))
    if c.conv_bias:
        yield joined(f"{prefix}conv1d.bias", branch["mixer.conv_bias_N"])
    yield parts.linear(f"{prefix}x_proj.weight", branch["mixer.w_select_NM"])
    yield parts.linear(f"{prefix}dt_proj.weight", branch["mixer.w_dt_RN"])
    yield joined(f"{prefix}dt_proj.bias", branch["mixer.dt_bias_N"])
    yield joined(f"{prefix}A_log", branch["mixer.log_rate_NK"])
    yield joined(f"{prefix}D", branch["mixer.skip_N"])
    yield parts.linear(f"{prefix}out_proj.weight", branch["mixer.w_out_ND"])
    if c.bias:
        yield joined(f"{prefix}in_proj.bias", branch["mixer.bias_N"])
        yield joined(f"{prefix}out_proj.bias", branch["mixer.out_bias_D"])


def tensors(model: ModelViews) -> Iterator[Tensor]:
    return parts.backbone(model, mixer)


FAMILY = Family(
    model_types=("mamba",),
    architectures=("MambaForCausalLM",),
    config=config,
    tensors=tensors,
    ignored=(r"lm_head\.weight",),
)
