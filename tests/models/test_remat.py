"""Recomputing units in the backward pass: the same gradients, and with ``remat_keeps`` each kernel's forward pass once."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from research.layers.gated_deltanet import GatedDeltaNetConfig
from research.layers.moe import MoEConfig
from research.models.config import ModelConfig, Residual
from research.models.language_model import LanguageModel
from research.ops import kept
from tests.models.small import CONFIG, small_model

KERNELS = ModelConfig(
    vocab_size=32,
    width=128,
    branches=(
        Residual("experts", MoEConfig(experts=4, per_token=1, hidden=128)),
        Residual("delta", GatedDeltaNetConfig(heads=2, key_heads=1, key_width=128, value_width=128)),
    ),
    pattern=("delta", "experts"),
    repeats=2,
    dtype="bfloat16",
)
FORWARD = ("causal_conv_forward", "grouped_matmul_activated", "linear_attention_forward")
BACKWARD = ("causal_conv_backward", "grouped_matmul_activated_transposed", "linear_attention_backward")


def loss(model, tokens_BT):
    return jnp.mean(model(tokens_BT).logits_BTV ** 2)


def calls_on_tpu(**options) -> collections.Counter:
    """Custom calls of the gradient's program, a scan's body counted once, by kernel."""
    model = jax.eval_shape(lambda: LanguageModel(dataclasses.replace(KERNELS, **options), rngs=nnx.Rngs(0)))
    tokens_BT = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    v6e = jax.sharding.AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=v6e)):
        lowered = jax.jit(jax.grad(loss, allow_int=True)).trace(model, tokens_BT).lower(lowering_platforms=("tpu",))
    return collections.Counter(re.findall(r'kernel_name = "(\w+)"', lowered.as_text()))


@pytest.mark.slow
def test_kernels_run_once_where_their_results_are_kept():
    stored = calls_on_tpu()
    recomputed = calls_on_tpu(remat=True)
    once = calls_on_tpu(remat=True, remat_keeps=("causal_conv", "experts", "linear_attention"))
    # Each once more, but for the experts' second product, whose result nothing else in the unit reads.
    assert recomputed - stored == collections.Counter(FORWARD)
    assert once == stored
    assert all(stored[kernel] > 0 for kernel in FORWARD + BACKWARD)


@pytest.mark.slow
def test_gradients_are_those_of_stored_activations():
    tokens_BT = jnp.arange(24).reshape(2, 12) % CONFIG.vocab_size
    gradient = jax.jit(jax.grad(loss, allow_int=True))
    want = gradient(small_model(), tokens_BT)
    got = gradient(small_model(dataclasses.replace(CONFIG, remat=True, remat_keeps=kept.NAMES)), tokens_BT)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if a.dtype != jax.dtypes.float0:
            assert jnp.allclose(a, b, rtol=1e-5, atol=1e-6 * float(jnp.abs(b).max() + 1))


def test_what_cannot_be_kept_is_named():
    with pytest.raises(ValueError, match="remat_keeps names 'conv'; what may be kept: attention, causal_conv"):
        dataclasses.replace(CONFIG, remat_keeps=("conv",))
