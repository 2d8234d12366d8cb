"""Experts collapse without balancing, whatever the router, and recover with each balancer (the lecture's claim, run)."""

import functools
import json
import pathlib

import pytest

from experiments.lecture import collapse
from experiments.lecture.collapse import EXPERTS, RUNS, run

ROOT = pathlib.Path(__file__).parent.parent.parent
# These level devices and no experts; DeepSeek uses them beside an expert loss, which is a run of its own.
DEVICES = ("device loss", "communication loss")
# These have no gradient for an expert that nobody visits: fewer die, not none.
PARTLY = ("importance loss of weights", "load loss", "importance and load losses", *DEVICES)
CASES = [(router, name) for router, balancers in RUNS.items() for name in balancers if name != "none"]


def check(router, name, balanced, before):
    assert before["dead_experts"] >= EXPERTS // 2 and before["max_violation"] > 2
    # Fixed noise alone halves the error already: what is left to win is less.
    noise_helps = (router, name) == ("fixed noise (V-MoE)", "importance loss of probabilities, load loss")
    assert balanced["error"] < (0.85 if noise_helps else 0.8) * before["error"]
    assert balanced["dead_experts"] <= (before["dead_experts"] // 2 if name in PARTLY else 0)
    if name in DEVICES:
        assert balanced["device_violation"] < 0.3 < before["device_violation"]
    else:
        assert balanced["max_violation"] < 1


@functools.cache
def ran(router, name):
    return run(RUNS[router][name], 1000)


@pytest.mark.slow
@pytest.mark.parametrize(("router", "name"), CASES)
def test_every_balancer_keeps_experts_in_use(router, name):
    check(router, name, ran(router, name), ran(router, "none"))


@pytest.mark.parametrize(("router", "name"), CASES)
def test_what_was_measured(router, name):
    """The committed result has every run, and is what the docstring says it is."""
    result = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "collapse.json").read_text())
    assert {key: list(runs) for key, runs in result["results"].items()} == {
        key: list(runs) for key, runs in RUNS.items()
    }
    check(router, name, *(result["results"][router][run] for run in (name, "none")))
    assert f"{result['steps']:,} steps" in str(collapse.__doc__)
