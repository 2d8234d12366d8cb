"""Mamba-2 130M (Dao & Gu 2024, arXiv 2405.21060), at its published dimensions.

Command:  python -m experiments.train mamba2_130m data.source.paths='["corpus/*"]'
Cost:     0.13B parameters: for a mesh of many accelerators.
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
    "model_type": "mamba2",
    "architectures": ["Mamba2ForCausalLM"],
    "vocab_size": 50288,
    "hidden_size": 768,
    "num_hidden_layers": 24,
    "num_heads": 24,
    "head_dim": 64,
    "n_groups": 1,
    "state_size": 128,
    "conv_kernel": 4,
    "expand": 2,
    "use_bias": False,
    "use_conv_bias": True,
    "layer_norm_epsilon": 1e-05,
    "tie_word_embeddings": True,
}

CONFIG = ExperimentConfig(
    model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True),
    data=DataConfig(TokenArrayRecords(dtype="uint32"), sequence_length=4096, batch_size=1024),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=2000),
    train=TrainConfig(steps=100_000, checkpoint_every=1000),
)
