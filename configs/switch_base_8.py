"""Switch-Base with 8 experts (Fedus et al. 2021, arXiv 2101.03961) as a decoder: one expert a token in every other layer, with
a capacity of 1.25 per sequence; what overflows passes by.

Published, it is T5: an encoder and a decoder of 12 layers each, attention between them, relative position biases instead of
RoPE. Here are the 24 layers and the published widths (the authors' T5X configuration, google/flaxformer,
switch_classic_base.gin). Other sizes are ``switch_base_128``, ``switch_large_128``, ``switch_xxl_128`` and ``switch_c_2048``.

Command:  python -m experiments.train switch_base_8 data.source.paths='["corpus/*"]'
Cost:     0.6 billion parameters: days on one accelerator.
Expected: no run of it has been made here; the paper's figure 4 compares its speed with T5's.
"""

from research.data.pipeline import DataConfig
from research.data.token_records import TokenArrayRecords
from research.layers.attention import AttentionConfig
from research.layers.mlp import MLPConfig
from research.layers.moe import Activation, Capacity, MoEConfig, TopKRouter
from research.models.config import ModelConfig, Residual
from research.training.config import ExperimentConfig, TrainConfig
from research.training.optimizers import OptimizerConfig

SWITCH = MoEConfig(
    experts=8,
    per_token=1,
    hidden=3072,
    shared_hidden=0,
    activation=Activation("relu"),
    router=TopKRouter(renormalise=False, jitter=0.01),
    dispatch=Capacity(1.25),
    balance_loss=0.01,
    z_loss=0.0,
)

CONFIG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=32128,
        width=768,
        branches=(
            Residual(
                "attention", AttentionConfig(heads=12, key_heads=12, rotary_fraction=1.0, gated=False, qk_norm=None)
            ),
            Residual("mlp", MLPConfig(3072, Activation("relu"))),
            Residual("switch", SWITCH),
        ),
        pattern=("attention", "mlp", "attention", "switch"),
        repeats=12,
        tie_embeddings=True,
        dtype="bfloat16",
    ),
    data=DataConfig(TokenArrayRecords(), sequence_length=512, batch_size=256),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1000),
    train=TrainConfig(steps=100_000, checkpoint_every=1000),
)
