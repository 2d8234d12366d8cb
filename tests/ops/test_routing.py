"""Routers against their definitions, one token at a time in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from research.ops import routing
from research.ops.routing import GroupLimit

T, E, K = 32, 8, 3


def logits(seed=0, tokens=T, experts=E):
    return np.random.default_rng(seed).normal(size=(tokens, experts))


def run(function, *arguments, **options):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(functools.partial(function, **options))(*arguments))


def softmax(x):
    p = np.exp(x - x.max())
    return p / p.sum()


def choices(assignment, per_token):
    return assignment.expert_A.reshape(-1, per_token), assignment.weight_A.reshape(-1, per_token)


def check_form(assignment):
    """What every assignment promises."""
    assert assignment.token_A.dtype == assignment.expert_A.dtype == np.int32
    assert assignment.token_A.min() >= 0 and assignment.token_A.max() < assignment.tokens
    assert assignment.expert_A.min() >= 0 and assignment.expert_A.max() <= assignment.experts
    assert not assignment.weight_A[assignment.expert_A == assignment.experts].any()
    pairs = [(t, e) for t, e in zip(assignment.token_A, assignment.expert_A, strict=True) if e < assignment.experts]
    assert len(set(pairs)) == len(pairs), "a token visits an expert once"


def reference_top_k(logits_E, k, score, renormalise, bias_E, limit):
    scores_E = 1 / (1 + np.exp(-logits_E)) if score == "sigmoid" else softmax(logits_E)
    selection_E = scores_E.copy()
    if bias_E is not None:
        selection_E = selection_E + bias_E
    if limit is not None:
        groups = selection_E.reshape(limit.groups, -1)
        best = 1 if limit.group_score == "max" else 2
        group_scores = np.sort(groups, axis=1)[:, -best:].sum(1)
        banned = np.argsort(-group_scores, kind="stable")[limit.top :]
        groups[banned] = -np.inf
        selection_E = groups.reshape(-1)
    chosen = np.argsort(-selection_E, kind="stable")[:k]
    if score == "softmax_after":
        return chosen, softmax(logits_E[chosen])
    weights = scores_E[chosen]
    return chosen, weights / weights.sum() if renormalise else weights


@pytest.mark.parametrize("score", ["softmax", "softmax_after", "sigmoid"])
@pytest.mark.parametrize(
    ("k", "renormalise", "biased", "limit"),
    [
        (1, False, False, None),
        (3, True, False, None),
        (3, False, True, None),
        (2, True, False, GroupLimit(4, 2, "max")),
        (3, True, True, GroupLimit(4, 2, "top2")),
        (3, True, False, GroupLimit(4, 2, "top2")),
    ],
)
def test_top_k_equals_the_definition(score, k, renormalise, biased, limit):
    logits_TE = logits()
    bias_E = np.random.default_rng(1).normal(size=E) * 0.3 if biased else None
    assignment = run(
        lambda x, b: routing.top_k(x, k, score=score, renormalise=renormalise, bias_E=b, group_limit=limit, scale=2.5),
        logits_TE, bias_E,
    )  # fmt: skip
    check_form(assignment)
    expert_TK, weight_TK = choices(assignment, k)
    for t in range(T):
        chosen, weights = reference_top_k(logits_TE[t], k, score, renormalise, bias_E, limit)
        np.testing.assert_array_equal(expert_TK[t], chosen)
        np.testing.assert_allclose(weight_TK[t], 2.5 * weights, rtol=1e-12)


def test_router_computes_in_float32():
    logits_TE = jnp.asarray(logits(), jnp.bfloat16)
    assignment = jax.jit(functools.partial(routing.top_k, k=2))(logits_TE)
    for leaf in (assignment.weight_A, assignment.scores_TE, assignment.logits_TE):
        assert leaf.dtype == jnp.float32
    # A bias step of 1e-3 on a score near 1 would vanish in bfloat16.
    near_one = jnp.array([[5.0, 5.0]], jnp.bfloat16)
    picked = jax.jit(lambda b: routing.top_k(near_one, 1, score="sigmoid", bias_E=b).expert_A)(jnp.array([0.0, 1e-3]))
    assert picked[0] == 1


def test_gradient_reaches_logits_through_weights_and_never_the_bias():
    def total(logits_TE, bias_E):
        assignment = routing.top_k(logits_TE, 2, score="sigmoid", renormalise=True, bias_E=bias_E)
        return (assignment.weight_A * jnp.arange(2 * T)).sum()

    logits_TE = logits()
    with jax.enable_x64(True):
        gradient_TE, gradient_E = jax.jit(jax.grad(total, argnums=(0, 1)))(logits_TE, np.zeros(E))
    assert not gradient_E.any()
    expert_TK = np.argsort(-logits_TE, axis=1)[:, :2]
    for t in range(T):
        a, b = (1 / (1 + np.exp(-logits_TE[t, expert_TK[t]]))).tolist()
        # d/da of (2t·a + (2t+1)·b)/(a+b), and the sigmoid's slope
        expected = np.zeros(E)
        expected[expert_TK[t]] = -b / (a + b) ** 2 * a * (1 - a), a / (a + b) ** 2 * b * (1 - b)
        np.testing.assert_allclose(gradient_TE[t], expected, atol=1e-12)


def test_straight_sum():
    assignment = run(lambda x: routing.top_k(x, 2, gated=False), logits())
    np.testing.assert_array_equal(assignment.weight_A, 1)


ROUTERS = {
    "top_k": lambda x, key, m: routing.top_k(x, 2, mask_T=m),
    "noisy": lambda x, key, m: routing.noisy_top_k(x, 2, key, sigma=0.5, mask_T=m)[0],
    "noisy_learned": lambda x, key, m: routing.noisy_top_k(x, 2, key, noise_logits_TE=-x, mask_T=m)[0],
    "gshard": lambda x, key, m: routing.gshard_top2(x, key, mask_T=m),
    "gshard_sample": lambda x, key, m: routing.gshard_top2(x, key, second="sample", mask_T=m),
    "uniform": lambda x, key, m: routing.uniform(key, T, E, 2, mask_T=m),
    "expert_choice": lambda x, key, m: routing.expert_choice(x, 6, mask_T=m),
    "sinkhorn": lambda x, key, m: routing.sinkhorn(x, 2, mask_T=m),
    "base": lambda x, key, m: routing.base(x, mask_T=m),
    "hash": lambda x, key, m: routing.by_token_id(
        jnp.arange(T) % 10, jnp.asarray(routing.random_table(0, 10, E, 2)), E, mask_T=m
    ),
    "policy": lambda x, key, m: routing.policy(x, key, mask_T=m),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_visits_nobody_and_reaches_nothing(name):
    """NaN at padding changes no live token's choice and no gradient; padding has no expert and no weight."""
    mask_T = np.arange(T) % 4 != 1
    poisoned_TE = np.where(mask_T[:, None], logits(), np.nan).astype(np.float32)
    clean_TE = np.where(mask_T[:, None], logits(), 0).astype(np.float32)

    @jax.jit
    def both(logits_TE):
        def total(logits_TE):
            assignment = ROUTERS[name](logits_TE, jax.random.key(0), jnp.asarray(mask_T))
            return (assignment.weight_A**2).sum(), assignment

        gradient_TE, assignment = jax.grad(total, has_aux=True)(logits_TE)
        return gradient_TE, assignment

    gradient_TE, assignment = jax.tree.map(np.asarray, both(poisoned_TE))
    check_form(assignment)
    padded_A = ~mask_T[assignment.token_A]
    assert (assignment.expert_A[padded_A] == E).all()
    assert np.isfinite(gradient_TE).all() and not gradient_TE[~mask_T].any()
    assert not assignment.scores_TE[~mask_T].any() and not assignment.logits_TE[~mask_T].any()
    assert (assignment.expert_A[~padded_A] < E).any()
    clean_gradient_TE, clean = jax.tree.map(np.asarray, both(clean_TE))
    np.testing.assert_array_equal(clean.expert_A, assignment.expert_A)
    np.testing.assert_array_equal(clean_gradient_TE, gradient_TE)


def test_noise_needs_a_key():
    logits_TE = logits()
    clean, load_TE = run(lambda x: routing.noisy_top_k(x, 2, None, sigma=0.5), logits_TE)
    plain = run(lambda x: routing.top_k(x, 2, score="softmax_after"), logits_TE)
    assert load_TE is None
    np.testing.assert_array_equal(clean.expert_A, plain.expert_A)
    np.testing.assert_array_equal(routing.jitter(jnp.ones((3, 2)), None), 1)
    jittered_TD = routing.jitter(jnp.ones((100, 2)), jax.random.key(0), 1e-2)
    assert 0.99 <= jittered_TD.min() < 0.995 and 1.005 < jittered_TD.max() <= 1.01
    top2 = run(lambda x: routing.gshard_top2(x, None), logits_TE)
    np.testing.assert_array_equal(top2.expert_A, run(lambda x: routing.top_k(x, 2), logits_TE).expert_A)
    greedy = run(lambda x: routing.policy(x, None), logits_TE)
    np.testing.assert_array_equal(greedy.expert_A, logits_TE.argmax(1))


def test_smooth_load_is_the_chance_of_being_chosen():
    """Against fresh noise drawn for one expert at a time, the others' noise held."""
    tokens, draws, sigma = 4, 20_000, 0.7
    logits_TE = logits(2, tokens, 5)
    assignment, load_TE = run(lambda x: routing.noisy_top_k(x, 2, jax.random.key(3), sigma=sigma), logits_TE)
    with jax.enable_x64(True):
        noise_TE = np.asarray(jax.random.normal(jax.random.key(3), logits_TE.shape, np.float64)) * sigma
    noisy_TE = logits_TE + noise_TE
    np.testing.assert_array_equal(choices(assignment, 2)[0], np.argsort(-noisy_TE, axis=1)[:, :2])
    np.testing.assert_array_equal(assignment.logits_TE, logits_TE)
    whole, _ = run(lambda x: routing.noisy_top_k(x, 2, jax.random.key(3), sigma=sigma, score="softmax"), logits_TE)
    probability_TE = np.exp(noisy_TE) / np.exp(noisy_TE).sum(1, keepdims=True)
    np.testing.assert_allclose(choices(whole, 2)[1], -np.sort(-probability_TE, axis=1)[:, :2], rtol=1e-6)
    rng = np.random.default_rng(0)
    for t in range(tokens):
        for e in range(5):
            threshold = np.sort(np.delete(noisy_TE[t], e))[-2]
            chance = (logits_TE[t, e] + sigma * rng.normal(size=draws) > threshold).mean()
            assert abs(load_TE[t, e] - chance) < 0.015


def test_gshard_keeps_the_second_expert_in_proportion():
    tokens = 20_000
    logits_TE = np.tile(np.log([[0.75, 0.15, 0.10]]), (tokens, 1))
    threshold = run(lambda x: routing.gshard_top2(x, jax.random.key(0)), logits_TE)
    expert_TK, weight_TK = choices(threshold, 2)
    kept_T = expert_TK[:, 1] == 1
    assert set(expert_TK[:, 1]) == {1, 3}
    # g2 renormalised is 0.15/0.9 = 1/6, kept with probability 1/3.
    assert abs(kept_T.mean() - 1 / 3) < 0.015
    np.testing.assert_allclose(weight_TK[kept_T][0], [5 / 6, 1 / 6])
    sample = run(lambda x: routing.gshard_top2(x, jax.random.key(1), second="sample"), logits_TE)
    expert_TK, weight_TK = choices(sample, 2)
    assert abs((expert_TK[:, 1] == 1).mean() - 0.6) < 0.015 and set(expert_TK[:, 1]) == {1, 2}
    np.testing.assert_allclose(weight_TK.sum(1), 1)


def test_uniform_is_uniform_and_repeatable():
    draw = jax.jit(lambda seed: routing.uniform(jax.random.key(seed), 8000, E, 2).expert_A)
    first_A = np.asarray(draw(0))
    assert abs(np.bincount(first_A, minlength=E) - 2000).max() < 160
    np.testing.assert_array_equal(draw(0), first_A)
    assert (draw(1) != first_A).any()


def test_expert_choice_takes_each_experts_best_tokens():
    logits_TE = logits()
    assignment = run(lambda x: routing.expert_choice(x, 5), logits_TE)
    scores_TE = np.apply_along_axis(softmax, 1, logits_TE)
    assert assignment.per_token is None and len(assignment.expert_A) == E * 5
    for e in range(E):
        mine = assignment.expert_A == e
        np.testing.assert_array_equal(assignment.token_A[mine], np.argsort(-scores_TE[:, e], kind="stable")[:5])
        np.testing.assert_allclose(assignment.weight_A[mine], scores_TE[assignment.token_A[mine], e])


def test_sinkhorn_balances():
    logits_TE = logits(4, 256) + 2 * np.arange(E) / E
    plan_TE = np.exp(run(routing.sinkhorn_plan, logits_TE))
    np.testing.assert_allclose(plan_TE.sum(0), 256 / E, rtol=1e-9)
    np.testing.assert_allclose(plan_TE.sum(1), 1, rtol=1e-3)
    # A transport plan: log plan − logits is a sum of a token's and an expert's potential.
    potential_TE = np.log(plan_TE) - logits_TE
    potential_TE -= potential_TE[:1] + potential_TE[:, :1] - potential_TE[0, 0]
    np.testing.assert_allclose(potential_TE, 0, atol=1e-9)
    balanced = run(lambda x: routing.sinkhorn(x), logits_TE)
    greedy = run(lambda x: routing.sinkhorn(x, balance=False), logits_TE)
    assert np.bincount(balanced.expert_A).max() < 0.7 * np.bincount(greedy.expert_A).max()
    scores_TE = np.apply_along_axis(softmax, 1, logits_TE)
    np.testing.assert_allclose(balanced.weight_A, scores_TE[np.arange(256), balanced.expert_A])
    sigmoid = run(lambda x: routing.sinkhorn(x, gate="sigmoid"), logits_TE)
    np.testing.assert_allclose(sigmoid.weight_A, 1 / (1 + np.exp(-logits_TE[np.arange(256), sigmoid.expert_A])))


@pytest.mark.parametrize("tokens", [64, 61])
def test_auction_is_optimal(tokens):
    values_TE = logits(5, tokens) + np.arange(E)
    capacity = -(-tokens // E)
    expert_T, rounds = run(lambda x: routing.auction(x, capacity, epsilon=1e-4), values_TE)
    assert np.bincount(expert_T, minlength=E).max() <= capacity and expert_T.max() < E and rounds < 10_000
    rows, columns = scipy.optimize.linear_sum_assignment(-np.repeat(values_TE, capacity, axis=1))
    best = np.repeat(values_TE, capacity, axis=1)[rows, columns].sum()
    assert values_TE[np.arange(tokens), expert_T].sum() >= best - tokens * 1e-4


def test_base_gates_by_the_sigmoid():
    logits_TE = logits(6)
    balanced = run(lambda x: routing.base(x), logits_TE)
    np.testing.assert_array_equal(np.bincount(balanced.expert_A, minlength=E), T // E)
    np.testing.assert_allclose(balanced.weight_A, 1 / (1 + np.exp(-logits_TE[np.arange(T), balanced.expert_A])))
    greedy = run(lambda x: routing.base(x, balance=False), logits_TE)
    np.testing.assert_array_equal(greedy.expert_A, logits_TE.argmax(1))


@pytest.mark.parametrize("live", [16, 9, 1, 0])
def test_base_balances_what_is_no_padding(live):
    mask_T = np.random.default_rng(0).permutation(T) < live
    logits_TE = logits(6) + 3 * np.arange(E)
    assignment = run(lambda x, m: routing.base(x, mask_T=m), logits_TE, mask_T)
    assert (assignment.expert_A[~mask_T] == E).all() and (assignment.expert_A[mask_T] < E).all()
    room = -(-live // E)
    assert np.bincount(assignment.expert_A[mask_T], minlength=E).max() <= room
    values = np.repeat(logits_TE[mask_T], room, axis=1)
    best = values[scipy.optimize.linear_sum_assignment(-values)].sum()
    assert logits_TE[mask_T, assignment.expert_A[mask_T]].sum() >= best - T * 1e-3


def test_hash_tables():
    counts_V = np.random.default_rng(7).zipf(1.5, 200).clip(max=500)
    load_E = np.bincount(routing.balanced_table(counts_V, E)[:, 0], counts_V, minlength=E)
    assert load_E.max() <= max(load_E.mean() + counts_V.max(), counts_V.max())
    assert load_E.max() < np.bincount(routing.random_table(0, 200, E)[:, 0], counts_V, minlength=E).max()
    table_VK = routing.random_table(1, 50, E, 3)
    assert all(len(set(row)) == 3 for row in table_VK)
    token_ids_T = np.array([4, 49, 4, 0], np.int32)
    assignment = run(lambda ids: routing.by_token_id(ids, jnp.asarray(table_VK), E), token_ids_T)
    np.testing.assert_array_equal(assignment.expert_A.reshape(4, 3), table_VK[token_ids_T])
    np.testing.assert_allclose(assignment.weight_A, 1 / 3, rtol=1e-6)


def test_policy_gradient_by_hand():
    logits_TE = logits(8, 6, 3)
    reward_T, baseline_T = np.random.default_rng(9).normal(size=(2, 6))
    mask_T = np.array([True, True, True, True, False, True])

    def losses(logits_TE, baseline_T, which):
        assignment = routing.policy(logits_TE, jax.random.key(0), mask_T=jnp.asarray(mask_T))
        return routing.policy_loss(assignment, jnp.asarray(reward_T), baseline_T, jnp.asarray(mask_T))[which]

    expert_T = run(lambda x: routing.policy(x, jax.random.key(0)), logits_TE).expert_A

    def gradient(which):
        return run(jax.grad(functools.partial(losses, which=which), argnums=(0, 1)), logits_TE, baseline_T)

    policy_TE, none_T = gradient("policy")
    for t in range(6):
        # −(r − b)·∇ log π = (r − b)·(π − onehot)
        expected = (reward_T[t] - baseline_T[t]) * (softmax(logits_TE[t]) - np.eye(3)[expert_T[t]]) * mask_T[t]
        np.testing.assert_allclose(policy_TE[t], expected, atol=1e-12)
    assert not none_T.any()
    none_TE, slope_T = gradient("baseline")
    assert not none_TE.any()
    np.testing.assert_allclose(slope_T, 2 * (baseline_T - reward_T) * mask_T)


def test_refusals():
    x_TE = jnp.zeros((4, 6))
    for match, call in {
        "k is 7": lambda: routing.top_k(x_TE, 7),
        "score is 'relu'": lambda: routing.top_k(x_TE, 1, score="relu"),
        "weight_on is 'both'": lambda: routing.top_k(x_TE, 1, weight_on="both"),
        "groups is 4": lambda: routing.top_k(x_TE, 1, group_limit=GroupLimit(4, 2)),
        "k is 3": lambda: routing.top_k(x_TE, 3, group_limit=GroupLimit(3, 1)),
        "top is 3": lambda: GroupLimit(2, 3),
        "group_score is 'sum'": lambda: GroupLimit(2, 1, "sum"),
        "second is 'maybe'": lambda: routing.gshard_top2(x_TE, None, second="maybe"),
        "noise_logits_TE or sigma": lambda: routing.noisy_top_k(x_TE, 1, None),
        "capacity is 5": lambda: routing.expert_choice(x_TE, 5),
        "gate is 'tanh'": lambda: routing.sinkhorn(x_TE, gate="tanh"),
        "can't hold 4": lambda: routing.auction(x_TE[:, :3], 1),
        "per_token = 2": lambda: routing.policy_loss(routing.top_k(x_TE, 2), jnp.zeros(4), jnp.zeros(4)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
