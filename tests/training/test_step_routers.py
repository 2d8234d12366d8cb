"""What the training step does for routers: rewards policies, sets quantile biases, counts what is dropped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from research.layers.moe import Capacity, MoEConfig, ReinforceRouter, TopKRouter
from research.models.auxiliaries import Report, reward_policies
from research.models.config import ModelConfig, Residual
from research.ops import balancing, routing
from research.ops.routing import PolicyTerms
from research.training.metrics import by_layer
from research.training.optimizers import OptimizerConfig, make_optimizer
from research.training.state import create_state
from research.training.step import _router_metrics, make_train_step

B, T = 4, 8
SMALL = MoEConfig(experts=4, per_token=1, hidden=6, shared_hidden=0, balance_loss=0.0, z_loss=0.0)
MODEL = ModelConfig(
    vocab_size=11,
    width=8,
    branches=(
        Residual(
            "policy", dataclasses.replace(SMALL, router=ReinforceRouter(entropy_bonus=0.0), dispatch=Capacity(0.5))
        ),
        Residual("quantile", dataclasses.replace(SMALL, experts=6, router=TopKRouter("sigmoid"), quantile_bias=True)),
    ),
    pattern=("policy", "quantile"),
    repeats=2,
)


def test_the_reward_is_minus_the_tokens_own_loss():
    """Through two layers' statistics, by hand, with padding and a target that does not count."""
    random = np.random.default_rng(0)
    log_probability_LBT, baseline_LBT = random.normal(size=(2, 2, B, T)).astype(np.float32)
    logits_BTV = random.normal(size=(B, T, 11)).astype(np.float32)
    targets_BT = random.integers(0, 11, (B, T))
    live_BT, mask_BT = random.random((2, B, T)) < 0.8
    live_LBT = jnp.asarray(np.broadcast_to(live_BT, (2, B, T)))
    terms = PolicyTerms(jnp.asarray(log_probability_LBT), jnp.zeros((2, B, T)), jnp.asarray(baseline_LBT), live_LBT)

    @jax.jit
    def reward(terms, logits_BTV, targets_BT, mask_BT):
        statistics = balancing.router_statistics(routing.policy(jnp.zeros((B * T, 4)), None))
        entry = dataclasses.replace(statistics, policy=terms)
        return reward_policies((entry,), logits_BTV, targets_BT, mask_BT)[0].policy

    rewarded = reward(terms, logits_BTV, targets_BT, mask_BT)
    loss_BT = (
        scipy.special.logsumexp(logits_BTV, axis=-1) - np.take_along_axis(logits_BTV, targets_BT[..., None], 2)[..., 0]
    )
    counted_BT = live_BT & mask_BT
    policy_L = -(log_probability_LBT * (-loss_BT - baseline_LBT) * counted_BT).sum((1, 2))
    np.testing.assert_allclose(rewarded["policy"], policy_L, rtol=1e-5)
    baseline_L = (np.square(baseline_LBT + loss_BT) * counted_BT).sum((1, 2))
    np.testing.assert_allclose(rewarded["baseline"], baseline_L, rtol=1e-5)


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
    assert metrics["load_LE"].shape == (4, 6) and metrics["max_violation"] > 0


def test_layers_with_unequally_many_experts_are_all_told():
    """Two repeats of a layer of two experts and one of three, as they run."""

    def of(counts_LE):
        rows = dict.fromkeys((field.name for field in dataclasses.fields(balancing.RouterStatistics)), jnp.ones(2))
        counts_LE = jnp.asarray(counts_LE)
        rows |= dict.fromkeys(("first_counts_E", "probability_E", "importance_E", "smooth_load_E"), counts_LE * 1.0)
        return balancing.RouterStatistics(**rows | {"counts_E": counts_LE, "margins_EQ": None, "policy": None})

    reports = [
        Report(None, of([[1, 3], [2, 2]]), 1, (0, None, 0)),
        Report(None, of([[4, 0, 0], [1, 2, 1]]), 1, (0, None, 1)),
    ]
    metrics = jax.device_get(jax.jit(lambda: _router_metrics(reports))())
    expected = [[0.25, 0.75, -1], [1, 0, 0], [0.5, 0.5, -1], [0.25, 0.5, 0.25]]
    np.testing.assert_allclose(metrics["load_LE"], expected)
    assert metrics["dead_experts"] == 2 and metrics["max_violation"] == 2
    assert [row.tolist() for row in by_layer(metrics["load_LE"])] == [
        row[: 2 + i % 2] for i, row in enumerate(expected)
    ]
