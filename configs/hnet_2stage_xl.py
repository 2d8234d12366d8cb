"""H-Net, two stages, XL (Hwang, Wang & Gu 2025, arXiv 2507.07955), at its published dimensions.

Command:  python -m experiments.train hnet_2stage_xl data.source.paths='["corpus/*"]'
Cost:     1.6B parameters; compute matched to GPT-3 XL: for a mesh of accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import hnet_1stage_l as large
from research.models.families import model_config

# The authors' configs/hnet_2stage_XL.json (github.com/goombalab/hnet).
HUB = large.HUB | {
    "arch_layout": ["m4", ["T1m4", ["T27"], "m4T1"], "m4"],
    "d_model": [1024, 1536, 2048],
    "d_intermediate": [0, 4096, 5504],
    "attn_cfg": {"num_heads": [16, 16, 16], "rotary_emb_dim": [32, 48, 64], "window_size": [1023, 1023, -1]},
}

CONFIG = dataclasses.replace(
    large.CONFIG,
    model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True),
    optimizer=dataclasses.replace(large.CONFIG.optimizer, learning_rate=5e-4),
)
