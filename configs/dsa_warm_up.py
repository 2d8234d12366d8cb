"""DeepSeek sparse attention, first stage: attention stays dense, and new indexers learn where it looks. Nothing else moves.

Command:  python -m experiments.train dsa_warm_up      (after: python -m experiments.train mla)
Cost:     150 steps of 2,048 bytes; two minutes on two CPU cores.
Expected: metrics.jsonl shows index_loss (summed over layers) fall and index_captured, the share of dense attention on the 32
          of up to 256 tokens that indexers would choose, rise; held-out bits per byte are those of ``mla`` to the bit.
"""

import dataclasses

from configs.mla import ATTENTION
from configs.mla import CONFIG as DENSE
from research.layers.dsa import DSAConfig
from research.models.config import Residual
from research.training.config import TrainConfig
from research.training.optimizers import OptimizerConfig

SPARSE = DSAConfig(**vars(ATTENTION), index_heads=8, index_width=32, top_k=32, stage="warm_up")
CONFIG = dataclasses.replace(
    DENSE,
    model=dataclasses.replace(DENSE.model, branches=(Residual("attention", SPARSE), DENSE.model.branches[1])),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10, weight_decay=0.0, trainable=("*.indexer.*",)),
    train=TrainConfig(steps=150, checkpoint_every=150, start_from="runs/mla"),
)
