"""Static cycles of kernels on a TPU that need not be there, against the XLA form of the same call and libraries' kernels.

libtpu compiles each call ahead of time, and what it scheduled is counted: a kernel costs its instruction bundles a grid step
times its steps, an XLA operation libtpu's own estimate times the trips of the loops around it. No stalls and no bandwidth, so
it ranks programs compiled by one libtpu and is not a time. Needs libtpu (the ``aot`` extra).
"""

import dataclasses
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
        for form in (*((None,) if CASES[name].kernel else ()), *CASES[name].others):
            result = measure(TOPOLOGY, name, way, form, CASES[name].shape)
            rows.append({"mechanism": name, "way": way, "form": form or "kernel", **shape, **result})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def measure(topology: str, name: str, way: str, form: str | None, shape: dict[str, int]) -> dict[str, Any]:
    """What ``measure_all`` says of one call."""
    return measure_all(topology, [(name, way, form, shape)])[0]


def measure_all(topology: str, calls: list[tuple], timeout: float = 550) -> list[dict[str, Any]]:
    """Compile calls (name, way, form, shape) in a process of their own (libtpu takes its flags from the environment) and count.

    Returns of each: cycles, kernel_cycles, temp_bytes, ``bundles_per_step`` by kernel, and ``uncounted``: kernels that loop as
    often as data says, counted as one step. Raises RuntimeError with libtpu's words where a program does not compile.
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
        command = [sys.executable, "-m", __name__, topology, json.dumps(calls), folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        out = Path(folder) / "counted.jsonl"
        counted = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        if len(counted) < len(calls):
            name, way, form, _ = calls[len(counted)]
            raise RuntimeError(f"{name} {way} {form} for {topology} did not compile: {done.stderr[-2000:]}")
    return counted


def libtpu_folder() -> str | None:
    """Where libtpu lies if not on the path: ``make test-slow`` puts it beside the environment, where nothing else sees it."""
    folder = Path(sys.prefix) / "aot"
    return str(folder) if (folder / "libtpu").exists() else None


def has_libtpu() -> bool:
    return libtpu_folder() is not None or importlib.util.find_spec("libtpu") is not None


def libtpu_version() -> str:
    path = [libtpu_folder() or "", *sys.path]
    return next(d.version for d in importlib.metadata.distributions(name="libtpu", path=path))


def _compile(topology: str, calls: str, folder: str):
    """A line of counted.jsonl for each call."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    device = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices[0]
    # The TPU's own device kind: the highest precision inside a kernel needs it.
    abstract = AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
    one = SingleDeviceSharding(device)
    for name, way, form, shape in json.loads(calls):
        function, arguments = case(name, way, form, **shape)
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
            given = (0,) if CASES[name].donates else ()
            jitted = jax.jit(function, in_shardings=one, out_shardings=one, donate_argnums=given, keep_unused=True)
            lowered = jitted.lower(*arguments)
        compiled = lowered.compile()
        call = CASES[name]
        kernels, uncounted = _bundles(folder, call.steps(form, way, **shape), call.inner(**shape))
        cycles, kernel_cycles, custom_calls = _count(compiled.as_text() or "", kernels)
        memory: Any = compiled.memory_analysis()
        result = {
            "cycles": cycles,
            "kernel_cycles": kernel_cycles,
            "custom_calls": sorted(custom_calls),
            "bundles_per_step": {call: round(kernels[call][0]) for call in sorted(custom_calls) if call in kernels},
            "uncounted": sorted(uncounted & custom_calls),
            "temp_bytes": memory.temp_size_in_bytes,
        }
        with open(f"{folder}/counted.jsonl", "a") as out:
            out.write(json.dumps(result) + "\n")


def _bundles(folder, steps: int | None, inner: int | None) -> tuple[dict[str, tuple[float, float]], set[str]]:
    """By kernel: (bundles of a grid step, each once; bundles of the whole call); and those that loop as often as data says.

    ``steps`` and ``inner`` are the trips of grids and of loops inside them whose ends are data. Takes libtpu's files away, so that
    the next call's are told from them.
    """
    found, uncounted = {}, set()
    for path in glob.glob(f"{folder}/*.txt"):
        name = Path(path).name
        if name.endswith("final_bundles.txt") and "analysis" not in name:
            name = re.sub(r"^\d+-|-\d+-final_bundles\.txt$", "", name)
            whole = _loops(Path(path).read_text(errors="replace"))
            found[name] = (whole.inside(), whole.cost([1, steps, inner]))
            if whole.open_ended([1, steps, inner]):
                uncounted.add(name)
        os.remove(path)
    return found, uncounted


@dataclasses.dataclass
class _Loop:
    bundles: int = 0
    trips: int | None = None
    loops: list["_Loop"] = dataclasses.field(default_factory=list)

    def inside(self) -> int:
        return sum(loop.bundles + loop.inside() for loop in self.loops)

    def cost(self, given: list[int | None]) -> int:
        """``given``: trips where the program says none, by depth; the last also holds for what is deeper."""
        trips = self.trips or given[0] or 1
        return trips * (self.bundles + sum(loop.cost(given[1:] or given) for loop in self.loops))

    def open_ended(self, given: list[int | None]) -> bool:
        return not (self.trips or given[0]) or any(loop.open_ended(given[1:] or given) for loop in self.loops)


def _loops(text: str) -> _Loop:
    """The nest of loops of a scheduled program: a bundle says how deep it lies, and the first of a loop's body that it is."""
    nest = [_Loop(trips=1)]
    for line in text.splitlines():
        bundle = re.match(r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:\s*((?:>\s*)*)\{(?!\})", line)
        if bundle:  # the empty ones say nothing of their depth
            depth = bundle[2].count(">")
            begins = bundle[1] == "LB"
            del nest[depth if begins else depth + 1 :]
            while len(nest) <= depth:
                if begins or not nest[-1].loops:
                    nest[-1].loops.append(_Loop())
                nest.append(nest[-1].loops[-1])
            nest[-1].bundles += 1
        for trips in re.findall(r"scmp\.(?:ge|eq)\.s32\.totalorder %\S+, (\d+)\s*/\* loop exit test", line):
            nest[-1].trips = max(int(trips), nest[-1].trips or 0)
    return nest[0]


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
