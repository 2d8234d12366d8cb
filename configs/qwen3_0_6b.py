"""Qwen3-0.6B (Qwen Team 2025, arXiv 2505.09388), at its published dimensions.

Command:  python -m experiments.train qwen3_0_6b data.source.paths='["corpus/*"]'
Cost:     0.6B parameters: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import qwen3_8b as sibling
from research.models.families import model_config

# Qwen3-8B's config.json at another size.
HUB = sibling.HUB | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}

CONFIG = dataclasses.replace(sibling.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
