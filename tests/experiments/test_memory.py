"""Each mechanism learns what its paper says it can, and does not learn what it cannot."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lecture.memory import MECHANISMS, TASKS, run
from research.ops.linear_attention import linear_attention


@pytest.mark.slow
def test_the_delta_rule_overwrites_and_an_additive_state_blends():
    assert run("recall", "deltanet", 400) > 0.98
    assert run("recall", "linear attention", 400) < 0.9


@pytest.mark.slow
def test_parity_needs_negative_eigenvalues():
    assert run("parity", "gated deltanet, β to 2", 400) > 0.98
    assert run("parity", "gated deltanet", 400) < 0.8


def test_every_task_names_mechanisms_that_exist():
    assert all(set(task.mechanisms) <= set(MECHANISMS) for task in TASKS.values())


def test_a_key_written_twice():
    """What the state holds for it: both values (additive), the first faded (decay), the second alone (the delta rule)."""
    first, second, gate = np.array([1.0, 2.0]), np.array([-3.0, 0.5]), -1.5
    k_BTGK = jnp.tile(jnp.array([0.6, 0.8, 0.0]), (1, 2, 1, 1))
    v_BTHV = jnp.array([first, second])[None, :, None]
    ones_BTH = jnp.ones((1, 2, 1))

    def last(**options):
        return linear_attention(k_BTGK, k_BTGK, v_BTHV, **options)[0][0, 1, 0]

    np.testing.assert_allclose(last(), first + second, rtol=1e-5)
    np.testing.assert_allclose(last(log_decay=gate * ones_BTH), np.exp(gate) * first + second, rtol=1e-5)
    np.testing.assert_allclose(last(beta=ones_BTH), second, rtol=1e-5)
    np.testing.assert_allclose(last(beta=ones_BTH, log_decay=gate * ones_BTH), second, rtol=1e-5)
