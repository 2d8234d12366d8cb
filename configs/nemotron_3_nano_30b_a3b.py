"""Nemotron 3 Nano 30B-A3B (NVIDIA 2025, arXiv 2512.20848), at its published dimensions.

Command:  python -m experiments.train nemotron_3_nano_30b_a3b data.source.paths='["corpus/*"]'
Cost:     31.6B parameters, 3.2B of them at work on a token: for a mesh of many accelerators.
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
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "vocab_size": 131072,
    "hidden_size": 2688,
    "num_hidden_layers": 52,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
}

CONFIG = ExperimentConfig(
    model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True),
    data=DataConfig(TokenArrayRecords(dtype="uint32"), sequence_length=4096, batch_size=1024),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=2000),
    train=TrainConfig(steps=100_000, checkpoint_every=1000),
)
