"""GLM-5.2 (GLM-5 Team 2026), whose layers share indices, at its published dimensions.

Command:  python -m experiments.train glm_5_2_744b data.source.paths='["corpus/*"]'
Cost:     744B parameters, 40B of them at work on a token: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import glm_5_744b as before
from research.models.families import model_config

# GLM-5's config.json: past the third layer one in four chooses, and the others read what it chose. GLM-5.1 is GLM-5, trained on.
HUB = before.HUB | {
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "max_position_embeddings": 1048576,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 8000000,
    },
}

CONFIG = dataclasses.replace(before.CONFIG, model=dataclasses.replace(model_config(HUB), dtype="bfloat16", remat=True))
