"""MiniCPM-MoE 8x2B (Hu et al. 2024, arXiv 2404.06395), at its published dimensions.

Command:  python -m experiments.train minicpm_moe_8x2b data.source.paths='["corpus/*"]'
Cost:     13.6B parameters, 4B of them at work on a token: for a mesh of many accelerators.
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
    "model_type": "minicpm",
    "architectures": ["MiniCPMForCausalLM"],
    "vocab_size": 122753,
    "hidden_size": 2304,
    "intermediate_size": 5760,
    "num_hidden_layers": 40,
    "num_attention_heads": 36,
    "num_key_value_heads": 36,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "scale_emb": 12,
    "dim_model_base": 256,
    "scale_depth": 1.4,
    "max_position_embeddings": 4096,
}

CONFIG = ExperimentConfig(
    model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True),
    data=DataConfig(TokenArrayRecords(dtype="uint32"), sequence_length=4096, batch_size=1024),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=2000),
    train=TrainConfig(steps=100_000, checkpoint_every=1000),
)
