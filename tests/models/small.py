"""A small hybrid model that several tests share: every kind of branch, awkward sizes, parameters all random."""

import jax
import jax.numpy as jnp
from flax import nnx

from research.layers.attention import AttentionConfig
from research.layers.gated_deltanet import GatedDeltaNetConfig
from research.layers.mlp import MLPConfig
from research.layers.moe import MoEConfig
from research.models.config import ModelConfig, Residual
from research.models.language_model import LanguageModel

CONFIG = ModelConfig(
    vocab_size=31,
    width=24,
    branches=(
        Residual("linear", GatedDeltaNetConfig(heads=4, key_heads=2, key_width=8, value_width=6)),
        Residual("full", AttentionConfig(heads=4, key_heads=2, head_width=8, rotary_fraction=0.5)),
        Residual("moe", MoEConfig(experts=4, per_token=2, hidden=8, shared_hidden=8, shared_gate=True, bias_rate=1e-3)),
        Residual("mlp", MLPConfig(hidden=16)),
    ),
    pattern=("linear", "moe", "full", "mlp"),
    repeats=2,
)


def small_model(config: ModelConfig = CONFIG, seed: int = 0) -> LanguageModel:
    """Every parameter drawn at random, norms and biases included, so that none hides behind its initial value."""
    model = jax.jit(lambda key: LanguageModel(config, rngs=nnx.Rngs(params=key)))(jax.random.key(seed))
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(key, x.shape, jnp.float32) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)
