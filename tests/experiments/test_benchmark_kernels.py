"""The kernel benchmark: a CPU's answer, one small call measured, and the page that is generated from results."""

import json
import pathlib

import pytest

from experiments import benchmark, cli
from experiments.benchmarks import _kernel_cases, _kernel_table, kernels

ROOT = pathlib.Path(__file__).parents[2]


def test_a_cpu_says_that_nothing_was_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.call(benchmark.main, ["kernels", "--json"]) == 0
    out = capsys.readouterr()
    result = json.loads(out.out)
    assert result["measured"] is False and "CPU only" in result["why"] and "not measured" in out.err
    assert {row["milliseconds"] for row in result["rows"]} == {"not measured"}
    assert not list(tmp_path.iterdir())


def test_a_call_is_measured_against_the_roofline(capsys, monkeypatch):
    case = _kernel_cases.convolution(1, 64, 8)
    broken = _kernel_cases.Case("broken", {}, lambda _: 1 / 0, 1.0, ways=("forward",))
    monkeypatch.setattr(kernels, "cases", lambda quick: [case, broken])
    assert cli.call(benchmark.main, ["kernels", "--json", "--quick"]) == 0
    *rows, error = json.loads(capsys.readouterr().out)["rows"]
    assert [row["way"] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["roofline_milliseconds"] / row["milliseconds"], rel=1e-2)
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["milliseconds"] * 1e3, rel=1e-2)
    # x, w in, y out; backward reads x, w and dy, and writes dx and dw.
    x, w = 64 * 8 * 2, 4 * 8 * 2
    assert [row["bytes"] for row in rows] == [2 * x + w, 3 * x + 2 * w]
    assert error["milliseconds"] == "not measured" and "ZeroDivisionError" in error["error"]


def test_the_page_is_what_the_results_say():
    assert (ROOT / "benchmarks/kernels.md").read_text() == _kernel_table.text(ROOT / "benchmarks/results"), (
        "write it anew: python -m experiments.benchmarks._kernel_table"
    )


def test_the_last_day_of_a_card_is_shown(tmp_path, monkeypatch):
    case = _kernel_cases.convolution(1, 64, 8)
    monkeypatch.setattr(_kernel_table, "cases", lambda: [case])
    folder = tmp_path / "nvidia_h200"
    folder.mkdir()
    row = {"op": case.name, "shape": case.shape, "way": "forward", "implementation": "xla", "ratio": 0.5}
    for day, milliseconds in (("2030-01-01", 3.0), ("2030-01-02", 2.0)):
        (folder / f"{day}.json").write_text(json.dumps({"rows": [{**row, "milliseconds": milliseconds}]}))
    forward, backward = _kernel_table.text(tmp_path).splitlines()[-2:]
    assert "| xla 2 (0.50) | not measured |" in forward and "xla" not in backward


@pytest.mark.slow
def test_every_kind_of_call_runs(capsys):
    assert cli.call(benchmark.main, ["kernels", "--json", "--quick"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == sum(len(case.ways) for case in _kernel_cases.cases(quick=True))
    assert not any("error" in row for row in rows)
