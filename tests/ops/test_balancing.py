"""Balance losses against cases worked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops import balancing
from research.ops.routing import top_k

router_statistics = jax.jit(balancing.router_statistics)


def assignment(logits_TE, k=1, **options):
    return jax.jit(functools.partial(top_k, k=k))(jnp.asarray(logits_TE, jnp.float32), **options)


def test_switch_loss_by_hand():
    # Three tokens over two experts: two go to expert 0, one to expert 1.
    logits_TE = np.log([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]])
    statistics = router_statistics(assignment(logits_TE))
    # f = (2/3, 1/3), P = (1/2, 1/2): 2·(1/3 + 1/6) = 1
    np.testing.assert_allclose(balancing.switch_loss(statistics), 1.0, rtol=1e-6)
    both = router_statistics(assignment(logits_TE, 2))
    np.testing.assert_allclose(balancing.switch_loss(both), 1.0, rtol=1e-6)
    np.testing.assert_allclose(balancing.switch_loss(both, normalisation="per_token"), 2.0, rtol=1e-6)
    np.testing.assert_allclose(balancing.switch_loss(both, first_choice=True), 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="normalisation"):
        balancing.switch_loss(both, normalisation="sum")


def test_parts_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    logits_TE = rng.normal(size=(48, 8))
    mask_T = jnp.asarray(rng.random(48) > 0.3)
    whole = router_statistics(assignment(logits_TE, 2, mask_T=mask_T), mask_T)
    parts = [
        router_statistics(assignment(logits_TE[rows], 2, mask_T=mask_T[rows]), mask_T[rows])
        for rows in (slice(0, 10), slice(10, 48))
    ]
    merged = balancing.merge(*parts)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_array_equal(merged.counts_E, whole.counts_E)
    np.testing.assert_allclose(balancing.switch_loss(merged), balancing.switch_loss(whole), rtol=1e-6)


def test_padding_reaches_nothing():
    logits_TE = np.random.default_rng(1).normal(size=(6, 4))
    mask_T = jnp.array([True, True, False, True, True, False])
    poisoned_TE = np.where(mask_T[:, None], logits_TE, np.nan)

    def loss(logits_TE, mask_T):
        statistics = router_statistics(top_k(logits_TE, 2, mask_T=mask_T), mask_T)
        return (
            balancing.switch_loss(statistics) + balancing.z_loss(statistics) + balancing.metrics(statistics)["entropy"]
        )

    clean, gradient_TE = jax.jit(jax.value_and_grad(loss))(
        jnp.asarray(logits_TE[mask_T], jnp.float32), jnp.ones(4, bool)
    )
    poisoned, poisoned_gradient_TE = jax.jit(jax.value_and_grad(loss))(jnp.asarray(poisoned_TE, jnp.float32), mask_T)
    np.testing.assert_allclose(poisoned, clean, rtol=1e-6)
    np.testing.assert_allclose(poisoned_gradient_TE[mask_T], gradient_TE, rtol=1e-5)
    assert not poisoned_gradient_TE[~mask_T].any()


def test_z_loss_by_hand():
    statistics = router_statistics(assignment([[0.0, 0.0], [np.log(3), 0.0]]))
    np.testing.assert_allclose(balancing.z_loss(statistics), (np.log(2) ** 2 + np.log(4) ** 2) / 2, rtol=1e-6)


def test_bias_moves_against_the_load():
    bias_E = balancing.update_bias(jnp.zeros(4), jnp.array([9, 3, 5, 3], jnp.int32), 1e-3)
    np.testing.assert_allclose(bias_E, [-1e-3, 1e-3, 0, 1e-3])


def test_metrics_by_hand():
    statistics = router_statistics(assignment([[1.0, 0, 0, 0]] * 3 + [[0, 1.0, 0, 0]]))
    metrics = balancing.metrics(statistics)
    np.testing.assert_allclose(metrics["load"], [0.75, 0.25, 0, 0])
    np.testing.assert_allclose(metrics["max_violation"], 2.0)
    assert metrics["dead_experts"] == 2 and metrics["dropped"] == 0
    p = np.exp([1, 0, 0, 0]) / np.exp([1, 0, 0, 0]).sum()
    np.testing.assert_allclose(metrics["entropy"], -(p * np.log(p)).sum(), rtol=1e-6)
