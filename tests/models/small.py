"""What several tests share: a small hybrid model with every kind of branch, awkward sizes and random parameters; a batch."""

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


def packed_batch(rows: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Packed rows with padding, so that micro-batches hold different numbers of everything."""
    random = np.random.default_rng(0)
    ids_BT = np.ones((rows, length), np.int32)
    ids_BT[:, 6:] = 2
    ids_BT[1::2, 8:] = 0
    ids_BT[0, 3:] = 0
    return {
        "inputs_BT": random.integers(0, vocabulary, (rows, length)).astype(np.int32),
        "targets_BT": random.integers(0, vocabulary, (rows, length)).astype(np.int32),
        "segment_ids_BT": ids_BT,
        "positions_BT": np.where(ids_BT == 2, np.arange(length) - 6, np.arange(length)).astype(np.int32),
        "loss_mask_BT": ids_BT > 0,
    }
