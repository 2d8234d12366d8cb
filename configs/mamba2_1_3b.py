"""Mamba-2 1.3B (Dao & Gu 2024, arXiv 2405.21060), at its published dimensions.

Command:  python -m experiments.train mamba2_1_3b data.source.paths='["corpus/*"]'
Cost:     1.3B parameters: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import mamba2_130m as sibling
from research.models.families import model_config

# Mamba-2 130M's config.json at another size.
HUB = sibling.HUB | {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_heads": 64,
}

CONFIG = dataclasses.replace(sibling.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
