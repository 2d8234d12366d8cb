"""The demo's architecture at the size of a thumbnail: does everything work?

Command:  python -m experiments.train tiny
Cost:     under a minute on two CPU cores, nearly all of it compilation; 41 thousand parameters.
Expected: about 3.9 bits per held-out byte: better than the order-0 model's 4.85, and no language yet.
"""

from research.data.pipeline import Bytes, DataConfig, PythonStandardLibrary
from research.layers.attention import AttentionConfig
from research.layers.gated_deltanet import GatedDeltaNetConfig
from research.layers.moe import MoEConfig
from research.models.config import ModelConfig, Residual
from research.training.config import ExperimentConfig, TrainConfig
from research.training.optimizers import OptimizerConfig

CONFIG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=259,
        width=32,
        branches=(
            Residual("deltanet", GatedDeltaNetConfig(heads=2, key_heads=1, key_width=16, value_width=16)),
            Residual("attention", AttentionConfig(heads=2, key_heads=1, head_width=16)),
            Residual("experts", MoEConfig(experts=4, per_token=2, hidden=16, shared_hidden=16, bias_rate=0.001)),
        ),
        pattern=("deltanet", "experts", "attention", "experts"),
    ),
    data=DataConfig(PythonStandardLibrary(), Bytes(), sequence_length=64, batch_size=8, held_out_bytes=20_000),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10),
    train=TrainConfig(steps=100, checkpoint_every=50),
)
