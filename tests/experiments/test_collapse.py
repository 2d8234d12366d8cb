"""Experts collapse without balancing, and recover with each balancer (the lecture's claim, run)."""

import functools

import pytest

from experiments.lecture.collapse import BALANCERS, EXPERTS, run

# A loss or a bias needs longer than what balances by construction.
CONSTRUCTED = ("sinkhorn", "base", "expert choice")
STEPS = {name: 600 if name in CONSTRUCTED else 1000 for name in BALANCERS}
# These level devices, or have no gradient for an expert that nobody visits: fewer experts die, not none.
DEVICES = ("device loss", "communication loss")
PARTLY = ("importance loss", "load loss", "importance and load", *DEVICES)


@functools.cache
def collapsed(steps):
    return run(BALANCERS["none"], steps)


@pytest.mark.slow
def test_nothing_balances_by_itself():
    assert collapsed(600)["dead_experts"] >= EXPERTS // 2 and collapsed(600)["max_violation"] > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BALANCERS if name != "none"])
def test_every_balancer_keeps_experts_in_use(name):
    balanced, before = run(BALANCERS[name], STEPS[name]), collapsed(STEPS[name])
    assert balanced["error"] < 0.8 * before["error"]
    assert balanced["dead_experts"] <= (before["dead_experts"] // 2 if name in PARTLY else 0)
    if name in DEVICES:
        assert balanced["device_violation"] < 0.3 < before["device_violation"]
    else:
        assert balanced["max_violation"] < 1
