"""Switch-XXL (Fedus et al. 2021, arXiv 2101.03961) as a decoder: as deep as the published encoder and decoder together, and
as wide, so that it lacks the parameters of attention between them alone. See ``switch_base_8``.

Dimensions of the authors' T5X configuration (google/flaxformer, switch_classic_xxl.gin) with 128 experts, which the published
parameters ask for; the paper's table says 64.

Command:  python -m experiments.train switch_xxl_128 data.source.paths='["corpus/*"]'
Cost:     395 billion parameters: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import switch_base_8 as base
from research.layers.attention import AttentionConfig
from research.layers.mlp import MLPConfig
from research.layers.moe import Activation
from research.models.config import ModelConfig, Residual

SWITCH = dataclasses.replace(base.SWITCH, experts=128, hidden=10240, activation=Activation("geglu"))

CONFIG = dataclasses.replace(
    base.CONFIG,
    model=ModelConfig(
        vocab_size=32128,
        width=4096,
        branches=(
            Residual(
                "attention",
                AttentionConfig(heads=64, key_heads=64, rotary_fraction=1.0, gated=False, qk_norm=None),
            ),
            Residual("mlp", MLPConfig(10240, Activation("geglu"))),
            Residual("switch", SWITCH),
        ),
        pattern=("attention", "mlp", "attention", "switch"),
        repeats=24,
        dtype="bfloat16",
        remat=True,
    ),
)
