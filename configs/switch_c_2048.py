"""Switch-C (Fedus et al. 2021, arXiv 2101.03961) as a decoder: as deep as the published encoder and decoder together, and
as wide, so that it lacks the parameters of attention between them alone. See ``switch_base_8``.

Dimensions of the authors' T5X configuration (google/flaxformer, switch_classic_c.gin): experts in every layer.

Command:  python -m experiments.train switch_c_2048 data.source.paths='["corpus/*"]'
Cost:     1.6 trillion parameters: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import switch_base_8 as base
from research.layers.attention import AttentionConfig
from research.layers.moe import Capacity
from research.models.config import ModelConfig, Residual

SWITCH = dataclasses.replace(base.SWITCH, experts=2048, hidden=6144, dispatch=Capacity(1.0))

CONFIG = dataclasses.replace(
    base.CONFIG,
    model=ModelConfig(
        vocab_size=32128,
        width=2080,
        branches=(
            Residual(
                "attention",
                AttentionConfig(heads=30, key_heads=30, rotary_fraction=1.0, gated=False, qk_norm=None),
            ),
            Residual("switch", SWITCH),
        ),
        pattern=("attention", "switch"),
        repeats=30,
        dtype="bfloat16",
        remat=True,
    ),
)
