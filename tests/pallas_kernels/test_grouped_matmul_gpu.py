"""The grouped product's GPU kernels themselves: no races between warpgroups and copies, and machine code for an H200."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from experiments.benchmarks import gpu_registers
from pallas_kernels.grouped_matmul import gpu

needs_plugin = pytest.mark.skipif(
    not gpu_registers.has_plugin(), reason="needs JAX's CUDA plugin and ptxas: make test-slow fetches them"
)


@pytest.mark.slow
def test_warpgroups_do_not_race(monkeypatch):
    """Two warpgroups that multiply: whole and partial tiles, both clearing foreign rows of what both read."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    monkeypatch.setattr(gpu, "_NEIGHBOURS", 2)
    draw = np.random.default_rng(0).standard_normal
    x_MK, w_EKN, sizes_E = (
        jnp.asarray(draw((140, 128)), jnp.bfloat16),
        jnp.asarray(draw((2, 128, 64))),
        jnp.array([131, 5]),
    )
    races = plgpu.InterpretGPUParams(detect_races=True)
    jax.block_until_ready(gpu.product(x_MK, w_EKN.astype(jnp.bfloat16), sizes_E, interpret=races))
    assert not interpreter.get_races().races_found
    jax.block_until_ready(gpu.outer(x_MK, x_MK, sizes_E, interpret=races))
    assert not interpreter.get_races().races_found


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [dict(M=32768, K=2048, N=768, E=128), dict(M=1000, K=64, N=192, E=100)],  # two warpgroups' rows in a tile; one's
)
def test_all_legs_compile_for_the_h200(shape):
    """Lowered on a CPU with implementation=None; fails where the XLA form slipped in or a register spilled."""
    result = gpu_registers.measure("grouped_matmul_fine", "forward_backward", shape)
    assert result["custom_calls"] == 3
    names = {f"grouped_matmul_{leg}" for leg in ("product", "transposed", "outer")}
    assert {kernel["kernel"] for kernel in result["kernels"]} == names
    for kernel in result["kernels"]:
        assert kernel["spill_bytes"] == 0, kernel
