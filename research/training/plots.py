"""Pictures of a run, drawn from its JSON-lines files: loss, expert load over time, throughput."""

import os
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from research.training.metrics import read_lines, run_files

INK, GREY, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN = "#2563a8", "#d9730d", "#3a7d44"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": INK,
    "legend.frameon": False,
}
MAX_PANELS = 12


def draw(workdir: str | os.PathLike) -> list[Path]:
    """Draws what the files in ``workdir`` have the numbers for; returns the pictures written.

    loss.png: training loss in bits per byte (nats per token where bytes are unknown) and held-out points;
    expert_load.png: a heat map, experts × steps, for each layer with experts; throughput.png: tokens per second.
    """
    metrics_file, evaluations_file = run_files(workdir)
    records, evaluations = list(read_lines(metrics_file)), list(read_lines(evaluations_file))
    if not records:
        return []
    with matplotlib.rc_context(STYLE):
        figures = {"loss.png": loss_figure(records, evaluations), "throughput.png": throughput_figure(records)}
        loads = [record for record in records if record.get("load")]
        if loads:
            figures["expert_load.png"] = load_figure(loads)
        written = []
        for name, figure in figures.items():
            path = Path(workdir) / name
            FigureCanvasAgg(figure).print_png(path)
            written.append(path)
    return written


def loss_figure(records: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> Figure:
    in_bits = "bits_per_byte" in records[0]
    name = "bits_per_byte" if in_bits else "loss"
    step, value = _series(records, name)
    figure, axes = _figure("Loss")
    axes.plot(step, value, color=BLUE, alpha=0.25, linewidth=0.8)
    now = np.mean(value[-max(1, len(value) // 50) :])
    axes.plot(step, smoothed(value), color=BLUE, linewidth=1.8, label=f"training, now {now:.3f}")
    points = [record for record in evaluations if in_bits and "bits_per_byte" in record]
    if points:
        held_step, held = _series(points, "bits_per_byte")
        label = f"held out, now {held[-1]:.3f}"
        axes.plot(held_step, held, "o", color=ORANGE, markersize=6, label=label, zorder=3)
    finite = value[np.isfinite(value)]
    if finite.size:
        # The first steps fall from far above: cut there, so that the rest can be seen.
        low, top = float(finite.min()), float(np.quantile(finite, 0.99))
        margin = max(top - low, 1e-3) * 0.08
        axes.set_ylim(low - margin, top + margin)
    axes.set_ylabel("bits per byte" if in_bits else "nats per token")
    axes.legend(loc="upper right")
    return figure


def throughput_figure(records: list[dict[str, Any]]) -> Figure:
    figure, axes = _figure("Throughput")
    step, speed = _series(records, "tokens_per_second")
    axes.plot(step, speed, color=GREEN, alpha=0.25, linewidth=0.8)
    axes.plot(step, smoothed(speed), color=GREEN, linewidth=1.8, label="tokens per second")
    finite = speed[np.isfinite(speed)]
    if finite.size:
        axes.set_ylim(0, float(np.quantile(finite, 0.99)) * 1.15)
        axes.axhline(float(np.median(finite)), color=GREY, linewidth=0.9, linestyle="--", zorder=1)
        axes.text(
            1.0,
            float(np.median(finite)),
            f" median {np.median(finite):,.0f}",
            transform=axes.get_yaxis_transform(),
            color=GREY,
            va="center",
        )
    axes.set_ylabel("tokens per second")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return figure


def load_figure(records: list[dict[str, Any]]) -> Figure:
    """One panel a layer: each expert's share of the assignments over its fair share, at every recorded step."""
    step = np.array([record["step"] for record in records])
    # Layers may have different numbers of experts.
    relative = [
        np.array(shares, np.float64) * len(shares[0]) for shares in zip(*(r["load"] for r in records), strict=True)
    ]
    layers, alike = len(relative), len({share_NE.shape for share_NE in relative}) == 1
    shown = np.unique(np.linspace(0, layers - 1, min(layers, MAX_PANELS)).round().astype(int))
    columns = 1 if shown.size == 1 else 2 if shown.size <= 4 else 4 if shown.size > 6 else 3
    rows = -(-shown.size // columns)
    size = (3.4 * columns + 1.4, 1.9 * rows + 1.3)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    title = "Expert load over training: share of assignments, 1 is the fair share"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    grid = figure.subplots(rows, columns, sharex=True, sharey=alike, squeeze=False)
    largest = np.nanquantile(np.concatenate([share_NE.ravel() for share_NE in relative]), 0.995)
    norm = colors.TwoSlopeNorm(1.0, 0.0, max(2.0, float(largest)))
    edges = _edges(step)
    for panel, axes in enumerate(grid.flat):
        if panel >= shown.size:
            axes.set_visible(False)
            continue
        layer = shown[panel]
        share_EN = relative[layer].T
        axes.pcolormesh(edges, np.arange(len(share_EN) + 1) - 0.5, share_EN, cmap="RdBu_r", norm=norm, rasterized=True)
        axes.set_title(f"MoE layer {layer + 1} of {layers}", fontsize=9, fontweight="normal", color=GREY)
        axes.grid(False)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if panel % columns == 0:
            axes.set_ylabel("expert")
        if panel + columns >= shown.size:
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
    bar = figure.colorbar(ScalarMappable(norm, "RdBu_r"), ax=grid, shrink=0.8, aspect=30, pad=0.02)
    bar.set_label("load / fair share")
    bar.outline.set_visible(False)
    return figure


def smoothed(value: np.ndarray, share: float = 0.04) -> np.ndarray:
    """A centred running mean over about ``share`` of the series: no lag, windows shrinking towards both ends."""
    count, half = len(value), int(share * len(value) / 2)
    finite = np.isfinite(value)
    total = np.r_[0.0, np.cumsum(np.where(finite, value, 0.0))]
    number = np.r_[0, np.cumsum(finite)]
    index = np.arange(count)
    reach = np.minimum(half, np.minimum(index, count - 1 - index))
    low, high = index - reach, index + reach + 1
    seen = number[high] - number[low]
    return np.where(seen, (total[high] - total[low]) / np.maximum(seen, 1), np.nan)


def _series(records: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], np.float64)


def _figure(title: str):
    figure = Figure(figsize=(8, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.margins(x=0.01)
    return figure, axes


def _edges(step: np.ndarray) -> np.ndarray:
    """Borders of the columns of a heat map whose columns stand at ``step``."""
    if step.size == 1:
        return np.array([step[0] - 0.5, step[0] + 0.5])
    middle = (step[1:] + step[:-1]) / 2
    return np.r_[step[0] - (middle[0] - step[0]), middle, step[-1] + (step[-1] - middle[-1])]
