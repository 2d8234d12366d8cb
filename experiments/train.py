"""Train a model: ``python -m experiments.train CONFIG [field.sub=value ...] [--workdir DIR]``.

Resumes by itself where DIR holds a checkpoint. Ctrl-C or SIGTERM finishes the step, saves, and exits with 128 + n.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from research.config import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    options, parser = _parse(argv)
    if options.config is None and options.help:
        parser.print_help()
        return 0
    if options.config is None:
        raise ConfigError(f"which configuration? There are {', '.join(cli.modules_of('configs'))}. --help says more.")
    config = cli.load_config(options.config, options.override)
    if options.help:
        print(cli.describe_config(options.config, config))
        return 0

    workdir = Path(options.workdir or Path("runs") / options.config)
    again = " ".join(
        ["python -m experiments.train", *map(shlex.quote, [options.config, *options.override])]
        + ["--workdir", shlex.quote(str(workdir))]
    )
    # Only now: --help and a mistyped field need no JAX.
    from research.training.interrupts import Interrupts
    from research.training.loop import TrainingFailed, train

    cli.keep_compiled(workdir / "cache")
    with Interrupts(resume_line=f"Resume with: {again}") as interrupts:
        try:
            outcome = train(config, workdir, interrupts=interrupts)
        except TrainingFailed as error:
            print(f"error: {error}; the checkpoints before it are in {workdir}", file=sys.stderr)
            return 1
        if outcome.signal is not None:
            print(f"\nSaved at step {outcome.step}. Resume with:\n  {again}", flush=True)
            return 128 + outcome.signal
    print(report(options, workdir, outcome.step, outcome.result or {}))
    return 0


def report(options: argparse.Namespace, workdir: Path, step: int, result: dict[str, Any]) -> str:
    """What came of it, where everything is, and what to type next."""
    lines = []
    if "held_out" in result:
        held_out, baselines = result["held_out"], result["baselines"]
        lines += [
            f"\nHeld out: {held_out['bytes']:,} bytes in {held_out['documents']} documents, in bits per byte:",
            cli.table(
                [
                    ("  this model", f"{held_out['bits_per_byte']:.3f}"),
                    ("  xz -9, document by document", f"{baselines['xz_each']:.3f}"),
                    ("  xz -9, all as one", f"{baselines['xz_whole']:.3f}"),
                    ("  order-0 (byte frequencies)", f"{baselines['order_0']:.3f}"),
                ]
            ),
        ]
    where = [
        ("checkpoints/", "parameters, optimizer, data position; config and tokenizer inside"),
        ("metrics.jsonl", "one JSON object a training step"),
        ("evaluations.jsonl", "one a held-out evaluation"),
        ("result.json", "what is printed above"),
        ("config.json", "the exact configuration"),
        ("loss.png, expert_load.png, throughput.png", "pictures"),
        ("tensorboard/", "the same for TensorBoard"),
    ]
    shown = shlex.quote(str(workdir))
    more = [word for word in options.override if not word.startswith("train.steps=")] + [f"train.steps={2 * step}"]
    train_on = " ".join(map(shlex.quote, [options.config, *more]))
    lines += [
        f"\nIn {workdir}:",
        cli.table([(f"  {name}", what) for name, what in where if (workdir / name.split(",")[0]).exists()]),
        "\nNext:",
        cli.table(
            [
                ("  write text", f'python -m experiments.generate {shown} --prompt "def main"'),
                ("  score text", f"python -m experiments.evaluate {shown}"),
                ("  train on", f"python -m experiments.train {train_on} --workdir {shown}"),
                ("  watch", f"tensorboard --logdir {shown}/tensorboard    (pip install tensorboard)"),
                ("  look inside", f"make notebook RUN={shown}"),
            ]
        ),
    ]
    return "\n".join(lines)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, cli.Parser]:
    parser = cli.Parser(
        prog="python -m experiments.train",
        usage="%(prog)s CONFIG [field.sub=value ...] [--workdir DIR]",
        description=(
            "Trains a language model. Where DIR holds a checkpoint it goes on from there, bit by bit as if it had never\n"
            "stopped; Ctrl-C or SIGTERM saves first. Prints where everything is, and what to type next."
        ),
        epilog=(
            f"configurations:\n{cli.list_presets()}\n\n"
            "examples:\n"
            "  python -m experiments.train demo\n"
            "  python -m experiments.train demo train.steps=2000 optimizer.learning_rate=2e-3 --workdir runs/longer\n"
            "  python -m experiments.train tiny data.source=TextFiles 'data.source.paths=books/**/*.txt'\n\n"
            "exit codes: 0 done, 1 failed, 2 bad input, 128 + n saved and stopped by signal n (130 Ctrl-C, 143 SIGTERM)"
        ),
        add_help=False,
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a configuration's name (below)")
    parser.add_argument(
        "override", metavar="field.sub=value", nargs="*", help="change a field; CONFIG --help lists them all"
    )
    parser.add_argument("--workdir", metavar="DIR", help="where the run lives (default: runs/CONFIG)")
    parser.add_argument("-h", "--help", action="store_true", help="show this, or with CONFIG all its fields")
    return parser.parse_intermixed_args(argv), parser


if __name__ == "__main__":
    sys.exit(cli.call(main))
