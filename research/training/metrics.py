"""What a run says about itself: ``metrics.jsonl`` (every step), TensorBoard events, and a line on the terminal."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
BARS = "▁▂▃▄▅▆▇█"


def read_lines(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, up to the first line that is torn (a process killed in mid-write leaves one)."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        for line in file:
            record = _parse(line)
            if record is None:
                return
            yield record


def cut_back(path: str | os.PathLike, step: int) -> None:
    """Drops every line after ``step``, and a torn last line, in place: what a run resumed at ``step`` writes again."""
    if not os.path.exists(path):
        return
    with open(path, "r+b") as file:
        keep = 0
        for line in file:
            record = _parse(line)
            if record is None or record["step"] > step:
                break
            keep += len(line)
        file.truncate(keep)


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


class JsonLines:
    """A JSON-lines file of one object a step, opened at ``resume_step`` (see ``cut_back``) and flushed a line."""

    def __init__(self, path: str | os.PathLike, resume_step: int):
        cut_back(path, resume_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held open for the whole run)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, separators=(", ", ": ")) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Puts the lines on the disk: before a checkpoint is committed that claims they are there."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard; steps after ``resume_step`` that an earlier process wrote are purged from display."""

    def __init__(self, folder: str | os.PathLike, resume_step: int):
        # Unlike the JSON lines, event files are append-only: TensorBoard itself drops what a purge step overrules.
        # The suffix keeps two files begun within one second apart, and in order.
        self._writer = SummaryWriter(
            str(folder), purge_step=resume_step + 1, filename_suffix=f".{resume_step:09d}", write_to_disk=True
        )

    def write(self, step: int, scalars: dict[str, float], prefix: str = "train") -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(f"{prefix}/{name}", value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Throughput:
    """Tokens per second of the last step, and rates over about the last ten seconds.

    Rates are averaged over time, which makes them totals over totals: one long stall weighs what it lasted.
    """

    def __init__(self, now: float | None = None):
        self._last = time.monotonic() if now is None else now
        self._weight = 0.0
        self._steps_per_second = 0.0
        self.smooth = 0.0
        self.steps = 0

    @property
    def seconds_per_step(self) -> float:
        return 1 / self._steps_per_second if self._steps_per_second else 0.0

    def step(self, tokens: float, now: float | None = None) -> float:
        now = time.monotonic() if now is None else now
        seconds, self._last = max(now - self._last, 1e-9), now
        keep = math.exp(-seconds / 10)
        self._weight = keep * self._weight + (1 - keep)
        mix = (1 - keep) / self._weight  # the first step counts in full: no bias towards zero
        self._steps_per_second += mix * (1 / seconds - self._steps_per_second)
        self.smooth += mix * (tokens / seconds - self.smooth)
        self.steps += 1
        return tokens / seconds

    def pause(self, seconds: float) -> None:
        """Takes ``seconds`` spent on something else (evaluating, saving) out of the step under way."""
        self._last += seconds


class Progress:
    """A line on the terminal every ``every_seconds``: whole lines, so that a log file reads as well as a terminal."""

    def __init__(self, steps: int, *, every_seconds: float = 5.0, say: Callable[[str], None] | None = None):
        self._steps, self._every = steps, every_seconds
        self._say = say or say_now
        self._last = -math.inf

    def due(self, step: int, now: float | None = None) -> bool:
        now = time.monotonic() if now is None else now
        if step < self._steps and now - self._last < self._every:
            return False
        self._last = now
        return True

    def show(self, record: dict[str, Any], speed: Throughput, load_LE: np.ndarray | None = None) -> None:
        step = record["step"]
        width = len(str(self._steps))
        parts = [
            f"step {step:{width}d}/{self._steps}",
            f"loss {record['loss']:.4f}",
            f"{record['bits_per_byte']:.3f} bits/byte" if "bits_per_byte" in record else "",
            f"{count(speed.smooth)} tokens/s",
            self._left(step, speed),
        ]
        if load_LE is not None and np.size(load_LE):
            relative = np.full(np.shape(load_LE), np.nan)
            for row, share in zip(relative, by_layer(load_LE), strict=True):
                row[: share.size] = share * share.size
            parts.append(f"experts {sparkline(np.nanmean(relative, 0))} busiest {np.nanmax(relative):.1f}x its share")
            if record.get("dead_experts"):
                parts.append(f"{record['dead_experts']:.0f} dead")
        self._say("  ".join(part for part in parts if part))

    def _left(self, step: int, speed: Throughput) -> str:
        if step >= self._steps:
            return "done"
        # The first steps of a process are no measure: caches are cold.
        return f"{duration((self._steps - step) * speed.seconds_per_step)} left" if speed.steps > 3 else ""


class Recorder:
    """Everything a run writes down: both JSON-lines files, TensorBoard events and the terminal.

    Of several processes only the first one writes (``active``).
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        steps: int,
        resume_step: int,
        log_every: int,
        progress_seconds: float,
        say: Callable[[str], None],
        active: bool = True,
    ):
        self.throughput = Throughput()
        self.evaluated: set[int] = set()
        self._steps, self._log_every, self._active = steps, log_every, active
        self._loss_sum = self._bits_sum = 0.0
        self._since = 0
        if active:
            metrics_file, evaluations_file = run_files(workdir)
            self._metrics = JsonLines(metrics_file, resume_step)
            self._evaluations = JsonLines(evaluations_file, resume_step)
            self.evaluated = {record["step"] for record in read_lines(evaluations_file)}
            self._board = TensorBoard(Path(workdir) / TENSORBOARD_FOLDER, resume_step)
            self._progress = Progress(steps, every_seconds=progress_seconds, say=say)

    def step(self, record: dict[str, Any], load_LE: np.ndarray | None = None) -> None:
        """Records one step: a line of metrics.jsonl always, the rest when it is due."""
        if not self._active:
            return
        step = record["step"]
        if step % self._log_every == 0 or step in (1, self._steps):
            self._board.write(step, {name: value for name, value in record.items() if name != "step"})
            if load_LE is not None:
                self._board.write(
                    step, {f"layer_{i + 1}": float(m) for i, m in enumerate(load_LE.max(1))}, "largest_load"
                )
                loads = [[round_to(share, 4) for share in load_E.tolist()] for load_E in by_layer(load_LE)]
                record = {**record, "load": loads}
        self._metrics.write(record)
        self._loss_sum += record["loss"]
        self._bits_sum += record.get("bits_per_byte", 0.0)
        self._since += 1
        if self._progress.due(step):
            # What has come since the last line, on average: single batches jump about.
            mean = {"loss": self._loss_sum / self._since, "bits_per_byte": self._bits_sum / self._since}
            self._progress.show(
                record | {name: mean[name] for name in mean if name in record}, self.throughput, load_LE
            )
            self._loss_sum = self._bits_sum = 0.0
            self._since = 0

    def evaluation(self, record: dict[str, Any]) -> None:
        self.evaluated.add(record["step"])
        if self._active:
            self._evaluations.write(record)
            self._board.write(record["step"], {"bits_per_byte": record["bits_per_byte"]}, "held_out")

    def sync(self) -> None:
        """Everything so far on the disk, before a checkpoint that counts on it."""
        if self._active:
            self._metrics.sync()
            self._evaluations.sync()
            self._board.flush()

    def close(self) -> None:
        if self._active:
            self._metrics.close()
            self._evaluations.close()
            self._board.close()


def by_layer(load_LE: np.ndarray) -> list[np.ndarray]:
    """The training step's load_LE, each layer's row as long as it has experts."""
    return [load_E[load_E >= 0] for load_E in np.asarray(load_LE)]


def round_to(value: float, digits: int) -> float:
    """``value`` to so many significant digits: shorter lines."""
    return float(f"{value:.{digits}g}")


def say_now(line: str) -> None:
    """One line on stdout, at once, even into a pipe."""
    print(line, flush=True)


def sparkline(load_E: np.ndarray, width: int = 32) -> str:
    """Shares of experts as bars: half height is the fair share, full height twice that or more. ASCII where it must."""
    load_E = np.asarray(load_E, np.float64)
    if load_E.size > width:
        load_E = np.array([part.mean() for part in np.array_split(load_E, width)])
    fair = max(load_E.mean(), 1e-30)
    bars = BARS if _can_print(BARS) else ".:-=+*#@"
    level_E = np.clip(np.round(load_E / fair / 2 * (len(bars) - 1)), 0, len(bars) - 1).astype(int)
    return "".join(bars[level] for level in level_E)


def _can_print(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def count(number: float) -> str:
    """A count in three digits: ``932``, ``12.3k``, ``4.56M``."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5 or unit == "G":
            return f"{number:.3g}{unit}"
        number /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """A length of time in two units: ``45s``, ``3m 20s``, ``2h 05m``, ``3d 04h``."""
    seconds = max(round(seconds), 0)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size}{unit} {seconds % size // small:02d}{small_unit}"
    return f"{seconds}s"


def run_files(workdir: str | os.PathLike) -> tuple[Path, Path]:
    """The two JSON-lines files of a run: training steps and held-out evaluations."""
    return Path(workdir) / METRICS_FILE, Path(workdir) / EVALUATIONS_FILE
