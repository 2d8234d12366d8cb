"""Measure: ``python -m experiments.benchmark NAME [--json] [--quick] [--picture FILE]`` runs one of experiments/benchmarks/.

Prints what was measured together with the command, the device, the versions and the date, so that a result can be
committed as it is. Timings on a shared machine are only comparable within one result.
"""

import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from research.config import ConfigError

PACKAGE = "experiments.benchmarks"


def main(argv: Sequence[str] | None = None) -> int:
    listed = cli.table([(f"  {name}", line) for name, line in cli.modules_of(PACKAGE).items()])
    parser = cli.Parser(
        prog="python -m experiments.benchmark",
        description=f"Measures one thing and says where and with what it was measured.\n\nbenchmarks:\n{listed}",
    )
    parser.add_argument("name", metavar="NAME", help="which benchmark")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="smaller and rougher: does it run at all?")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="also draw the result (attention)")
    options = parser.parse_args(argv)
    benchmark = cli.find_module(PACKAGE, options.name, "benchmark")
    if options.picture is not None and not hasattr(benchmark, "picture"):
        raise ConfigError(f"--picture: the benchmark {options.name} has no picture")
    command = f"python -m experiments.benchmark {options.name}{' --quick' if options.quick else ''}"
    result = {"benchmark": options.name, **circumstances(command), **benchmark.run(quick=options.quick)}
    if options.picture is not None:
        benchmark.picture(result, options.picture)
    if hasattr(benchmark, "save") and (path := benchmark.save(result)) is not None:
        print(f"kept in {path}", file=sys.stderr)
    print(json.dumps(result, indent=2) if options.json else cli.table(list(rows(result))))
    return 0


def circumstances(command: str) -> dict[str, Any]:
    """What a reader of the numbers needs to know about how they came about."""
    import jax
    import jaxlib.version

    device = jax.devices()[0]
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
    }


def rows(value: Any, prefix: str = ""):
    """(name, text) of every number in a nested result."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from rows(item, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list) and value and isinstance(value[0], dict | list):
        for index, item in enumerate(value):
            yield from rows(item, f"{prefix}.{index}")
    elif isinstance(value, float):
        yield prefix, f"{value:.4g}"
    elif isinstance(value, list):
        yield prefix, ", ".join(text for _, text in (pair for item in value for pair in rows(item, "_")))
    else:
        yield prefix, str(value)


if __name__ == "__main__":
    sys.exit(cli.call(main))
