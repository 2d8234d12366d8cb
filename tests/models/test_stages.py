"""Lists of layers become stages, and compile time follows the stages."""

import pytest

from research.models.stages import Stage, factorise


def spelled(stages):
    return [layer for stage in stages for layer in stage.unit * stage.repeats]


@pytest.mark.parametrize(
    ("layers", "stages"),
    [
        ("aaaa", [("a", 4)]),
        ("lmlmlmfm" * 3, [("lmlmlmfm", 3)]),
        ("dd" + "lm" * 6, [("d", 2), ("lm", 6)]),
        ("dmdm" + "lmlmfm" * 4, [("dm", 2), ("lmlmfm", 4)]),
        ("abc", [("abc", 1)]),
    ],
)
def test_factorise_finds_the_repeats(layers, stages):
    assert factorise(layers) == tuple(Stage(tuple(unit), repeats) for unit, repeats in stages)


def test_factorise_spells_any_list():
    layers = "MEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEME"  # Nemotron-H's irregular spacing
    stages = factorise(layers)
    assert spelled(stages) == list(layers)
    assert sum(len(stage.unit) for stage in stages) < len(layers) / 2
