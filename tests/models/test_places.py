"""Constants that depend on where a layer stands are right in every repeat of every stage."""

import jax
import numpy as np
from flax import nnx

from research.layers.lightning import LightningConfig, LightningDecay
from research.layers.mlp import MLPConfig
from research.layers.retnet import RetNetConfig
from research.models.config import ModelConfig, Residual
from research.models.language_model import LanguageModel

CONFIG = ModelConfig(
    vocab_size=5,
    width=4,
    branches=(
        Residual("lightning", LightningConfig(heads=2, head_width=2)),
        Residual("other", RetNetConfig(heads=1, key_width=2, value_width=2)),
        Residual("mlp", MLPConfig(hidden=2)),
    ),
    # A stage of its own, then three repeats of a unit with two lightning layers.
    pattern=("lightning", "lightning", "mlp", *("lightning", "mlp", "lightning", "mlp", "other", "mlp") * 3),
)


def model_of():
    return LanguageModel(CONFIG, rngs=nnx.Rngs(params=0))


def test_lightning_decays_know_their_absolute_layer():
    # Nothing but the constants is computed.
    constants = jax.jit(lambda: jax.tree.leaves(nnx.state(model_of(), LightningDecay)))()
    got = np.concatenate([np.asarray(leaf).reshape(-1, 2) for leaf in constants])
    # Layers are numbered by the branches that mix tokens: 2 and then 3 x 3 of them.
    lightning, layers = [0, 1, 2, 3, 5, 6, 8, 9], 11
    want = [[-(2.0 ** (-8 * h / 2)) * (1 - layer / (layers - 1 + 1e-5) + 1e-5) for h in (1, 2)] for layer in lightning]
    np.testing.assert_allclose(sorted(map(tuple, got)), sorted(map(tuple, want)), rtol=1e-5)


def test_they_are_no_parameters():
    model = jax.eval_shape(model_of)
    names = {str(path[-1]): type(variable) for path, variable in nnx.to_flat_state(nnx.state(model))}
    assert names.pop("log_decay_H") is LightningDecay
    assert set(names.values()) == {nnx.Param}
