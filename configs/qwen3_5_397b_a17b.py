"""Qwen3.5-397B-A17B's language model (Qwen Team 2026), at its published dimensions.

Command:  python -m experiments.train qwen3_5_397b_a17b data.source.paths='["corpus/*"]'
Cost:     397B parameters, 17B of them at work on a token: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import qwen3_5_35b_a3b as sibling
from research.models.families import model_config

# Qwen3.5-35B-A3B's config.json at another size.
HUB = sibling.HUB | {
    "hidden_size": 4096,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "linear_num_value_heads": 64,
}

CONFIG = dataclasses.replace(sibling.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
