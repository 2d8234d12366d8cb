"""Llama 3.1 405B (Meta 2024, arXiv 2407.21783), the dense baseline, at its published dimensions.

Command:  python -m experiments.train llama3_405b data.source.paths='["corpus/*"]'
Cost:     405B parameters: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import llama3_8b as small
from research.models.families import model_config

# Llama 3's config.json, with RoPE's frequencies scaled for 128K tokens.
HUB = small.HUB | {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}

CONFIG = dataclasses.replace(small.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
