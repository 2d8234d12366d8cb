"""Qwen3.5-4B's language model (Qwen Team 2026), at its published dimensions.

Command:  python -m experiments.train qwen3_5_4b data.source.paths='["corpus/*"]'
Cost:     4B parameters: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import qwen3_5_9b as sibling
from research.models.families import model_config

# Qwen3.5-9B's config.json at another size.
HUB = sibling.HUB | {
    "hidden_size": 2560,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "linear_num_value_heads": 32,
    "tie_word_embeddings": True,
}

CONFIG = dataclasses.replace(sibling.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
