"""DeepSeek sparse attention, second stage: every token attends to the 32 that its indexer chooses, and all parameters train.

Command:  python -m experiments.train dsa_sparse       (after: python -m experiments.train dsa_warm_up)
Cost:     100 steps of 2,048 bytes; two minutes on two CPU cores.
Expected: 2.39 bits per held-out byte. ``mla`` has 2.43, with these 100 steps (and their lower rate) less: not a comparison
          of dense with sparse.
"""

import dataclasses

from configs.dsa_warm_up import CONFIG as WARM_UP
from configs.dsa_warm_up import SPARSE
from research.models.config import Residual
from research.training.config import TrainConfig
from research.training.optimizers import OptimizerConfig

CONFIG = dataclasses.replace(
    WARM_UP,
    model=dataclasses.replace(
        WARM_UP.model,
        branches=(Residual("attention", dataclasses.replace(SPARSE, stage="sparse")), WARM_UP.model.branches[1]),
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10),
    train=TrainConfig(steps=100, checkpoint_every=100, start_from="runs/dsa_warm_up"),
)
