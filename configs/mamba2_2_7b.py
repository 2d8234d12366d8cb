"""Mamba-2 2.7B (Dao & Gu 2024, arXiv 2405.21060), at its published dimensions.

Command:  python -m experiments.train mamba2_2_7b data.source.paths='["corpus/*"]'
Cost:     2.7B parameters: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import mamba2_130m as sibling
from research.models.families import model_config

# Mamba-2 130M's config.json at another size.
HUB = sibling.HUB | {
    "hidden_size": 2560,
    "num_hidden_layers": 64,
    "num_heads": 80,
}

CONFIG = dataclasses.replace(sibling.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
