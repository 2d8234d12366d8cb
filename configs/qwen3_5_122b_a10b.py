"""Qwen3.5-122B-A10B's language model (Qwen Team 2026), at its published dimensions.

Command:  python -m experiments.train qwen3_5_122b_a10b data.source.paths='["corpus/*"]'
Cost:     122B parameters, 10B of them at work on a token: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import qwen3_5_35b_a3b as sibling
from research.models.families import model_config

# Qwen3.5-35B-A3B's config.json at another size.
HUB = sibling.HUB | {
    "hidden_size": 3072,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "linear_num_value_heads": 64,
}

CONFIG = dataclasses.replace(sibling.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
