"""Mamba-2 780M (Dao & Gu 2024, arXiv 2405.21060), at its published dimensions.

Command:  python -m experiments.train mamba2_780m data.source.paths='["corpus/*"]'
Cost:     0.78B parameters: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import mamba2_130m as sibling
from research.models.families import model_config

# Mamba-2 130M's config.json at another size.
HUB = sibling.HUB | {
    "hidden_size": 1536,
    "num_hidden_layers": 48,
    "num_heads": 48,
}

CONFIG = dataclasses.replace(sibling.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
