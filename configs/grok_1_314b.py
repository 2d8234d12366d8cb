"""Grok-1 (xAI 2024), at its published dimensions.

Command:  python -m experiments.train grok_1_314b data.source.paths='["corpus/*"]'
Cost:     314B parameters, 86B of them at work on a token: for a mesh of many accelerators.
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
    "vocab_size": 131072,
    "embedding_multiplier_scale": 78.38367176906169,
    "output_multiplier_scale": 0.5773502691896257,
    "model": {
        "emb_size": 6144,
        "widening_factor": 8,
        "key_size": 128,
        "num_q_heads": 48,
        "num_kv_heads": 8,
        "num_layers": 64,
        "attn_output_multiplier": 0.08838834764831845,
        "num_experts": 8,
        "num_selected_experts": 2,
    },
}

CONFIG = ExperimentConfig(
    model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True),
    data=DataConfig(TokenArrayRecords(dtype="uint32"), sequence_length=4096, batch_size=1024),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=2000),
    train=TrainConfig(steps=100_000, checkpoint_every=1000),
)
