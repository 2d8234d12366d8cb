"""Every published family against what transformers computed (``generate.py``): a golden folder is a test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.inference import generate
from research.interop import huggingface
from research.models.families import families, model_config
from tests.interop.checkpoints import NAMES, golden, stored_in, write_checkpoint
from tests.interop.weights import NEW_TOKENS, PROMPTS

# One family of each kind of layer; what compiles longer for the same layers is left to CI's slow pass.
QUICK = ("llama", "qwen3_next", "deepseek_v3", "mamba2", "gpt_oss")


@functools.cache
def made(name):
    return golden(name)


@pytest.fixture
def directory(name, tmp_path):
    return write_checkpoint(tmp_path / "original", made(name).hub, made(name).tensors, files=2)


def silent(line):
    raise AssertionError(line)


@jax.jit
def read_at_once(model, tokens_BT, segment_ids_BT):
    return model(tokens_BT, segment_ids=segment_ids_BT).logits_BTV


@jax.jit
def read_one_by_one(model, tokens_BT):
    def step(cache, token_B):
        out = model(token_B[:, None], cache=cache)
        return out.cache, out.logits_BTV[:, 0]

    return jax.lax.scan(step, model.init_cache(*tokens_BT.shape), tokens_BT.T)[1].swapaxes(0, 1)


def test_every_family_has_golden_files():
    assert {name.split(".")[0] for name in NAMES} == set(families())


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_logits(name, directory):
    """Of one document a row, and of two packed into a row."""
    g, model = made(name), huggingface.load(directory, say=silent)
    whole, first, second = g.documents
    tokens_BT = jnp.array([whole, [*first, *second]])
    ids_BT = jnp.array([[1] * len(whole), [1] * len(first) + [2] * len(second)])
    alone_TV, packed_TV = read_at_once(model, tokens_BT, ids_BT)
    np.testing.assert_allclose(alone_TV, g.logits[0], rtol=0, atol=g.atol)
    np.testing.assert_allclose(packed_TV, np.concatenate(g.logits[1:]), rtol=0, atol=g.atol)


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_bitwise(name, directory, tmp_path):
    g, model = made(name), huggingface.load(directory, say=silent)
    huggingface.save(model, g.hub, tmp_path / "again")
    again = stored_in(tmp_path / "again")
    assert set(again) == set(g.tensors)
    for tensor, values in g.tensors.items():
        np.testing.assert_array_equal(again[tensor], values, err_msg=tensor)
    assert huggingface.read_config(tmp_path / "again") == g.hub
    assert model_config(g.hub) == model.config


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_tokens_that_come_one_at_a_time(name, directory):
    g, model = made(name), huggingface.load(directory, say=silent)
    logits_BTV = read_one_by_one(model, jnp.array(g.documents[0])[None])
    np.testing.assert_allclose(logits_BTV[0], g.logits[0], rtol=0, atol=g.atol)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_generation(name, directory):
    g, model = made(name), huggingface.load(directory, say=silent)
    prompts = [g.documents[document][:length].tolist() for document, length in PROMPTS]
    assert generate(model, prompts, max_new_tokens=NEW_TOKENS) == g.new
