"""Falcon Mamba 7B (Zuo et al. 2024, arXiv 2410.05355), at its published dimensions.

Command:  python -m experiments.train falcon_mamba_7b data.source.paths='["corpus/*"]'
Cost:     7.3B parameters: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import mamba_130m as mamba
from research.models.families import model_config

# Mamba's config.json, with B, C and step sizes normalised.
HUB = mamba.HUB | {
    "model_type": "falcon_mamba",
    "architectures": ["FalconMambaForCausalLM"],
    "vocab_size": 65024,
    "hidden_size": 4096,
    "expand": 16,
    "intermediate_size": 8192,
    "num_hidden_layers": 64,
    "mixer_rms_eps": 1e-06,
    "tie_word_embeddings": False,
}

CONFIG = dataclasses.replace(mamba.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
