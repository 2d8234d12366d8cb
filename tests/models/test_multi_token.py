"""Multi-token prediction: the chain of heads against the definition, and its loss from sums."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.layers.context import Context
from research.models.config import MTPConfig
from research.models.flops import forward_flops
from research.models.language_model import LanguageModel, positions_of
from research.models.multi_token import MultiTokenSums, multi_token_loss, multi_token_sums
from tests.models.small import CONFIG, small_model

IDS = jnp.asarray([[1] * 7 + [2] * 5, [3] * 9 + [0] * 3], jnp.int32)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 13)), jnp.int32)


def model_of(depth, shared=False):
    mtp = MTPConfig(("full", "mlp"), depth=depth, shared=shared)
    return small_model(dataclasses.replace(CONFIG, pattern=("mlp",), repeats=1, mtp=mtp))


@jax.jit
def sums_of(model):
    inputs_BT, targets_BT = TOKENS[:, :-1], TOKENS[:, 1:]
    positions_BT = positions_of(inputs_BT, IDS)
    mask_BT = (IDS > 0) & (jnp.pad(IDS[:, 1:], [(0, 0), (0, 1)]) == IDS)
    x_BTD, _, _ = model.hidden(inputs_BT, IDS, positions_BT)
    return multi_token_sums(model, x_BTD, inputs_BT, targets_BT, mask_BT, IDS, positions_BT)[0]


@jax.jit
def heads_alone(model, tokens_1T, length):
    """Logits of two heads on one document, each cut to the places whose tokens ahead it has."""
    places_1T = jnp.arange(tokens_1T.shape[1])[None]
    hidden_BTD, _, _ = model.hidden(tokens_1T, (places_1T < length).astype(jnp.int32))
    logits = []
    for depth, head in ((1, model.mtp.heads[0]), (2, model.mtp.heads[-1])):
        ahead_1T, ids_1T = jnp.roll(tokens_1T, -depth, axis=1), (places_1T < length - depth).astype(jnp.int32)
        context = Context(places_1T, ids_1T, ahead_1T)
        hidden_BTD, _, _ = head(hidden_BTD, model.embed(ahead_1T), (None, None), context)
        logits.append(model.logits(hidden_BTD)[0])
    return logits


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_head_reads_the_one_before_it(shared):
    model = model_of(2, shared)
    assert len(model.mtp.heads) == (1 if shared else 2)
    nats, counts = np.zeros(2), np.zeros(2)
    for row, start, stop in ((0, 0, 7), (0, 7, 12), (1, 0, 9)):
        length, tokens = stop - start, np.asarray(TOKENS)[row, start:stop]
        padded = np.zeros((1, 12), np.int32)
        padded[0, :length] = tokens
        for index, logits in enumerate(heads_alone(model, padded, length)):
            depth = index + 1
            logp = np.asarray(jax.nn.log_softmax(logits, axis=-1))[: length - depth - 1]
            nats[index] -= logp[np.arange(len(logp)), tokens[depth + 1 :]].sum()
            counts[index] += len(logp)
    ours = sums_of(model)
    np.testing.assert_array_equal(ours.count_N, counts)
    np.testing.assert_allclose(ours.nats_N, nats, rtol=1e-5)
    np.testing.assert_allclose(multi_token_loss(model, ours), 0.3 * (nats / counts).mean(), rtol=1e-5)


def test_the_loss_reaches_heads_and_model():
    model = model_of(1)
    gradient = jax.jit(jax.grad(lambda model: multi_token_loss(model, sums_of(model))))(model)
    for path, slope in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        assert jnp.abs(slope).max() > 0, name
    none = multi_token_loss(model, MultiTokenSums(jnp.zeros(1), jnp.zeros(1)))
    chex.assert_trees_all_close(none, 0.0)


@pytest.mark.parametrize("shared", [False, True])
def test_flops_count_every_head(shared):
    """Twice the entries of each head's matrices, however often they are read, and the model's own head each time."""
    model = model_of(2, shared)
    config = dataclasses.replace(model.config, mtp=dataclasses.replace(model.config.mtp, pattern=("mlp",)))
    leaves = jax.tree.leaves_with_path(jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)).mtp))
    matrices = sum(leaf.size for path, leaf in leaves if "w_" in jax.tree_util.keystr(path))
    flops = forward_flops(config, context=9.0)
    assert flops["ahead"] == 2 * (matrices * (2 if shared else 1) + 2 * 31 * config.width)
    assert forward_flops(dataclasses.replace(config, mtp=None), 9.0) == flops | {"ahead": 0.0}


def test_a_head_of_unknown_branches_is_refused():
    with pytest.raises(
        ValueError, match=r"mtp.pattern names 'other', which is no branch: the branches are linear, full"
    ):
        dataclasses.replace(CONFIG, mtp=MTPConfig(("other",)))
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        MTPConfig(("mlp",), depth=0)
