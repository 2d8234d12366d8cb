"""What the training step does for routers: rewards policies, sets quantile biases, counts what is dropped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.layers.moe import Capacity, MoEConfig, ReinforceRouter, TopKRouter
from research.models.config import ModelConfig, Residual
from research.training.optimizers import OptimizerConfig, make_optimizer
from research.training.state import create_state
from research.training.step import make_train_step

B, T = 4, 8
SMALL = MoEConfig(experts=4, per_token=1, hidden=6, shared_hidden=0, balance_loss=0.0, z_loss=0.0)
MODEL = ModelConfig(
    vocab_size=11,
    width=8,
    branches=(
        Residual("policy", dataclasses.replace(SMALL, router=ReinforceRouter(), dispatch=Capacity(0.5))),
        Residual("quantile", dataclasses.replace(SMALL, experts=6, router=TopKRouter("sigmoid"), quantile_bias=True)),
    ),
    pattern=("policy", "quantile"),
    repeats=2,
)


@pytest.mark.slow
def test_policies_are_rewarded_and_biases_set_over_micro_batches():
    tokens_BT = jax.random.randint(jax.random.key(0), (B, T + 1), 0, 11)
    batch = {
        "inputs_BT": tokens_BT[:, :-1],
        "targets_BT": tokens_BT[:, 1:],
        "segment_ids_BT": jnp.ones((B, T), jnp.int32),
        "positions_BT": jnp.broadcast_to(jnp.arange(T), (B, T)),
        "loss_mask_BT": jnp.ones((B, T), bool),
    }
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), 10)
    graphdef, state = create_state(MODEL, optimizer, seed=0)
    before = jax.tree.map(np.array, state.params)
    state, metrics = make_train_step(graphdef, optimizer, micro_batches=2)(state, batch)
    mixers = [state.params["stages"][0]["branches"][i]["mixer"] for i in (0, 1)]
    policy, was = mixers[0], before["stages"][0]["branches"][0]["mixer"]
    # Its weights are 1, so nothing but the reward can have moved it.
    for name in ("w_router_DE", "w_baseline_D1"):
        assert np.abs(policy[name][...] - was[name][...]).max() > 1e-4
    assert np.isfinite(metrics["policy_loss"]) and metrics["policy_loss"] != 0
    bias_LE = state.variables["stages"][0]["branches"][1]["mixer"]["bias_E"][...]
    assert np.abs(bias_LE).max() > 1e-3
    # Two policy layers, each expert of a row with room for half its share: at least half of 2 · B · T is dropped.
    assert B * T <= metrics["dropped_assignments"] < 2 * B * T
    assert "load_LE" not in metrics and metrics["max_violation"] > 0  # layers with 4 and 6 experts
