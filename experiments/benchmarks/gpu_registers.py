"""Registers and spills of the GPU kernels on an H200 that need not be there: what ptxas says when it compiles them.

Compiled ahead of time on any x86-64 Linux machine. It says that a kernel compiles, fits the card and spills nothing, not how
fast it is. Needs JAX's CUDA plugin and ptxas (the ``aot_gpu`` extra; no driver, no card).
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from experiments.benchmarks._tpu_cases import CASES, case

SHAPE = {"B": 1, "T": 8192, "H": 16, "G": 4, "K": 128, "V": 128}
_OTHERS = ("grouped_matmul_wide", "grouped_matmul_fine", "causal_conv")  # in their own shapes
_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H200"
"""


def run(quick: bool = False) -> dict[str, Any]:
    """Rows: call, kernel, registers a thread, bytes spilled, of forward and backward, and the call's shape where it is not
    ``shape``; ``quick`` compiles one forward alone."""
    if quick:
        calls = {"additive": ("forward", SHAPE)}
    else:
        calls = {
            "additive": ("forward_backward", SHAPE),
            "delta_rule": ("forward_backward", SHAPE),
            "gla": ("forward_backward", SHAPE),
            "step": ("forward", {n: size for n, size in SHAPE.items() if n in "BHKV"}),
            **{name: ("forward_backward", CASES[name].shape) for name in _OTHERS},
        }
    rows = []
    for name, (way, shape) in calls.items():
        other = {"shape": {**shape, "dtype": "bfloat16"}} if name in _OTHERS else {}
        rows += [{"call": name, **other, **kernel} for kernel in measure(name, way, shape)["kernels"]]
    return {"target": "NVIDIA H200", "shape": {**SHAPE, "dtype": "bfloat16"}, "rows": rows}


def measure(name: str, way: str, shape: dict[str, int], timeout: float = 550) -> dict[str, Any]:
    """Compile in a process of its own, where JAX finds its CUDA plugin.

    Returns ``kernels`` (name, registers, spill_bytes, in order of compilation), ``custom_calls`` (how many Mosaic kernels the
    program launches) and temp_bytes. Raises RuntimeError with the compiler's words where the program does not compile.
    """
    folder = plugin_folder()
    path = [folder, os.environ.get("PYTHONPATH")]
    nvidia = Path(folder or "") / "nvidia/cu13/bin"
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
            "PATH": os.pathsep.join([str(nvidia), os.environ.get("PATH", "")]),
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }
        out = Path(scratch) / "compiled.json"
        command = [sys.executable, "-m", __name__, name, way, json.dumps(shape), str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        if not out.exists():
            raise RuntimeError(f"{name} {way} for an H200 did not compile: {(done.stdout + done.stderr)[-2000:]}")
        return {"kernels": _report(done.stdout + done.stderr), **json.loads(out.read_text())}


def plugin_folder() -> str | None:
    """Where the plugin lies if not on the path: ``make test-slow`` puts it beside the environment, where nothing else sees it."""
    folder = Path(sys.prefix) / "aot_gpu"
    return str(folder) if (folder / "jax_cuda13_plugin").exists() else None


def has_plugin() -> bool:
    return plugin_folder() is not None or importlib.util.find_spec("jax_cuda13_plugin") is not None


def _report(text: str) -> list[dict[str, Any]]:
    kernel = r"Compiling entry function '(\w+?)(?:_mosaic_gpu_kernel)?' for.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    found = re.findall(kernel + r".*?Used (\d+) registers", text, flags=re.DOTALL)
    return [{"kernel": n, "registers": int(r), "spill_bytes": int(a) + int(b)} for n, a, b, r in found]


def _compile(name, way, shape, out):
    import jax
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

    function, arguments = case(name, way, None, **json.loads(shape))
    topology = topologies.get_topology_desc(platform="cuda", target_config=_TARGET, topology="1x1x1")
    one = SingleDeviceSharding(topology.devices[0])
    abstract = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        lowered = jax.jit(function, in_shardings=one, out_shardings=one).lower(*arguments)
    compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    calls = len(re.findall(r'custom_call_target="mosaic_gpu\w*"', compiled.as_text() or ""))
    Path(out).write_text(json.dumps({"custom_calls": calls, "temp_bytes": memory.temp_size_in_bytes}))


if __name__ == "__main__":
    _compile(*sys.argv[1:])
