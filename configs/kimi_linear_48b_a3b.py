"""Kimi Linear 48B-A3B (Kimi Team 2025, arXiv 2510.26692), at its published dimensions.

Command:  python -m experiments.train kimi_linear_48b_a3b data.source.paths='["corpus/*"]'
Cost:     48B parameters, 3B of them at work on a token: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from research.data.pipeline import DataConfig
from research.data.token_records import TokenArrayRecords
from research.models.families import model_config
from research.training.config import ExperimentConfig, TrainConfig
from research.training.optimizers import OptimizerConfig

# What its config.json says of the mathematics.
HUB = {
    "model_type": "kimi_linear",
    "architectures": ["KimiLinearForCausalLM"],
    "vocab_size": 163840,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "mla_use_nope": True,
    "first_k_dense_replace": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_shared_experts": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "routed_scaling_factor": 2.446,
    "rms_norm_eps": 1e-05,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "num_heads": 32,
        "head_dim": 128,
        "short_conv_kernel_size": 4,
    },
}

CONFIG = ExperimentConfig(
    model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True),
    data=DataConfig(TokenArrayRecords(dtype="uint32"), sequence_length=4096, batch_size=1024),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=2000),
    train=TrainConfig(steps=100_000, checkpoint_every=1000),
)
