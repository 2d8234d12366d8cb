"""Qwen3.5-0.8B's language model (Qwen Team 2026), at its published dimensions.

Command:  python -m experiments.train qwen3_5_0_8b data.source.paths='["corpus/*"]'
Cost:     0.8B parameters: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import qwen3_5_9b as sibling
from research.models.families import model_config

# Qwen3.5-9B's config.json at another size.
HUB = sibling.HUB | {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "linear_num_value_heads": 16,
    "tie_word_embeddings": True,
}

CONFIG = dataclasses.replace(sibling.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
