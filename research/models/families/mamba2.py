"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060) as transformers stores it: Codestral Mamba."""

import math
from collections.abc import Iterator

from research.layers.mamba2 import Mamba2Config
from research.layers.norms import RMSNormConfig
from research.models.config import ModelConfig, Residual
from research.models.hub import BranchViews, Family, Keys, ModelViews, Tensor, joined, parts


def config(keys: Keys) -> ModelConfig:
    keys.only("hidden_act", "silu")
    # A residual stream in float32 where the model computes in less: a matter of rounding.
    keys.inert("chunk_size", "residual_in_fp32", "time_step_rank", "norm_before_gate", "rms_norm", "intermediate_size")
    keys.inert("rescale_prenorm_residual", "time_step_floor", "time_step_max", "time_step_min")
    mamba = Mamba2Config(
        heads=keys["num_heads"],
        head_width=keys["head_dim"],
        groups=keys["n_groups"],
        state_width=keys["state_size"],
        dt_limits=step_limits(keys),
        taps=keys["conv_kernel"],
        bias=keys.get("use_bias", False),
        conv_bias=keys.get("use_conv_bias", True),
        norm_eps=keys["layer_norm_epsilon"],
    )
    if mamba.inner != keys.get("expand", 2) * keys["hidden_size"]:
        keys.refuse(f"expand times hidden_size must be the {mamba.inner} channels of all heads")
    norm = RMSNormConfig(eps=mamba.norm_eps, centred=False)
    layer = (Residual("mamba2", mamba, pre_norm=norm),)
    return parts.language_model(keys, [layer] * keys["num_hidden_layers"], norm)


def step_limits(keys: Keys) -> tuple[float, float] | None:
    """JSON has no infinity: transformers 5 writes an object."""
    limits = [float(x["__float__"] if isinstance(x, dict) else x) for x in keys.get("time_step_limit", [0.0, math.inf])]
    return None if limits == [0.0, math.inf] else (limits[0], limits[1])


def mixer(prefix: str, branch: BranchViews) -> Iterator[Tensor]:
    c = branch.mixer(Mamba2Config)
    yield parts.linear(f"{prefix}in_proj.weight", branch["mixer.w_in_DN"])
    yield joined(f"{prefix}conv1d.weight", branch["mixer.w_conv_WN"].T.split(0, -1, 1))
    if c.conv_bias:
        yield joined(f"{prefix}conv1d.bias", branch["mixer.conv_bias_N"])
    yield joined(f"{prefix}A_log", branch["mixer.log_rate_H"])
    yield joined(f"{prefix}dt_bias", branch["mixer.dt_bias_H"])
    yield joined(f"{prefix}D", branch["mixer.skip_H"])
    yield joined(f"{prefix}norm.weight", branch["mixer.norm_N"])
    yield parts.linear(f"{prefix}out_proj.weight", branch["mixer.w_out_ND"])
    if c.bias:
        yield joined(f"{prefix}in_proj.bias", branch["mixer.bias_N"])
        yield joined(f"{prefix}out_proj.bias", branch["mixer.out_bias_D"])


def tensors(model: ModelViews) -> Iterator[Tensor]:
    return parts.backbone(model, mixer)


FAMILY = Family(
    model_types=("mamba2",),
    architectures=("Mamba2ForCausalLM",),
    config=config,
    tensors=tensors,
    ignored=(r"lm_head\.weight",),
)
