"""H-Net, one stage, Large (Hwang, Wang & Gu 2025, arXiv 2507.07955), at its published dimensions.

Command:  python -m experiments.train hnet_1stage_l data.source.paths='["corpus/*"]'
Cost:     0.68B parameters; compute matched to GPT-3 Large: for a mesh of accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from research.data.pipeline import Bytes, DataConfig, TextFiles
from research.models.families import model_config
from research.training.config import ExperimentConfig, TrainConfig
from research.training.optimizers import OptimizerConfig

# The authors' configs/hnet_1stage_L.json (github.com/goombalab/hnet).
HUB = {
    "arch_layout": ["m4", ["T22"], "m4"],
    "d_model": [1024, 1536],
    "d_intermediate": [0, 4096],
    "vocab_size": 256,
    "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 128, "expand": 2},
    "attn_cfg": {"num_heads": [16, 16], "rotary_emb_dim": [32, 48], "window_size": [1023, -1]},
    "tie_embeddings": False,
}

CONFIG = ExperimentConfig(
    model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True),
    data=DataConfig(TextFiles(), Bytes(inside=True), sequence_length=8192, batch_size=256),
    optimizer=OptimizerConfig(learning_rate=6.25e-4, warmup_steps=2000),
    train=TrainConfig(steps=100_000, checkpoint_every=1000),
)
