"""The training step takes every loss from sums, wherever the layer is: chunks, chunks of chunks, heads ahead, indexers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from research.layers.dsa import DSAConfig
from research.layers.moe import Dropless, MoEConfig, ReinforceRouter
from research.models.auxiliaries import Report, running_order
from research.models.config import HNetConfig, ModelConfig, MTPConfig, Residual
from research.training.optimizers import OptimizerConfig, parameter_path, trains
from research.training.state import TrainState
from research.training.step import make_train_step
from tests.models.small import packed_batch, small_model

B, T = 4, 10
SPARSE = DSAConfig(
    heads=2, nope_width=4, rope_width=4, value_width=4, latent=6, index_heads=4, index_width=4, top_k=3
)  # fmt: skip
MOE = Residual(
    "moe", MoEConfig(experts=4, per_token=2, hidden=6, shared_hidden=0, bias_rate=1e-3, dispatch=Dropless("one_hot"))
)
INNER = HNetConfig((MOE,), ("moe",), repeats=2, ratio=2.0)
CHUNKS = Residual(
    "chunks", HNetConfig((MOE, Residual("chunks", INNER, skip_scale=0.0)), ("moe", "chunks"), ratio=2.0), skip_scale=0.0
)
MODEL = ModelConfig(
    vocab_size=13,
    width=8,
    branches=(Residual("sparse", SPARSE), CHUNKS, MOE),
    pattern=("sparse", "chunks", "moe"),
    mtp=MTPConfig(("moe", "sparse"), depth=2, shared=True),
)


def model_of(sparse: DSAConfig):
    return dataclasses.replace(MODEL, branches=(Residual("sparse", sparse), MOE), pattern=("sparse", "moe"), mtp=None)


@functools.cache
def step_of(model, *, micro_batches=1, trainable=()):
    """(variables before, variables after, metrics) of one step of gradient descent; every variable is drawn at random."""
    descent = optax.sgd(0.1)
    graphdef, params, variables = nnx.split(small_model(model), nnx.Param, ...)
    before = jax.tree.map(np.array, (params, variables))
    state = TrainState(jnp.zeros((), jnp.int32), params, variables, descent.init(params), jax.random.key(0))
    trained = functools.partial(trains, OptimizerConfig(trainable=trainable))
    state, metrics = make_train_step(graphdef, descent, micro_batches=micro_batches, trained=trained)(
        state, packed_batch(B, T, 13)
    )
    after = jax.tree.map(np.asarray, (state.params, state.variables))
    return named(before), named(after), jax.device_get(metrics)


def named(tree):
    return {parameter_path(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.slow
def test_micro_batches_are_one_batch_for_every_loss():
    (before, after, metrics), (_, in_parts, of_parts) = step_of(MODEL), step_of(MODEL, micro_batches=2)
    losses = {"balance_loss", "z_loss", "index_loss", "ratio_loss", "mtp_loss"}
    assert losses <= metrics.keys() and all(metrics[name] > 0 for name in losses)
    assert metrics.keys() == of_parts.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(of_parts[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    for name, value in after.items():
        np.testing.assert_allclose(in_parts[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    # A layer over chunks, two over chunks of chunks, one after them, one in the heads: in the order they run.
    load_LE = metrics["load_LE"]
    assert load_LE.shape == (5, 4) and 1 < metrics["tokens_per_chunk"] < T and metrics["tokens_per_chunk_2"] >= 1
    steps = [(after[name] - before[name]).reshape(-1, 4) for name in before if name.endswith("bias_E")]
    expected = 1e-3 * np.sign(0.25 - load_LE) * (np.abs(load_LE - 0.25) > 1e-6)
    key = lambda rows: sorted(map(tuple, np.round(rows, 6) + 0.0))  # noqa: E731
    assert key(np.concatenate(steps)) == key(expected)


@pytest.mark.slow
def test_the_index_loss_reaches_indexers_alone():
    """With the loss and without it: indexers move or stay, and everything else moves as it did."""
    models = [model_of(dataclasses.replace(SPARSE, index_loss=coefficient)) for coefficient in (1.0, 0.0)]
    (before, after, _), (_, without, _) = map(step_of, models)
    for name, old in before.items():
        if "indexer" in name:
            assert (without[name] == old).all() and np.abs(after[name] - old).max() > 0, name
        else:
            np.testing.assert_allclose(after[name], without[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_what_is_frozen_stays_to_the_bit():
    """The warm-up: indexers learn, router biases and everything else stay, though other losses are there too."""
    model = model_of(dataclasses.replace(SPARSE, stage="warm_up"))
    before, after, metrics = step_of(model, trainable=("*.indexer.*",))
    changed = {name for name, old in before.items() if (after[name] != old).any()}
    assert changed == {name for name in before if "indexer" in name}
    assert metrics["grad_norm"] > 0 and metrics["index_loss"] > 0 and metrics["balance_loss"] > 0


def test_layers_are_told_in_the_order_they_run():
    entries = lambda *shape: {"x": jnp.zeros((*shape, 5))}  # noqa: E731
    found = [
        Report(None, entries(2), 1, (0, None, 0)),
        Report(None, entries(2, 3), 2, (0, None, 1, 0, None, 0)),
        Report(None, entries(2), 1, (0, None, 2)),
        Report(None, entries(), 0, (1, 0, 0)),
    ]
    assert running_order(found).tolist() == [0, 2, 3, 4, 8, 1, 5, 6, 7, 9, 10]
    assert found[1].flat["x"].shape == (6, 5) and found[3].flat["x"].shape == (1, 5)


def test_chunks_have_no_reward():
    policy = Residual("policy", MoEConfig(experts=4, per_token=1, router=ReinforceRouter()))
    with pytest.raises(ValueError, match=r"branches over chunks must not route by REINFORCE.* got policy"):
        HNetConfig((policy,), ("policy",))
