"""Static cycles of kernels on a TPU that need not be there, against the XLA form of the same call and libraries' kernels.

libtpu compiles each call ahead of time, and what it scheduled is counted: a kernel costs its instruction bundles a grid step
times its steps, an XLA operation libtpu's own estimate times the trips of the loops around it. No stalls and no bandwidth, so
it ranks programs compiled by one libtpu and is not a time. Needs libtpu (the ``aot`` extra).
"""

import functools
import glob
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.benchmarks._tpu_cases import CASES, SHAPE, case

TOPOLOGY = "v6e:2x2"


def run(quick: bool = False) -> dict[str, Any]:
    """Cycles of forward and of forward + backward through each op, in bfloat16; ``quick`` measures one call.

    Rows: mechanism, way, form ('kernel', or what else was compiled), shape where it is not the common one, cycles.
    """
    rows = []
    for name in ("additive",) if quick else CASES:
        rows += rows_of(name)
    return {"topology": TOPOLOGY, "libtpu": libtpu_version(), "shape": {**SHAPE, "dtype": "bfloat16"}, "rows": rows}


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of one call of the table."""
    rows = []
    shape = {} if CASES[name].shape == SHAPE else {"shape": CASES[name].shape}
    for way in CASES[name].ways:
        for form in (None, *CASES[name].others):
            result = measure(TOPOLOGY, name, way, form, CASES[name].shape)
            rows.append({"mechanism": name, "way": way, "form": form or "kernel", **shape, **result})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def measure(topology: str, name: str, way: str, form: str | None, shape: dict[str, int], timeout: float = 550) -> dict:
    """Compile in a process of its own (libtpu takes its flags from the environment) and count.

    Returns cycles, kernel_cycles, temp_bytes and ``kernels``: bundles a grid step by kernel. Raises RuntimeError with libtpu's
    words where the program does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false"
        environment = {
            **os.environ,
            "LIBTPU_INIT_ARGS": f"{dump} --xla_jf_dump_llo_pass_label_regex=.*final.*",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, [libtpu_folder(), os.environ.get("PYTHONPATH")])),
        }
        command = [sys.executable, "-m", __name__, topology, name, way, str(form), json.dumps(shape), folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        out = Path(folder) / "compiled.json"
        if not out.exists():
            raise RuntimeError(f"{name} {way} {form} for {topology} did not compile: {done.stderr[-2000:]}")
        compiled = json.loads(out.read_text())
        kernels = _bundles(folder)
    cycles, kernel_cycles, calls = _count(compiled["text"], kernels)
    return {
        "cycles": cycles,
        "kernel_cycles": kernel_cycles,
        "custom_calls": sorted(calls),
        "bundles_per_step": {name: round(kernels[name][0]) for name in calls if name in kernels},
        "temp_bytes": compiled["temp_bytes"],
    }


def libtpu_folder() -> str | None:
    """Where libtpu lies if not on the path: ``make test-slow`` puts it beside the environment, where nothing else sees it."""
    folder = Path(sys.prefix) / "aot"
    return str(folder) if (folder / "libtpu").exists() else None


def has_libtpu() -> bool:
    return libtpu_folder() is not None or importlib.util.find_spec("libtpu") is not None


def libtpu_version() -> str:
    path = [libtpu_folder() or "", *sys.path]
    return next(d.version for d in importlib.metadata.distributions(name="libtpu", path=path))


def _compile(topology, name, way, form, shape, folder):
    import jax
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    function, arguments = case(name, way, None if form == "None" else form, **json.loads(shape))
    device = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices[0]
    # The TPU's own device kind: the highest precision inside a kernel needs it.
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
    one = SingleDeviceSharding(device)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        lowered = jax.jit(function, in_shardings=one, out_shardings=one).lower(*arguments)
    compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    result = {"text": compiled.as_text(), "temp_bytes": memory.temp_size_in_bytes}
    (Path(folder) / "compiled.json").write_text(json.dumps(result))


def _bundles(folder) -> dict[str, tuple[float, float]]:
    """By kernel: (bundles of a grid step, bundles of the whole call)."""
    found = {}
    for path in glob.glob(f"{folder}/*final_bundles.txt"):
        name = Path(path).name
        if "analysis" in name:
            continue
        name = re.sub(r"^\d+-|-\d+-final_bundles\.txt$", "", name)
        outside, inside, trips = 0, 0, [1]
        with open(path, errors="replace") as lines:
            for line in lines:
                bundle = re.match(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*((?:>\s*)*)\{", line)
                if bundle:
                    inside, outside = inside + (">" in bundle[1]), outside + (">" not in bundle[1])
                trips += map(
                    int, re.findall(r"scmp\.(?:ge|eq)\.s32\.totalorder %\S+, (\d+)\s*/\* loop exit test", line)
                )
        found[name] = (inside, outside + inside * max(trips))
    return found


def _count(text: str, kernels: dict[str, tuple[float, float]]) -> tuple[int, int, set[str]]:
    """(cycles of the program, of its kernels, the kernels' names)."""
    computations: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        header = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
        elif current:
            computations[current].append(line)

    @functools.cache
    def trips(name):
        """The largest constant that a loop's condition, or what it calls, compares with."""
        best = 1
        for line in computations.get(name, []):
            best = max([best, *map(int, re.findall(r"s32\[\][^=]*constant\((\d+)\)", line))])
            best = max([best, *map(trips, re.findall(r"calls=%?([\w.\-]+)", line))])
        return best

    calls = set()

    def cost(name):
        total = inside_kernels = 0
        for line in computations.get(name, []):
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            called = re.search(r" (?:call|conditional)\(.*(?:to_apply|branch_computations)=\{?%?([\w.\-]+)", line)
            operation = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = ", line)
            estimate = re.search(r'estimated_cycles":"?(\d+)', line)
            if loop or called:
                times = trips(loop[1]) if loop else 1
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                more, kernel = cost(loop[2] if loop else called[1] if called else "")
                times = int(known[1]) if known else times
                total, inside_kernels = total + times * more, inside_kernels + times * kernel
            elif operation and "tpu_custom_call" in line:
                calls.add(operation[1])
                whole = kernels[operation[1]][1]
                total, inside_kernels = total + whole, inside_kernels + whole
            elif estimate and int(estimate[1]) < 1 << 60:
                total += int(estimate[1])
        return total, inside_kernels

    total, inside_kernels = cost(entry)
    return int(total), int(inside_kernels), calls


if __name__ == "__main__":
    _compile(*sys.argv[1:])
