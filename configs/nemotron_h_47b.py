"""Nemotron-H 47B (NVIDIA 2025, arXiv 2504.03624, pruned from the 56B one), at its published dimensions.

Command:  python -m experiments.train nemotron_h_47b data.source.paths='["corpus/*"]'
Cost:     47B parameters: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import nemotron_h_8b as sibling
from research.models.families import model_config

# Nemotron-H 8B's config.json at another size.
HUB = sibling.HUB | {
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "mamba_num_heads": 256,
    "ssm_state_size": 256,
    "intermediate_size": 30720,
    "num_hidden_layers": 98,
    "hybrid_override_pattern": (
        "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
    ),
}

CONFIG = dataclasses.replace(sibling.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
