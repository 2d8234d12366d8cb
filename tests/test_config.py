"""Configurations: JSON there and back, overrides, and what a wrong one says."""

import dataclasses
from typing import Literal

import pytest

from research.config import ConfigError, fields_of, from_dict, from_json, override, to_dict, to_json


@dataclasses.dataclass(frozen=True)
class Conv:
    taps: int = 4


@dataclasses.dataclass(frozen=True)
class Gate:
    rate: float = 0.5
    kind_of_gate: Literal["hard", "soft"] = "soft"


@dataclasses.dataclass(frozen=True)
class Branch:
    name: str
    mixer: Conv | Gate = Conv()


@dataclasses.dataclass(frozen=True)
class Whole:
    branches: tuple[Branch, ...] = (Branch("a"), Branch("b", Gate()))
    paths: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    maybe: tuple[int, ...] | None = None
    clip: float | None = 1.0
    name: str = "x"
    note: str | None = None
    on: bool = False
    steps: int = 10
    inner: Conv = Conv()

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


def test_json_there_and_back():
    config = override(override(Whole(), "branches.b.mixer.rate=0.25"), "clip=null")
    assert from_json(Whole, to_json(config)) == config
    assert to_dict(config)["branches"][1]["mixer"] == {"kind": "Gate", "rate": 0.25, "kind_of_gate": "soft"}


@pytest.mark.parametrize(
    ("word", "path", "value"),
    [
        ("steps=20", "steps", 20),
        ("clip=2", "clip", 2.0),
        ("clip=1e-3", "clip", 1e-3),
        ("clip=None", "clip", None),
        ("clip=null", "clip", None),
        ("on=true", "on", True),
        ("on=True", "on", True),
        ("name=123", "name", "123"),
        ("name=a=b", "name", "a=b"),
        ("name=", "name", ""),
        ("name={[]: 1}", "name", "{[]: 1}"),
        ("note=none of that", "note", "none of that"),
        ("paths=a.txt,b/*.py", "paths", ("a.txt", "b/*.py")),
        ("paths=2024", "paths", ("2024",)),
        ("paths=1,b", "paths", ("1", "b")),
        ('paths=["a,b"]', "paths", ("a,b",)),
        ("paths=", "paths", ()),
        ("pair=3,4", "pair", (3, 4.0)),
        ("pair.1=7", "pair", (1, 7.0)),
        ("maybe=3", "maybe", (3,)),
        ("maybe=null", "maybe", None),
        ("inner.taps=2", "inner", Conv(2)),
        ("branches.1.mixer.rate=1", "branches", (Branch("a"), Branch("b", Gate(1.0)))),
        ("branches.a.mixer=Gate", "branches", (Branch("a", Gate()), Branch("b", Gate()))),
        ("branches.b.mixer.kind_of_gate=hard", "branches", (Branch("a"), Branch("b", Gate(kind_of_gate="hard")))),
    ],
)
def test_override(word, path, value):
    got = getattr(override(Whole(), word), path)
    assert got == value
    assert type(got) is type(value)


def test_override_items_of_an_optional_tuple():
    assert override(Whole(maybe=(1, 2)), "maybe.0=5").maybe == (5, 2)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("steps", "must read field.sub=value"),
        ("=3", "must read field.sub=value"),
        ("stepz=3", "stepz is not a field of Whole; did you mean steps?"),
        ("inner.zzz=3", "inner.zzz is not a field of Conv: its fields are taps"),
        ("steps=a", "steps must be int, got 'a'"),
        ("steps=1.5", "steps must be int, got 1.5"),
        ("steps=true", "steps must be int, got True"),
        ("steps=0", "steps must be at least 1, got 0"),
        ("on=yes", "on must be bool, got 'yes'"),
        ("clip=fast", "clip must be float or none, got 'fast'"),
        ("inner=Gate", "inner must be a Conv, got 'Gate'"),
        ("steps.more=1", "steps is 10, which has no fields"),
        ("branches.c.name=q", "the items are a, b"),
        ("branches.b.mixer.kind_of_gate=wet", "must be 'hard' | 'soft', got 'wet'"),
        ("pair=1,2,3", "pair must have 2 items, got 3"),
        ("pair=1,b", "pair.1 must be float, got 'b'"),
        ("maybe=1,b", "maybe.1 must be int, got 'b'"),
    ],
)
def test_a_wrong_override_says_what_it_must_be(word, says):
    with pytest.raises(ConfigError) as error:
        override(Whole(), word)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"stepz": 1}, "config.stepz is not a field of Whole; did you mean steps?"),
        ({"kind": "Other"}, "config.kind must be Whole"),
        ({"branches": [{}]}, "config.branches.0 (Branch) needs name"),
        ({"branches": [{"name": "a", "mixer": {"kind": "Pool"}}]}, "mixer.kind must be one of Conv, Gate, got 'Pool'"),
        ({"inner": 3}, "config.inner must be a Conv, got 3"),
        ([], "config must be a Whole, got []"),
    ],
)
def test_a_wrong_dict_says_where(value, says):
    with pytest.raises(ConfigError) as error:
        from_dict(Whole, value)
    assert says in str(error.value)


def test_text_that_is_not_json():
    with pytest.raises(ConfigError, match=r"config.json is not JSON"):
        from_json(Whole, "{", "config.json")


def test_fields_are_listed_with_types_and_values():
    listed = {path: (kind, value) for path, kind, value in fields_of(Whole())}
    assert listed["branches.b.mixer"] == ("Conv or Gate", "Gate")
    assert listed["branches.b.mixer.rate"] == ("float", 0.5)
    assert listed["paths"] == ("tuple of str", ())
    assert listed["clip"] == ("float or none", 1.0)
    assert listed["inner.taps"] == ("int", 4)


def test_what_a_configuration_cannot_hold():
    @dataclasses.dataclass(frozen=True)
    class Bad:
        items: list = dataclasses.field(default_factory=list)

    with pytest.raises(TypeError, match="scalars, tuples and dataclasses"):
        to_dict(Bad())
