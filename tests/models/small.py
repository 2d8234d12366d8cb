"""A small hybrid model that several tests share: every kind of branch, awkward sizes, parameters all random."""

import jax
import jax.numpy as jnp
import numpy as np
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
    """Every parameter drawn at random, norms and biases included, with nothing to compile."""
    random = np.random.default_rng(seed)

    def draw(leaf):
        scale = leaf.shape[-2] ** -0.5 if leaf.ndim > 2 else 0.3
        return jnp.asarray(scale * random.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(params=0))))
