"""``benchmarks/kernels.md``: what ``kernels`` measured on every card it was run on, and the TPU's static cycles."""

import json
import re
from pathlib import Path
from typing import Any

from experiments.benchmarks._kernel_cases import cases

NOT_MEASURED = "not measured"
# Cards that somebody may have: a column each, whether or not anybody has had it.
CARDS = ("NVIDIA H200", "TPU v5 lite", "TPU v6 lite", "TPU7x")

_HEAD = """# Kernels, measured

Written by `python -m experiments.benchmark kernels --json` on a machine with an accelerator; not by hand. A cell: milliseconds,
and in brackets the ratio of the card's own roofline (a copy and a dense product timed in the same run) to them, 1 at best.
"{not_measured}" means that nobody has had the card.
"""
_STATIC = """
# TPU, compiled but not run

`python -m experiments.benchmark tpu_cycles`: static cycles of the program that libtpu {libtpu} schedules for {topology}, in
millions; no stalls, no bandwidth. They rank forms of one call and are not a time.
"""
_REGISTERS = """
# GPU, compiled but not run

`python -m experiments.benchmark gpu_registers`: registers a thread and bytes spilled, as ptxas says for the {target}, {shape}
unless the row says otherwise. Not a time. A kernel that one call launches twice with other options has two rows.
"""


def slug(device_kind: str) -> str:
    """A folder's name from a device's: 'NVIDIA H200' is nvidia_h200."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")


def write(root: Path) -> None:
    (root / "benchmarks/kernels.md").write_text(text(root / "benchmarks/results"))


def text(results: Path) -> str:
    """The page, from the committed results; of several days of a card, the last."""
    measured = {card: _latest(results / slug(card)) for card in CARDS}
    others = {p.parent.name for p in results.glob("*/????-??-??.json")} - {slug(card) for card in CARDS}
    measured |= {name: _latest(results / name) for name in sorted(others)}
    rows = [["call", "shape", "way", "to beat", *measured]]
    for case in cases():
        for way in case.ways:
            found = [_cell(measured[card], case.name, case.shape, way) for card in measured]
            rows.append([case.name, _shape(case.shape), way, case.target.get(way, "–"), *found])
    measured_rows = _HEAD.format(not_measured=NOT_MEASURED) + "\n" + _markdown(rows)
    return measured_rows + _static(results / "tpu_cycles.json") + _registers(results / "gpu_registers.json")


def _latest(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("????-??-??.json"))
    return json.loads(paths[-1].read_text())["rows"] if paths else []


def _cell(rows, name, shape, way) -> str:
    mine = [r for r in rows if (r["op"], r["shape"], r["way"]) == (name, shape, way) and "error" not in r]
    cells = [f"{r['implementation']} {r['milliseconds']:.4g} ({r['ratio']:.2f})" for r in mine]
    return "; ".join(cells) or NOT_MEASURED


def _static(path: Path) -> str:
    if not path.exists():
        return ""
    result = json.loads(path.read_text())
    forms: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in result["rows"]:
        shape = _shape(row.get("shape") or {n: v for n, v in result["shape"].items() if n != "dtype"})
        forms.setdefault((row["mechanism"], shape, row["way"]), {})[row["form"]] = _millions(row)
    rows = [["call", "shape", "way", "kernel", "other forms"]]
    for (name, shape, way), cycles in forms.items():
        rest = "; ".join(f"{form} {number}" for form, number in cycles.items() if form != "kernel")
        rows.append([name, shape, way.replace("_", " + "), cycles.get("kernel", "–"), rest])
    return _STATIC.format(libtpu=result["libtpu"], topology=result["topology"]) + "\n" + _markdown(rows)


def _millions(row: dict[str, Any]) -> str:
    """Where a kernel loops as often as data says, what was counted is less than it costs."""
    return f"{'> ' if row.get('uncounted') else ''}{row['cycles'] / 1e6:.3f}"


def _registers(path: Path) -> str:
    if not path.exists():
        return ""
    result = json.loads(path.read_text())
    rows = [["call", "kernel", "registers", "bytes spilled"]]
    for row in result["rows"]:
        call = f"{row['call']} {_shape(row['shape'])}" if "shape" in row else row["call"]
        new = [call, row["kernel"], str(row["registers"]), str(row["spill_bytes"])]
        rows += [new] if new not in rows else []
    return _REGISTERS.format(target=result["target"], shape=_shape(result["shape"])) + "\n" + _markdown(rows)


def _shape(shape: dict[str, Any]) -> str:
    return " ".join(f"{n}{v}" if isinstance(v, int) else str(v) for n, v in shape.items() if n != "dtype")


def _markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


if __name__ == "__main__":
    write(Path())
