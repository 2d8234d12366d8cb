"""An H-Net on bytes of Python's standard library: it learns where to cut them, and runs its widest layers over the chunks.

Command:  python -m experiments.train hnet       then: python -m experiments.lecture.hnet runs/hnet
Cost:     400 steps of 2,048 bytes; five minutes on two CPU cores; 0.9 million parameters.
Expected: 2.32 bits per held-out byte; tokens_per_chunk in metrics.jsonl settles near the 5 that the ratio loss asks for (4.6 over
          the last ten steps): benchmarks/results/cpu/hnet.json.
"""

from research.data.pipeline import Bytes, DataConfig, PythonStandardLibrary
from research.layers.attention import AttentionConfig
from research.layers.mamba2 import Mamba2Config
from research.layers.mlp import MLPConfig
from research.models.config import HNetConfig, ModelConfig, Residual
from research.training.config import ExperimentConfig, TrainConfig
from research.training.optimizers import OptimizerConfig

CHUNKS = HNetConfig(
    branches=(
        Residual("attention", AttentionConfig(heads=2, key_heads=1, head_width=64)),
        Residual("mlp", MLPConfig(hidden=384)),
    ),
    pattern=("attention", "mlp"),
    repeats=3,
    width=128,
    ratio=5.0,
    capacity=0.5,
)
CONFIG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=259,
        width=96,
        branches=(
            Residual("mamba", Mamba2Config(heads=4, head_width=32, state_width=32)),
            Residual("chunks", CHUNKS, skip_scale=0.0),
        ),
        pattern=("mamba", "mamba", "chunks", "mamba", "mamba"),
    ),
    data=DataConfig(PythonStandardLibrary(), Bytes(), sequence_length=256, batch_size=8, held_out_bytes=100_000),
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50),
    train=TrainConfig(steps=400, checkpoint_every=100),
)
