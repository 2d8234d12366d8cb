"""Filters against their definitions, draws against the distribution they claim."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.inference.sampling import Sampling, filtered, make_sampling, sample

filtered_jit, sample_jit = jax.jit(filtered), jax.jit(sample)


def by_definition(logits_V, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """Probabilities of one row after the filters, token by token."""
    chance = np.exp((logits_V - logits_V.max()) / temperature)
    chance /= chance.sum()
    ranked = sorted(range(len(chance)), key=lambda v: (-logits_V[v], v))
    kept = ranked[:top_k]
    if top_p is not None:
        left, total, nucleus = sum(chance[v] for v in kept), 0.0, []
        for v in kept:
            if total / left >= top_p:
                break
            nucleus.append(v)
            total += chance[v]
        kept = nucleus
    if min_p is not None:
        kept = [v for v in kept if chance[v] >= min_p * chance.max()]
    result = np.zeros_like(chance)
    result[kept] = chance[kept] / chance[kept].sum()
    return result


CASES = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 1e-9},
    {"top_p": 0.55},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 2.0, "top_k": 7, "top_p": 0.6, "min_p": 0.3},
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_filters_follow_their_definitions(case, ties):
    logits_BV = np.random.default_rng(0).normal(0, 2, (16, 23))
    if ties:
        logits_BV = np.round(logits_BV)
    with jax.enable_x64(True):
        sampling = make_sampling(**{"temperature": 1.0, **case})
        ours_BV = jax.nn.softmax(filtered_jit(logits_BV, sampling), axis=-1)
    for ours_V, logits_V in zip(ours_BV, logits_BV, strict=True):
        np.testing.assert_allclose(ours_V, by_definition(logits_V, **case), atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_top_k_keeps_exactly_k_in_any_dtype(dtype):
    logits_BV = jnp.zeros((3, 11), dtype).at[1, 4].set(1)
    kept_BV = np.isfinite(filtered_jit(logits_BV, Sampling(1.0, top_k=3)))
    assert [np.flatnonzero(kept_V).tolist() for kept_V in kept_BV] == [[0, 1, 2], [0, 1, 4], [0, 1, 2]]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e30, 1e300])
def test_any_temperature_gives_a_distribution(temperature):
    logits_BV = jnp.asarray([[0.0, 3.0, 2.999, -jnp.inf, -80.0]])
    chance_V = jax.nn.softmax(filtered_jit(logits_BV, make_sampling(temperature)), axis=-1)[0]
    expected_V = [0, 1, 0, 0, 0] if temperature < 1 else [0.25, 0.25, 0.25, 0, 0.25]
    np.testing.assert_allclose(chance_V, expected_V, atol=1e-6)


def test_temperature_0_takes_the_lowest_of_equals():
    logits_BV = jnp.asarray([[1.0, 5.0, 5.0], [2.0, 2.0, 2.0]])
    assert sample_jit(logits_BV, None, make_sampling(0.0, top_p=0.1)).tolist() == [1, 0]


def test_draws_follow_the_distribution():
    """Chi-square over 40,000 draws: a bias of a few per cent would show, and nothing filtered out is ever drawn."""
    logits_V = jnp.asarray([0.0, 1.0, -1.0, 2.0, -6.0, 0.5])
    sampling = Sampling(0.8, top_k=5, top_p=0.98, min_p=0.02)
    expected_V = by_definition(np.asarray(logits_V, np.float64), **dataclasses.asdict(sampling))
    N = 40_000
    key_N = jax.random.split(jax.random.key(0), N)
    drawn_N = sample_jit(jnp.broadcast_to(logits_V, (N, 6)), key_N, sampling)
    counts_V = np.bincount(drawn_N, minlength=6)
    kept_V = expected_V > 0
    assert kept_V.sum() == 4 and counts_V[~kept_V].sum() == 0
    chi_square = np.sum((counts_V - N * expected_V)[kept_V] ** 2 / (N * expected_V[kept_V]))
    assert chi_square < 16.3  # the 0.1 % point of three degrees of freedom


def test_a_row_depends_on_its_own_key_and_logits_alone():
    logits_BV = jnp.asarray(np.random.default_rng(0).normal(0, 1, (8, 50)), jnp.float32)
    key_B, sampling = jax.random.split(jax.random.key(1), 8), Sampling(1.0, top_k=20)
    together_B = sample_jit(logits_BV, key_B, sampling)
    order_B = jnp.asarray([3, 1, 7, 0, 2, 6, 5, 4])
    np.testing.assert_array_equal(sample_jit(logits_BV[order_B], key_B[order_B], sampling), together_B[order_B])
    assert len(set(np.asarray(sample_jit(logits_BV[:1].repeat(8, 0), key_B, sampling)).tolist())) > 2


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.01),
    ],
)
def test_a_number_out_of_range_is_named(argument, value):
    with pytest.raises(ValueError, match=rf"{argument} must be .*, got {value}"):
        make_sampling(**{"temperature": 1.0, argument: value})


def test_what_filters_nothing_is_off():
    assert make_sampling(1.0, top_p=1.0, min_p=0.0) == Sampling(1.0)
    assert make_sampling(0.0, top_k=3) == Sampling(None)
