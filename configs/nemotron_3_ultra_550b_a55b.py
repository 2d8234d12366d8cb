"""Nemotron 3 Ultra 550B-A55B (NVIDIA 2026), whose experts work in a latent, at its published dimensions.

Command:  python -m experiments.train nemotron_3_ultra_550b_a55b data.source.paths='["corpus/*"]'
Cost:     550B parameters, 55B of them at work on a token: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import nemotron_3_nano_30b_a3b as nano
from research.models.families import model_config

# Nemotron 3 Nano's config.json at another size, and the latent.
HUB = nano.HUB | {
    "hidden_size": 8192,
    "num_hidden_layers": 108,
    "num_attention_heads": 64,
    "hybrid_override_pattern": (
        "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
    ),
    "mamba_num_heads": 256,
    "moe_intermediate_size": 5120,
    "moe_shared_expert_intermediate_size": 10240,
    "moe_latent_size": 2048,
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "routed_scaling_factor": 5.0,
    "max_position_embeddings": 1048576,
}

CONFIG = dataclasses.replace(nano.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
