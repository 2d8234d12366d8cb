"""The pictures exist, cover the run, and survive odd numbers."""

import json

import numpy as np
import pytest

from research.training import plots


def _write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_pictures_of_a_run(tmp_path):
    assert plots.draw(tmp_path) == []
    load = [[0.25, 0.25, 0.5, 0.0], [0.5, 0.5], [0.25, 0.25, 0.5, 0.0]]
    records = [
        {"step": step, "loss": 3.0 / step, "bits_per_byte": 4.0 / step, "tokens_per_second": 100.0}
        | ({"load": load} if step % 2 else {})
        for step in range(1, 9)
    ]
    records[3]["bits_per_byte"] = float("nan")
    _write(tmp_path / "metrics.jsonl", records)
    _write(tmp_path / "evaluations.jsonl", [{"step": 8, "bits_per_byte": 2.0}])
    written = plots.draw(tmp_path)
    assert {path.name for path in written} == {"loss.png", "throughput.png", "expert_load.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in written)


def test_a_run_of_one_step_without_experts_or_bytes(tmp_path):
    _write(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 3.0, "tokens_per_second": 9.0}])
    assert {path.name for path in plots.draw(tmp_path)} == {"loss.png", "throughput.png"}


def test_the_loss_picture_shows_every_step_and_evaluation():
    records = [{"step": step, "loss": 1.0, "bits_per_byte": 1.5} for step in (1, 2, 3)]
    axes = plots.loss_figure(records, [{"step": 3, "bits_per_byte": 2.0}]).axes[0]
    line, _, points = axes.lines
    assert list(line.get_xdata()) == [1, 2, 3] and list(points.get_ydata()) == [2.0]
    assert axes.get_ylabel() == "bits per byte"


def test_smoothed_has_no_lag():
    line = np.arange(100.0)
    assert plots.smoothed(line) == pytest.approx(line)
    assert plots.smoothed(np.array([1.0, np.nan, 3.0]), share=2.0)[1] == pytest.approx(2.0)
