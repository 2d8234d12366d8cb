"""metrics.jsonl, TensorBoard events and the line on the terminal."""

import json
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from research.training import metrics


def _lines(path):
    return [record["step"] for record in metrics.read_lines(path)]


def test_cut_back_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = metrics.JsonLines(path, 0)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1 / 3})
        assert _lines(path)[-1] == step, "every line is flushed as it is written"
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    assert _lines(path) == [1, 2, 3, 4, 5]
    log = metrics.JsonLines(path, 3)
    log.write({"step": 4, "loss": 0.5})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert next(metrics.read_lines(path))["loss"] == 1 / 3, "exact"


def test_cut_back_keeps_a_file_that_ends_in_a_torn_line_whole_up_to_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}')
    metrics.cut_back(path, 10)
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'
    metrics.cut_back(tmp_path / "none.jsonl", 10)


def _events(folder):
    """(step, tag, value) and session starts of a folder's event files, as TensorBoard reads them."""
    events = []
    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (size,) = struct.unpack_from("<Q", data, place)
            events.append(Event.FromString(data[place + 12 : place + 12 + size]))
            place += 16 + size
    kept = []
    for event in events:
        if event.session_log.status == event.session_log.START and event.HasField("session_log"):
            kept = [item for item in kept if item[0] < event.step]
        kept += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return kept


def test_resuming_does_not_duplicate_tensorboard_steps(tmp_path):
    for resume, steps in ((0, range(1, 6)), (3, range(4, 8))):
        board = metrics.TensorBoard(tmp_path, resume)
        for step in steps:
            board.write(step, {"loss": float(step)})
        board.close()
    assert _events(tmp_path) == [(step, "train/loss", float(step)) for step in range(1, 8)]


def test_progress_shows_itself_every_few_seconds_and_at_the_end():
    said = []
    progress = metrics.Progress(100, every_seconds=5.0, say=said.append)
    assert [now for now in range(12) if progress.due(now + 1, now=float(now))] == [0, 5, 10]
    assert progress.due(100, now=11.5)
    speed = metrics.Throughput(now=0.0)
    for tenth in range(1, 5):
        assert speed.step(1000.0, now=tenth / 10) == pytest.approx(10_000)
    load_LE = np.array([[0.5, 0.25, 0.25, 0.0]])
    progress.show({"step": 40, "loss": 1.25, "bits_per_byte": 1.8034, "dead_experts": 1.0}, speed, load_LE)
    assert said == [
        "step  40/100  loss 1.2500  1.803 bits/byte  10k tokens/s  6s left  experts █▅▅▁ busiest 2.0x its share  1 dead"
    ]


def test_throughput_forgets_and_pauses():
    speed = metrics.Throughput(now=0.0)
    for second in range(1, 200):
        speed.step(100.0, now=float(second))
    assert speed.smooth == pytest.approx(100) and speed.seconds_per_step == pytest.approx(1)
    speed.pause(50.0)
    assert speed.step(100.0, now=250.0) == pytest.approx(100)


def test_a_stall_weighs_what_it_lasted():
    speed, now = metrics.Throughput(now=0.0), 0.0
    for _ in range(5):
        for seconds in [0.01] * 100 + [1.0]:
            now += seconds
            speed.step(10.0, now=now)
    assert speed.seconds_per_step == pytest.approx(2 / 101, rel=0.2)


def test_what_a_person_reads():
    assert [metrics.duration(s) for s in (-1.0, 59.6, 200.0, 7500.0, 273600.0)] == [
        "0s",
        "1m 00s",
        "3m 20s",
        "2h 05m",
        "3d 04h",
    ]
    assert [metrics.count(n) for n in (0.0, 932.4, 999.6, 12345.0, 4.56e6)] == ["0", "932", "1k", "12.3k", "4.56M"]
    assert len(metrics.sparkline(np.ones(256))) == 32
    assert metrics.sparkline(np.zeros(4)) == "▁▁▁▁"
