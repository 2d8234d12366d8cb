"""Switch-Base with the paper's 128 experts (Fedus et al. 2021, arXiv 2101.03961) as a decoder. See ``switch_base_8``.

Command:  python -m experiments.train switch_base_128 data.source.paths='["corpus/*"]'
Cost:     7.4 billion parameters: for a mesh of many accelerators.
Expected: what the paper reports; no run of it has been made here.
"""

import dataclasses

from configs import switch_base_8 as base
from research.models.config import Residual

SWITCH = dataclasses.replace(base.SWITCH, experts=128)

CONFIG = dataclasses.replace(
    base.CONFIG,
    model=dataclasses.replace(
        base.CONFIG.model, branches=(*base.CONFIG.model.branches[:2], Residual("switch", SWITCH)), remat=True
    ),
)
