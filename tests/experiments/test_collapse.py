"""Experts collapse without balancing, and recover with each balancer (the lecture's claim, run)."""

import functools

import pytest

from experiments.lecture.collapse import BALANCERS, EXPERTS, run

# A loss or a bias needs longer than what balances by construction.
STEPS = dict.fromkeys(BALANCERS, 600) | {"switch loss": 1000, "loss-free bias": 1000}


@functools.cache
def collapsed(steps):
    return run(BALANCERS["none"], steps)


@pytest.mark.slow
def test_nothing_balances_by_itself():
    assert collapsed(600)["dead_experts"] >= EXPERTS // 2 and collapsed(600)["max_violation"] > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BALANCERS if name != "none"])
def test_every_balancer_keeps_experts_in_use(name):
    balanced = run(BALANCERS[name], STEPS[name])
    assert balanced["dead_experts"] == 0 and balanced["max_violation"] < 1
    assert balanced["error"] < 0.8 * collapsed(STEPS[name])["error"]
