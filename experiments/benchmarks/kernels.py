"""Kernels on this machine's accelerator: time, bytes/s, FLOP/s and the roofline of each call, forward and backward.

The roofline is this card's own: a copy and a dense product, timed in the same run. ``ratio`` is the bound over the time, 1 at
best. A full run on an accelerator writes ``benchmarks/results/<device>/<date>.json`` and the table ``benchmarks/kernels.md``.
A CPU has no kernels: there every row says "not measured", and ``--quick`` runs small shapes through the XLA forms.
"""

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import _kernel_table
from experiments.benchmarks._kernel_cases import Case, cases, least_bytes
from experiments.benchmarks._kernel_table import NOT_MEASURED

_PLATFORMS = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu", "cpu": "cpu"}


def run(quick: bool = False) -> dict[str, Any]:
    """Rows: op, shape, way, implementation, milliseconds, flops and bytes (the least the call needs), flops_per_second,
    bytes_per_second, bound ('memory' or 'compute'), roofline_milliseconds, ratio, target. A call that fails says so in
    ``error``; nothing is measured on a CPU unless ``quick``."""
    platform = _PLATFORMS.get(jax.default_backend(), jax.default_backend())
    if platform == "cpu" and not quick:
        why = "this machine has a CPU only, and the kernels are for TPUs and GPUs (--quick runs small XLA forms here)"
        print(f"not measured: {why}", file=sys.stderr)
        return {"measured": False, "why": why, "rows": [_blank(case, way) for case in cases() for way in case.ways]}
    peak = {"copy_bytes_per_second": _copy(quick), "dense_flops_per_second": _dense(quick)}
    print(json.dumps(peak), file=sys.stderr, flush=True)
    rows = []
    for case in cases(quick):
        for name, implementation in case.implementations(platform).items():
            for row in _rows(case, name, implementation, peak, quick):
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    return {"measured": True, "quick": quick, **peak, "rows": rows}


def save(result: dict[str, Any], root: Path = Path()) -> Path | None:
    """Keep a full result of an accelerator and write the table anew; a CPU's and a quick one are not kept."""
    if not result["measured"] or result["quick"] or jax.default_backend() == "cpu":
        return None
    folder = root / "benchmarks/results" / _kernel_table.slug(jax.devices()[0].device_kind)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['date']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    _kernel_table.write(root)
    return path


def _blank(case: Case, way: str) -> dict[str, Any]:
    target = {"target": case.target[way]} if way in case.target else {}
    return {"op": case.name, "shape": case.shape, "way": way, **target, "milliseconds": NOT_MEASURED}


def _rows(case: Case, name: str, implementation: str | None, peak: dict[str, float], quick: bool):
    for way in case.ways:
        row = {"op": case.name, "shape": case.shape, "way": way, "implementation": name}
        if way in case.target:
            row["target"] = case.target[way]
        try:
            function, arguments = case.build(implementation)
            flops = case.flops * (1 if way == "forward" else 2)
            moved = least_bytes(function, arguments, case.calls, way)
            seconds = _time(_ready(function, arguments, way), quick) / case.calls
        except Exception as error:  # a call that does not fit this card must not cost the others their rows
            yield {**row, "milliseconds": NOT_MEASURED, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            continue
        memory, compute = moved / peak["copy_bytes_per_second"], flops / peak["dense_flops_per_second"]
        bound = max(memory, compute)
        yield {
            **row,
            "milliseconds": _digits(seconds * 1e3),
            "flops": flops,
            "bytes": moved,
            "flops_per_second": _digits(flops / seconds),
            "bytes_per_second": _digits(moved / seconds),
            "bound": "memory" if memory > compute else "compute",
            "roofline_milliseconds": _digits(bound * 1e3),
            "ratio": _digits(bound / seconds),
        }


def _ready(function: Callable, arguments: tuple, way: str) -> Callable:
    """What is timed, compiled and with its arguments in place; backward alone starts from forward's residuals."""
    if way == "forward":
        return functools.partial(jax.jit(function), *arguments)
    value, pull = jax.jit(lambda *arguments: jax.vjp(function, *arguments))(*arguments)
    cotangents = jax.tree.map(lambda x: jnp.ones_like(x) if x.ndim == 0 else (x * 0.5 + 0.1).astype(x.dtype), value)
    return functools.partial(jax.jit(lambda pull, cotangents: pull(cotangents)), pull, cotangents)


def _time(call: Callable, quick: bool) -> float:
    """Seconds of a call: best of three medians, calls queued back to back so that their dispatch hides."""
    jax.block_until_ready(call())
    once = _seconds(call, 1)
    queued, repeats = (1, 1) if quick else (max(1, min(50, int(0.02 / once))), 3 if once > 0.1 else 7)
    return min(statistics.median(_seconds(call, queued) for _ in range(repeats)) for _ in range(1 if quick else 3))


def _seconds(call: Callable, queued: int) -> float:
    start = time.perf_counter()
    result = None
    for _ in range(queued):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / queued


def _copy(quick: bool) -> float:
    """Bytes read and written a second by a copy far larger than any cache."""
    x_N = jnp.zeros((1 << (22 if quick else 29),), jnp.bfloat16)
    return 2 * x_N.nbytes / _time(functools.partial(jax.jit(lambda x_N: x_N + 1), x_N), quick)


def _dense(quick: bool) -> float:
    """FLOP/s of one large dense product in bfloat16."""
    n = 512 if quick else 8192
    x_NN = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    return 2.0 * n**3 / _time(functools.partial(jax.jit(jnp.matmul), x_NN, x_NN), quick)


def _digits(x: float) -> float:
    return float(f"{x:.4g}")
