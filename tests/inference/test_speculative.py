"""Speculative decoding: greedy output is the model's own, samples have its distribution, rejected tokens leave no trace."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.inference import generate, speculate
from research.layers.attention import AttentionConfig
from research.layers.mlp import MLPConfig
from research.models.config import ModelConfig, MTPConfig, Residual
from research.sharding.mesh import MeshConfig, make_mesh
from tests.models.small import CONFIG, small_model

PROMPTS = [[3, 1, 4, 1, 2], [2, 0, 1, 3, 3, 4, 2, 1, 0], [4], [0, 0]]
# A small vocabulary, so that untrained heads are sometimes right.
HYBRID = dataclasses.replace(
    CONFIG,
    vocab_size=5,
    width=16,
    pattern=("linear", "full"),
    repeats=1,
    mtp=MTPConfig(("full",), depth=1),
)


@pytest.mark.parametrize(
    "mtp",
    [
        pytest.param(MTPConfig(("full",), depth=1), marks=pytest.mark.slow),
        pytest.param(MTPConfig(("linear", "mlp"), depth=3), marks=pytest.mark.slow),
        pytest.param(MTPConfig(("full",), depth=2, shared=True), marks=pytest.mark.slow),
    ],
    ids=lambda mtp: f"{mtp.depth} heads",
)
def test_greedy_output_is_the_models_own(mtp):
    """A recurrent state among the layers: rejected tokens are rolled back."""
    model = small_model(dataclasses.replace(HYBRID, mtp=mtp))
    new, drafted, accepted, rounds = speculate(model, PROMPTS, 20)
    assert new == generate(model, PROMPTS, 20)
    assert 0 < accepted < drafted and drafted <= rounds * 4 * mtp.depth


PLACES = ModelConfig(
    vocab_size=5,
    width=16,
    branches=(
        Residual("full", AttentionConfig(heads=2, key_heads=1, head_width=8)),
        Residual("mlp", MLPConfig(hidden=16)),
    ),
    pattern=("full", "mlp"),
    mtp=MTPConfig(("full",), depth=2),
)


@pytest.mark.slow
def test_caches_by_place_are_set_back_without_a_second_call():
    model = small_model(PLACES)
    stop = {generate(model, PROMPTS, 12)[0][7]}
    new, drafted, accepted, _ = speculate(model, PROMPTS, 12, stop=stop)
    assert new == generate(model, PROMPTS, 12, stop=stop)
    assert 0 < accepted < drafted


@pytest.mark.slow
@pytest.mark.parametrize("config", [PLACES, HYBRID], ids=["caches by place", "a recurrent state"])
def test_samples_have_the_models_distribution(config):
    """The first three tokens of 6,000 rows against the model's own probabilities, after a filter. With one draft a round some
    are kept drafts, some take a rejected draft's place and some come after a draft that was kept."""
    config = dataclasses.replace(config, mtp=dataclasses.replace(config.mtp, depth=1))
    model, rows, prompt = small_model(config), 6000, [3, 1, 4]
    options = {"temperature": 1.3, "top_k": 4}
    new, drafted, accepted, _ = speculate(model, [prompt] * rows, 3, **options, seed=1)
    assert 0 < accepted < drafted
    new = np.asarray(new)
    sequences = np.asarray([[*prompt, *pair] for pair in itertools.product(range(5), repeat=2)], np.int32)
    logits = (
        np.asarray(jax.jit(lambda model, x: model(x).logits_BTV)(model, jnp.asarray(sequences)), np.float64)[:, 2:]
        / 1.3
    )
    logits[logits < np.sort(logits, axis=-1)[..., 1:2]] = -np.inf  # the least of five goes
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.zeros((5, 5, 5))
    for (a, b), chance in zip(itertools.product(range(5), repeat=2), p, strict=True):
        expected[a, b] = chance[0, a] * chance[1, b] * chance[2]
    counts = np.zeros((5, 5, 5))
    np.add.at(counts, tuple(new.T), 1)
    assert (counts[expected == 0] == 0).all()
    seen = expected > 0
    chi_square = ((counts - rows * expected) ** 2)[seen] / (rows * expected[seen])
    freedom = seen.sum() - 1
    # Its mean is the degrees of freedom, its deviation √(2·freedom): five of them are one chance in a million.
    assert chi_square.sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_what_cannot_be_is_named():
    plain = small_model(dataclasses.replace(HYBRID, mtp=None))
    with pytest.raises(ValueError, match=r"model must have multi-token heads \(ModelConfig.mtp\)"):
        speculate(plain, [[1]])
    model = small_model(HYBRID)
    assert speculate(model, []).new == []
    with pytest.raises(ValueError, match=r"prompts\[0\] is empty"):
        speculate(model, [[]])
    alone = pytest.raises(NotImplementedError, match="speculate runs on one device, without a mesh")
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])), alone:
        speculate(model, [[1]])
