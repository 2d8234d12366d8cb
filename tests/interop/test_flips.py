"""What config.json says changes the logits as in transformers (``flips.json``), is refused by name, or changes nothing there."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.interop.assembly import Assembly
from research.models.families import family_of, model_config
from research.models.hub import ModelViews
from research.models.language_model import LanguageModel
from tests.interop import flips
from tests.interop.checkpoints import GOLDEN
from tests.interop.weights import documents, weight

QUICK = ("llama",)


@functools.cache
def stored():
    told = np.load(flips.FOLDER / "flips.npz")
    return {label: (part, tensors) for label, part, tensors in zip(*(told[n] for n in told.files), strict=True)}


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in flips.families()]
)
def test_a_flip_changes_the_logits_as_in_transformers(family):
    """Operation by operation: shapes repeat from flip to flip, while each would be another program to compile."""
    tiny = json.loads((GOLDEN / family / "tiny.json").read_text())
    tokens_BT, wrong = jnp.array(documents(61, tiny["seed"])[0][None, : flips.LENGTH]), []
    for flip in flips.flips(family):
        expected, tensors = stored()[flip.label]
        model, shapes = made(flip.hub, tiny)
        assert flips.digest(shapes) == tensors, f"{flip.label}: the checkpoint has other tensors"
        with jax.disable_jit():
            part = model(tokens_BT).logits_BTV[0][flips.PART]
        error = np.abs(part - expected).max()
        if not error <= tiny["atol"]:
            wrong.append(f"{flip.label}: {error:.1e}")
    assert not wrong


def made(hub, tiny):
    """The model of a config.json with the weights that the generator gave to PyTorch, and its tensors' shapes."""
    config = model_config(hub)
    model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(params=0)))
    tensors = {tensor.name: tensor for tensor in family_of(hub).tensors(ModelViews(model))}
    assembly = Assembly(model, tensors.values())
    for name, tensor in tensors.items():
        for view, values in tensor.parts(weight(name, tensor.shape, tiny["seed"], tiny.get("centred", "(?!)"))):
            assembly.write(view, values)
    return assembly.finish(), {name: tensor.shape for name, tensor in tensors.items()}
