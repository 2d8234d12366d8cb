"""A hybrid mixture-of-experts language model on the source of Python's standard library.

Command:  make demo   (or: python -m experiments.train demo)
"""

from research.data.pipeline import BytePairEncoding, DataConfig, PythonStandardLibrary
from research.layers.attention import AttentionConfig
from research.layers.gated_deltanet import GatedDeltaNetConfig
from research.layers.moe import MoEConfig
from research.models.config import ModelConfig, Residual
from research.training.config import ExperimentConfig, TrainConfig
from research.training.optimizers import OptimizerConfig

CONFIG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=4096,
        width=192,
        branches=(
            Residual("deltanet", GatedDeltaNetConfig(heads=4, key_heads=2, key_width=48, value_width=48)),
            Residual("attention", AttentionConfig(heads=4, key_heads=2, head_width=48)),
            Residual("experts", MoEConfig(experts=16, per_token=2, hidden=64, shared_hidden=128, bias_rate=0.001)),
        ),
        pattern=("deltanet", "experts") * 3 + ("attention", "experts"),
        repeats=1,
    ),
    data=DataConfig(PythonStandardLibrary(), BytePairEncoding(4096), sequence_length=256, batch_size=16),
    optimizer=OptimizerConfig(learning_rate=4e-3),
    train=TrainConfig(steps=1000, checkpoint_every=250),
)
