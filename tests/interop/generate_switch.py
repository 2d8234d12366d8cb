"""The golden file of the Switch Transformer's experts, in the environment of ``generate.py``:

    .golden/bin/python tests/interop/generate_switch.py        # writes tests/layers/golden/switch.npz

Weights and inputs are functions of their names (``weights.py``); stored is what transformers' block makes of them. Experts take 4
tokens of each row of 24 at most, so some overflow.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

sys.path.insert(0, str(Path(__file__).parent))
from weights import weight

SIZES = {"d_model": 16, "d_ff": 24, "num_experts": 4, "expert_capacity": 4, "dropout_rate": 0.0}


@torch.no_grad()
def main():
    block = SwitchTransformersSparseMLP(SwitchTransformersConfig(**SIZES, router_bias=False)).eval()
    for name, parameter in block.named_parameters():
        parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape), seed=0)))
    x_BTD = torch.from_numpy(weight("x", (2, 24, SIZES["d_model"]), seed=0) * SIZES["d_model"] ** 0.5)
    kept = block.router(x_BTD)[0].sum().item()
    np.savez_compressed(Path(__file__).parents[1] / "layers/golden/switch.npz", y_BTD=block(x_BTD).numpy())
    print(f"{kept} of {x_BTD.shape[0] * x_BTD.shape[1]} tokens visit an expert")


main()
