"""Presets of published models have the sizes that were published, and the page that says so is true."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import parameters

PAGE = Path(__file__).parents[2] / "docs/parameters.md"
counted, cached = functools.cache(parameters.counted), functools.cache(parameters.cached)


@pytest.fixture(autouse=True, scope="module")
def no_draws():
    """Only shapes count here, and tracing the draws is most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "truncated_normal", lambda key, low, high, shape, dtype: jnp.zeros(shape, dtype))
        yield


@pytest.mark.parametrize("name", parameters.PUBLISHED)
def test_published_size(name):
    total, active, _, note = parameters.PUBLISHED[name]
    cached(name)  # while the shapes of this one are at hand; the page asks for it
    assert agrees(counted(name).total, total) if total is not None else note
    assert active is None or agrees(parameters.active(name, counted(name)), active)


def agrees(count: int, billions: float) -> bool:
    """Within 1 %, or to the digits that were published, rounded or cut off."""
    unit = 1 if isinstance(billions, int) else 10 ** -len(str(billions).split(".")[1])
    return abs(count / 1e9 / billions - 1) < 0.01 or -unit / 2 <= count / 1e9 - billions < unit


def test_the_page_is_what_the_command_prints(monkeypatch):
    monkeypatch.setattr(parameters, "counted", counted)
    monkeypatch.setattr(parameters, "cached", cached)
    assert PAGE.read_text() == parameters.page(list(parameters.table(list(parameters.PUBLISHED))))


def test_deepseek_v3_caches_576_numbers_a_layer():
    assert cached("deepseek_v3_671b") == 576 * 2 * 61


def test_an_unknown_name(capsys):
    from experiments import cli

    assert cli.call(parameters.main, ["gpt_7"]) == 2
    assert "'gpt_7' is no preset of a published model" in capsys.readouterr().err
