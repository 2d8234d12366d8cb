"""Balance losses against cases worked by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.ops import balancing
from research.ops.routing import from_choice, top_k

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
    assert merged.tokens == mask_T.sum()
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


def test_group_losses_by_hand():
    # Four experts on two devices; tokens visit (0, 1), (0, 1), (0, 2), (2, 3).
    expert_TK = jnp.array([[0, 1], [0, 1], [0, 2], [2, 3]])
    scores_TE = jnp.array([[0.6, 0.4, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0.5, 0.5]])
    choice = from_choice(expert_TK, jnp.full((4, 2), 0.5), scores_TE, jnp.zeros((4, 4)))
    statistics = jax.jit(balancing.router_statistics, static_argnames="groups")(choice, groups=2)
    # f = 4·(3, 2, 2, 1)/8, P = (1.6, 0.9, 1.0, 0.5)/4
    np.testing.assert_allclose(balancing.switch_loss(statistics), (1.5 * 1.6 + 0.9 + 1.0 + 0.5 * 0.5) / 4, rtol=1e-6)
    np.testing.assert_allclose(balancing.device_loss(statistics, 2), (1.25 * 2.5 + 0.75 * 1.5) / 4, rtol=1e-6)
    np.testing.assert_array_equal(statistics.visits_G, [3, 2])
    # f'' = 2/(1·4)·(3, 2)
    np.testing.assert_allclose(balancing.communication_loss(statistics, 1), (1.5 * 2.5 + 1.0 * 1.5) / 4, rtol=1e-6)
    np.testing.assert_allclose(balancing.communication_loss(statistics, 2), (1.5 * 2.5 + 1.0 * 1.5) / 8, rtol=1e-6)
    # Importance (1.5, 1, 1, .5): mean 1, variance .125
    np.testing.assert_allclose(balancing.importance_loss(statistics), 0.125, rtol=1e-6)
    share_E = scores_TE.sum(0) / 4
    expected = np.mean((share_E * 4 - 1) ** 2)
    np.testing.assert_allclose(balancing.importance_loss(statistics, of="probabilities"), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="of is 'tokens', it must be 'weights' or 'probabilities'"):
        balancing.importance_loss(statistics, of="tokens")
    np.testing.assert_allclose(balancing.load_loss(statistics), 0.125, rtol=1e-6)
    with pytest.raises(ValueError, match="groups is 3"):
        balancing.device_loss(statistics, 3)


def test_sequence_loss_by_hand():
    # Two sequences of two tokens, the last token padding. Sigmoid scores are normalised to sum 1.
    scores_TE = jnp.array([[0.9, 0.3, 0.3], [0.2, 0.4, 0.2], [0.1, 0.1, 0.6], [0.9, 0.1, 0.1]])
    mask_T = jnp.array([True, True, True, False])
    # The bias sends token 0 elsewhere; the loss looks at unbiased scores.
    choice = from_choice(jnp.array([[2], [1], [2], [0]]), jnp.ones((4, 1)), scores_TE, jnp.zeros((4, 3)), mask_T=mask_T)
    statistics = jax.jit(balancing.router_statistics, static_argnames="sequences")(choice, mask_T, sequences=2)
    first = 3 / 2 * (0.6 + 0.25) / 2 + 3 / 2 * (0.2 + 0.5) / 2
    second = 3 * 0.75
    assert statistics.sequences == 2
    np.testing.assert_allclose(balancing.sequence_loss(statistics), (first + second) / 2, rtol=1e-6)


def test_quantile_bias_balances_at_once():
    rng = np.random.default_rng(3)
    skew_E = np.linspace(0, 2, 8)
    scores_TE = jax.nn.sigmoid(jnp.asarray(rng.normal(size=(4096, 8)) + skew_E, jnp.float32))
    counts = jax.jit(
        lambda bias_E: top_k(jax.scipy.special.logit(scores_TE), 2, score="sigmoid", bias_E=bias_E).counts_E()
    )
    update = jax.jit(lambda bias_E: balancing.quantile_bias(scores_TE, bias_E, 2))
    bias_E = jnp.zeros(8)
    assert counts(bias_E).max() > 1.5 * 1024
    for _ in range(4):
        bias_E = update(bias_E)
    assert abs(counts(bias_E) - 1024).max() < 0.1 * 1024
    masked_E = jax.jit(lambda: balancing.quantile_bias(
        jnp.concatenate([scores_TE, scores_TE * jnp.nan]), bias_E, 2, mask_T=jnp.arange(8192) < 4096
    ))()  # fmt: skip
    np.testing.assert_allclose(masked_E, update(bias_E), rtol=1e-5)


def test_sign_update_balances_a_skewed_router():
    rng = np.random.default_rng(4)
    logits_TE = jnp.asarray(rng.normal(size=(512, 8)) + np.linspace(0, 2, 8), jnp.float32)

    @jax.jit
    def run(bias_E):
        def step(bias_E, _):
            counts_E = top_k(logits_TE, 2, score="sigmoid", bias_E=bias_E).counts_E()
            return balancing.update_bias(bias_E, counts_E, 5e-3), counts_E

        return jax.lax.scan(step, bias_E, length=200)[1]

    counts_LE = run(jnp.zeros(8))
    assert counts_LE[0].max() > 1.5 * 128 and counts_LE[-1].max() < 1.1 * 128


def test_counts_stay_exact_beyond_float32():
    huge_E = jnp.array([2**31 - 2, 2**31 - 3], jnp.int32)
    one = router_statistics(assignment([[0.0, 0.0]]))
    statistics = dataclasses.replace(one, counts_E=huge_E)
    merged = balancing.merge(statistics, dataclasses.replace(one, counts_E=jnp.array([1, 1], jnp.int32)))
    np.testing.assert_array_equal(merged.counts_E, [2**31 - 1, 2**31 - 2])
    np.testing.assert_allclose(balancing.load(merged).sum(), 1.0, rtol=1e-6)


def test_layers_stay_apart():
    """Statistics stacked by a scan over layers give one loss a layer."""
    rng = np.random.default_rng(5)
    logits_LTE = jnp.asarray(rng.normal(size=(3, 20, 4)), jnp.float32)
    stacked = jax.jit(
        lambda x: jax.lax.scan(lambda _, x: (None, balancing.router_statistics(top_k(x, 2))), None, x)[1]
    )(logits_LTE)
    for loss in (
        balancing.switch_loss,
        balancing.z_loss,
        balancing.importance_loss,
        lambda s: balancing.device_loss(s, 2),
    ):
        losses_L = loss(stacked)
        assert losses_L.shape == (3,)
        for layer in range(3):
            one = jax.tree.map(lambda a, i=layer: a[i], stacked)
            np.testing.assert_allclose(losses_L[layer], loss(one), rtol=1e-6)


def test_quantiles_from_counts():
    """Histograms of margins add up over parts, and their quantile is `quantile_bias` of the whole."""
    rng = np.random.default_rng(0)
    for spread in (1.0, 1e-2):
        scores_TE = jnp.asarray(spread * rng.random((4000, 8)) * np.linspace(0.2, 1, 8), jnp.float32)
        mask_T = jnp.asarray(rng.random(4000) > 0.3)
        bias_E = jnp.asarray(0.1 * spread * rng.normal(size=8), jnp.float32)
        count = functools.partial(balancing.quantile_margins, bias_E=bias_E, k=2)
        margins_EQ = sum(count(scores_TE[part], mask_T=mask_T[part]) for part in (slice(0, 999), slice(999, None)))
        np.testing.assert_array_equal(margins_EQ.sum(1), mask_T.sum())
        expected_E = balancing.quantile_bias(scores_TE, bias_E, 2, mask_T=mask_T)
        np.testing.assert_allclose(
            balancing.quantile_bias_from_margins(margins_EQ, 2), expected_E, rtol=0.02, atol=2e-3 * spread
        )
    assert not balancing.quantile_bias_from_margins(jnp.zeros((3, 8, 16), jnp.int32), 2).any()
