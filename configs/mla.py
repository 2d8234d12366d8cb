"""Latent attention on bytes of Python's standard library: the dense model that ``dsa_warm_up`` and ``dsa_sparse`` go on from.

Command:  python -m experiments.train mla
Cost:     500 steps of 2,048 bytes; five minutes on two CPU cores; 0.5 million parameters.
Expected: about 2.43 bits per held-out byte.
"""

from research.data.pipeline import Bytes, DataConfig, PythonStandardLibrary
from research.layers.mla import MLAConfig
from research.layers.mlp import MLPConfig
from research.models.config import ModelConfig, Residual
from research.training.config import ExperimentConfig, TrainConfig
from research.training.optimizers import OptimizerConfig

ATTENTION = MLAConfig(heads=4, nope_width=16, rope_width=16, value_width=32, latent=48)
CONFIG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=259,
        width=128,
        branches=(Residual("attention", ATTENTION), Residual("mlp", MLPConfig(hidden=256))),
        pattern=("attention", "mlp"),
        repeats=3,
    ),
    data=DataConfig(PythonStandardLibrary(), Bytes(), sequence_length=256, batch_size=8, held_out_bytes=100_000),
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50),
    train=TrainConfig(steps=500, checkpoint_every=250),
)
