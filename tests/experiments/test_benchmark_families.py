"""The models that are measured beside transformers are those that the page says they are."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.benchmarks import families
from research.interop.huggingface import check_describes
from research.models.families import model_config
from research.models.language_model import LanguageModel


@pytest.mark.parametrize("name", families.FAMILIES)
def test_eight_layers_of_width_256(name):
    hub = families.FAMILIES[name]
    config = model_config(hub)
    check_describes(hub, config)
    assert (config.width, config.dtype, config.vocab_size) == (256, "float32", 8192)
    assert len(hub.get("layers_block_type", [])) == 8 or hub["num_hidden_layers"] == 8
    shapes = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(params=0)))
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert 2e7 < size < 7e7
    prompt = families.prompt(hub["vocab_size"])
    assert prompt.shape == (1, 1024) and np.array_equal(prompt, families.prompt(hub["vocab_size"]))
