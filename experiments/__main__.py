"""All programs under one name: ``scanroute train demo`` is ``python -m experiments.train demo``."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence

from experiments import cli

NOT_PROGRAMS = ("cli",)


def programs() -> dict[str, str]:
    """Every program with the first line of its docstring; those of ``lecture`` as ``lecture.NAME``."""
    found = {name: line for name, line in cli.modules_of("experiments").items() if name not in NOT_PROGRAMS}
    if importlib.util.find_spec("experiments.lecture"):
        found |= {f"lecture.{name}": line for name, line in cli.modules_of("experiments.lecture").items()}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: scanroute PROGRAM [arguments]    (the same as python -m experiments.PROGRAM)\n")
        print(cli.table([(f"  {name}", line) for name, line in programs().items()]))
        print("\nscanroute PROGRAM --help says what a program takes.")
        return 0
    if argv[0] not in programs():
        print(f"error: there is no program {argv[0]!r}: there are {', '.join(programs())}.", file=sys.stderr)
        return 2
    sys.argv = [f"scanroute {argv[0]}", *argv[1:]]
    return cli.call(importlib.import_module(f"experiments.{argv[0]}").main, argv[1:])


if __name__ == "__main__":
    sys.exit(main())
