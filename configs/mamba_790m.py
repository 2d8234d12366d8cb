"""Mamba 790M (Gu & Dao 2023, arXiv 2312.00752), at its published dimensions.

Command:  python -m experiments.train mamba_790m data.source.paths='["corpus/*"]'
Cost:     0.79B parameters: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import mamba_130m as sibling
from research.models.families import model_config

# Mamba 130M's config.json at another size.
HUB = sibling.HUB | {
    "hidden_size": 1536,
    "num_hidden_layers": 48,
}

CONFIG = dataclasses.replace(sibling.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
