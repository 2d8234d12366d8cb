"""The Switch Transformer's block, as ``configs/switch_base_8`` has it, on the weights of transformers' own, which made the golden file
(``tests/interop/generate_switch.py``): what overflows an expert's capacity, counted along each row, comes out as zero."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs.switch_base_8 import SWITCH
from research.layers.context import Context
from research.layers.moe import Capacity
from tests.interop.weights import weight

GOLDEN = Path(__file__).parent / "golden/switch.npz"
D, F, E, T, TAKEN = 16, 24, 4, 24, 4


def test_the_published_block():
    # 4 tokens of 24 are 2/3 of an even share; a little less, as the share is rounded up.
    config = dataclasses.replace(SWITCH, experts=E, hidden=F, dispatch=Capacity(TAKEN * E / T - 1e-3))
    layer = config.build(D, depth=1, rngs=nnx.Rngs(params=0), param_dtype=jnp.float32)
    experts = [f"experts.expert_{e}" for e in range(E)]
    layer.w_router_DE.set_value(jnp.asarray(weight("router.classifier.weight", (E, D), 0).T))
    layer.w_in_EDF.set_value(jnp.asarray([weight(f"{e}.wi.weight", (F, D), 0).T for e in experts]))
    layer.w_out_EFD.set_value(jnp.asarray([weight(f"{e}.wo.weight", (D, F), 0).T for e in experts]))
    x_BTD = jnp.asarray(weight("x", (2, T, D), 0) * D**0.5)
    y_BTD, _, statistics = jax.jit(lambda layer, x: layer(x, None, Context(jnp.zeros((2, T), jnp.int32))))(layer, x_BTD)
    expected_BTD = np.load(GOLDEN)["y_BTD"]
    np.testing.assert_allclose(y_BTD, expected_BTD, rtol=0, atol=2e-6)
    assert (expected_BTD == 0).all(-1).sum() == 17 == int(statistics.dropped)
