"""Qwen3.5-27B's language model (Qwen Team 2026), at its published dimensions.

Command:  python -m experiments.train qwen3_5_27b data.source.paths='["corpus/*"]'
Cost:     27B parameters: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import qwen3_5_9b as sibling
from research.models.families import model_config

# Qwen3.5-9B's config.json at another size.
HUB = sibling.HUB | {
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 64,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "linear_num_value_heads": 48,
}

CONFIG = dataclasses.replace(sibling.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
