"""Each mechanism learns what its paper says it can, and does not learn what it cannot."""

import pytest

from experiments.lecture.memory import TASKS, run

pytestmark = pytest.mark.slow


def test_the_delta_rule_overwrites_and_an_additive_state_blends():
    assert run("recall", "deltanet", 300) > 0.98
    assert run("recall", "linear attention", 300) < 0.8


def test_parity_needs_negative_eigenvalues():
    assert run("parity", "gated deltanet, β to 2", 300) > 0.98
    assert run("parity", "gated deltanet", 300) < 0.8


def test_a_fixed_decay_forgets_and_the_delta_rule_holds():
    assert run("needle", "deltanet", 200) > 0.98
    assert run("needle", "retnet", 200) < 0.8


def test_every_task_names_mechanisms_that_exist():
    from experiments.lecture.memory import MECHANISMS

    assert all(set(task.mechanisms) <= set(MECHANISMS) for task in TASKS.values())
