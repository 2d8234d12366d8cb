"""What XLA makes of the exchange for a TPU, compiled ahead of time: tokens travel while experts compute.

With the flags that ``research.sharding.expert_parallel`` names, and buffers as large as they are by default: what is looked
at is the branch that batches take which fit them.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments.benchmarks.tpu_cycles import has_libtpu, libtpu_folder

ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from research.layers.context import Context
from research.layers.moe import MoEConfig
from research.sharding.mesh import AXES, batch_sharding

topology = topologies.get_topology_desc(topology_name="v6e:2x4", platform="tpu")
mesh = Mesh(np.array(topology.devices).reshape(1, 1, 8, 1, 1), AXES, axis_types=(AxisType.Explicit,) * 5)
config = MoEConfig(
    experts=16, per_token=2, hidden=256, shared_hidden=2048, chunks=2, exchange=sys.argv[1]
)
B, T, D = 8, 2048, 1024
with jax.set_mesh(mesh):
    layer = nnx.eval_shape(lambda: config.build(D, depth=1, rngs=nnx.Rngs(params=0), param_dtype=jnp.bfloat16))
    x = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16, sharding=batch_sharding(mesh))
    call = jax.jit(lambda layer, x: layer(x, None, Context(jnp.zeros((B, T), jnp.int32)))[0])
    print(call.lower(layer, x).compile(compiler_options=json.loads(sys.argv[2])).as_text())
"""
FLAGS = {"xla_tpu_enable_async_all_to_all": "true", "xla_tpu_enable_async_ragged_all_to_all": "true"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_libtpu(), reason="needs libtpu, the TPU compiler: make test-slow fetches it"),
]


def compiled(method: str) -> str:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join(filter(None, [libtpu_folder(), os.environ.get("PYTHONPATH")])),
    }  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, method, json.dumps(FLAGS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def schedule(text: str, travel: str) -> list[tuple[str, str, set[str]]]:
    """(name, kind, operands) of the instructions beside which tokens travel, in the order they run."""
    (computation,) = (block for block in text.split("\n\n") if f" {travel}-start(" in block)
    assert "ENTRY" not in computation  # a branch: the other is for batches that don't fit
    instructions = []
    for line in computation.splitlines():
        if found := re.match(r"\s+(?:ROOT )?%([\w.-]+) = .*? ([\w-]+)\((.*)", line):
            name, kind, rest = found.groups()
            label = re.search(r'op_name="([^"]*)"', rest)
            operands = set(re.findall(r"%([\w.-]+)", rest.split(", metadata")[0]))
            instructions.append((name, f"{kind} {label[1] if label else ''}", operands))
    return instructions


@pytest.mark.parametrize("method", ["ragged", "padded"])
def test_tokens_travel_while_experts_and_the_shared_expert_compute(method):
    travel = "ragged-all-to-all" if method == "ragged" else "all-to-all"
    instructions = schedule(compiled(method), travel)
    place = {name: index for index, (name, _, _) in enumerate(instructions)}
    start, done = f"{travel}-start ", f"{travel}-done "
    flights = [
        (place[began], index)
        for index, (_, kind, operands) in enumerate(instructions)
        if kind.startswith(done)
        for began in operands & {name for name, kind, _ in instructions if kind.startswith(start)}
    ]
    assert len(flights) >= 4  # two chunks, there and back; what names the experts may fly too
    kernels = ("grouped_matmul_activated", "grouped_matmul_product")
    experts = [index for index, (name, *_) in enumerate(instructions) if name.startswith(kernels)]
    assert len(experts) == 4

    def hidden(indices):
        return {index for index in indices if any(began < index < ended for began, ended in flights)}

    assert hidden(experts), "no expert's product runs while another chunk travels"
    products = {
        i
        for i, (_, kind, _) in enumerate(instructions)
        if kind.startswith("fusion") and re.search(r"shard_map/cond/\w+/dot_general", kind)
    }
    if method == "padded":
        assert len(hidden(products)) >= 2, "the shared expert's two products don't run while tokens travel"
    # They wait for no token that travels, and no token waits for them: any flight may hide them.
    before: list[set[int]] = []
    for index, (_, _, operands) in enumerate(instructions):
        direct = {place[name] for name in operands if name in place and place[name] < index}
        before.append(direct.union(*(before[i] for i in direct)))
    arrivals, departures = {ended for _, ended in flights}, [began for began, _ in flights]
    free = [i for i in products if not before[i] & arrivals and not any(i in before[began] for began in departures)]
    assert len(free) >= 2
