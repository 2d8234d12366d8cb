"""H-Net, two stages, XL, the one for code (Hwang, Wang & Gu 2025, arXiv 2507.07955), at its published dimensions.

Command:  python -m experiments.train hnet_2stage_xl_code data.source.paths='["corpus/*"]'
Cost:     1.7B parameters; compute matched to GPT-3 XL: for a mesh of accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import hnet_2stage_xl as english
from research.models.families import model_config

# The authors' configs/hnet_2stage_XL_code.json (github.com/goombalab/hnet).
HUB = english.HUB | {
    "arch_layout": ["m4", ["T1m4", ["T28"], "m4T1"], "m4"],
}

CONFIG = dataclasses.replace(
    english.CONFIG,
    model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True),
)
