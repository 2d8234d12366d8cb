"""Each mechanism learns what its paper says it can, and does not learn what it cannot."""

import pytest

from experiments.lecture.memory import TASKS, run

pytestmark = pytest.mark.slow


def test_the_delta_rule_overwrites_and_an_additive_state_blends():
    assert run("recall", "deltanet", 400) > 0.98
    assert run("recall", "linear attention", 400) < 0.8


def test_parity_needs_negative_eigenvalues():
    assert run("parity", "gated deltanet, β to 2", 400) > 0.98
    assert run("parity", "gated deltanet", 400) < 0.8


def test_every_task_names_mechanisms_that_exist():
    from experiments.lecture.memory import MECHANISMS

    assert all(set(task.mechanisms) <= set(MECHANISMS) for task in TASKS.values())
