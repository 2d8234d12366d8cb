"""H-Net, two stages, Large (Hwang, Wang & Gu 2025, arXiv 2507.07955), at its published dimensions.

Command:  python -m experiments.train hnet_2stage_l data.source.paths='["corpus/*"]'
Cost:     0.87B parameters; compute matched to GPT-3 Large: for a mesh of accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import hnet_1stage_l as large
from research.models.families import model_config

# The authors' configs/hnet_2stage_L.json (github.com/goombalab/hnet).
HUB = large.HUB | {
    "arch_layout": ["m4", ["T1m4", ["T26"], "m4T1"], "m4"],
    "d_model": [1024, 1024, 1536],
    "d_intermediate": [0, 2816, 4096],
    "attn_cfg": {"num_heads": [16, 16, 16], "rotary_emb_dim": [32, 32, 48], "window_size": [1023, 1023, -1]},
}

CONFIG = dataclasses.replace(
    large.CONFIG,
    model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True),
)
