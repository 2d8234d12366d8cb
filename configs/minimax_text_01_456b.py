"""MiniMax-Text-01 (MiniMax 2025, arXiv 2501.08313), and M1 (arXiv 2506.13585), which is trained on from it, at its published dimensions.

Command:  python -m experiments.train minimax_text_01_456b data.source.paths='["corpus/*"]'
Cost:     456B parameters, 45.9B of them at work on a token: for a mesh of many accelerators.
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
    "model_type": "minimax_text_01",
    "architectures": ["MiniMaxText01ForCausalLM"],
    "vocab_size": 200064,
    "hidden_size": 6144,
    "intermediate_size": 9216,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rotary_dim": 64,
    "rope_theta": 10000000,
    "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
    "num_local_experts": 32,
    "num_experts_per_tok": 2,
    "postnorm": True,
    "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455,
    "layernorm_mlp_beta": 1.0,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 10240000,
}

CONFIG = ExperimentConfig(
    model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True),
    data=DataConfig(TokenArrayRecords(dtype="uint32"), sequence_length=4096, batch_size=1024),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=2000),
    train=TrainConfig(steps=100_000, checkpoint_every=1000),
)
