"""Qwen3-4B (Qwen Team 2025, arXiv 2505.09388), at its published dimensions.

Command:  python -m experiments.train qwen3_4b data.source.paths='["corpus/*"]'
Cost:     4B parameters: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import qwen3_8b as sibling
from research.models.families import model_config

# Qwen3-8B's config.json at another size.
HUB = sibling.HUB | {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": True,
}

CONFIG = dataclasses.replace(sibling.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
