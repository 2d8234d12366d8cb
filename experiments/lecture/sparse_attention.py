"""Claim: a lightning indexer learns in a short warm-up where dense attention looks, and sparse training starts from there.

The recipe of DeepSeek-V3.2-Exp on a small model of bytes: a dense model (``configs/mla``), a warm-up in which indexers alone learn
(``dsa_warm_up``), and sparse training of everything (``dsa_sparse``), beside sparse training that had no warm-up. Each is a run
in DIR as ``experiments.train`` makes it: what is there already is not trained again.

    python -m experiments.lecture.sparse_attention [--workdir DIR] [--json]     about ten minutes on two cores

Expected: 32 keys of up to 256 hold 40 % of dense attention in the first three steps and 91 % after 150; the warm-up leaves the
model as it was, to the bit (2.427 bits per held-out byte); sparse training goes on from the dense model's loss, 1.66 nats, and
without a warm-up from 2.62; after 100 steps of it the held-out bytes cost 2.389 and 2.410 bits. Whether
attention to the choice costs anything is not answered here: no dense run had those 100 steps more.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.benchmark import circumstances

# Run → (preset, run it starts from).
RUNS = {
    "dense": ("mla", None),
    "warm_up": ("dsa_warm_up", "dense"),
    "sparse": ("dsa_sparse", "warm_up"),
    "sparse_without_warm_up": ("dsa_sparse", "dense"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m experiments.lecture.sparse_attention", description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/sparse_attention"), help="where the four runs go")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options: argparse.Namespace = parser.parse_args(argv)
    results = run(options.workdir, say=(lambda line: None) if options.json else print)
    if options.json:
        print(
            json.dumps({**circumstances("python -m experiments.lecture.sparse_attention --json"), **results}, indent=2)
        )
        return 0
    rows: list[tuple[str, ...]] = [
        ("run", "bits/byte held out", "index loss first, last", "attention captured first, last", "loss first")
    ]
    for name, r in results.items():
        pairs = [" → ".join(f"{x:.3f}" for x in r[key]) if key in r else "" for key in ("index_loss", "captured")]
        rows.append((name, f"{r['held_out_bits_per_byte']:.4f}", *pairs, f"{r['loss_first']:.3f}"))
    print("\nmeans of the first three and the last ten steps\n")
    print("\n".join("  ".join(cell.ljust(24) for cell in row).rstrip() for row in rows))
    return 0


def run(workdir: Path, words: Sequence[str] = (), say=print) -> dict[str, dict[str, Any]]:
    """Trains what is not there; per run held-out bits per byte and, of its metrics, the means of the first three and the last
    ten steps. ``words`` override every preset."""
    from research.training.loop import train
    from research.training.metrics import METRICS_FILE, read_lines

    results = {}
    for name, (preset, parent) in RUNS.items():
        config = cli.load_config(preset, words)
        start = None if parent is None else str(workdir / parent)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, start_from=start))
        say(f"{name}: {preset}")
        outcome = train(config, workdir / name, say=say)
        assert outcome.result is not None
        lines = list(read_lines(workdir / name / METRICS_FILE))

        def ends(key, lines=lines):
            values = [line[key] for line in lines]
            return [statistics.fmean(values[:3]), statistics.fmean(values[-10:])]

        found = {"index_loss": "index_loss", "captured": "index_captured"}
        results[name] = {
            "steps": outcome.step,
            "held_out_bits_per_byte": outcome.result["held_out"]["bits_per_byte"],
            "loss_first": ends("loss")[0],
            **{key: ends(metric) for key, metric in found.items() if metric in lines[0]},
        }
    return results


if __name__ == "__main__":
    sys.exit(cli.call(main))
