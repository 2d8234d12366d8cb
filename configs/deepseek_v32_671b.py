"""DeepSeek-V3.2 (DeepSeek-AI 2025), at its published dimensions.

Command:  python -m experiments.train deepseek_v32_671b data.source.paths='["corpus/*"]'
Cost:     671B parameters, 37B of them at work on a token: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import deepseek_v3_671b as dense
from research.models.families import model_config

# DeepSeek-V3's config.json, and the indexer.
HUB = dense.HUB | {
    "model_type": "deepseek_v32",
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_topk": 2048,
    "index_n_heads": 64,
    "index_head_dim": 128,
}

CONFIG = dataclasses.replace(dense.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
