"""The convolution's GPU kernels themselves: no races between thread blocks, and machine code for an H200 that spills nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from experiments.benchmarks import gpu_registers
from pallas_kernels.causal_conv import gpu

needs_plugin = pytest.mark.skipif(
    not gpu_registers.has_plugin(), reason="needs JAX's CUDA plugin and ptxas: make test-slow fetches them"
)


@pytest.mark.slow
def test_thread_blocks_do_not_race(monkeypatch):
    """Three chunks, which read each other's rows and write their own."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    monkeypatch.setattr(gpu, "_CHUNKS", (4,))
    monkeypatch.setattr(gpu, "_AHEAD", 4)
    normal = lambda *shape: jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)  # noqa: E731
    inputs = normal(1, 10, 128), normal(3, 128), normal(128), normal(1, 2, 128), jnp.full((1, 10), 2)
    options = {"silu": True, "interpret": plgpu.InterpretGPUParams(detect_races=True)}
    y_BTD = jax.block_until_ready(gpu.forward(*inputs, **options))
    assert not interpreter.get_races().races_found
    jax.block_until_ready(gpu.backward(*inputs, y_BTD, **options))
    assert not interpreter.get_races().races_found


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "launches"),
    [
        (dict(B=1, T=8192, D=8192, W=4), 2),
        (dict(B=2, T=1000, D=1280, W=4, packed=1), 4),
    ],  # a branch for scattered padding
)
def test_forward_and_gradient_compile_for_the_h200(shape, launches):
    """Lowered on a CPU with implementation=None; fails where the XLA form slipped in or a register spilled."""
    result = gpu_registers.measure("causal_conv", "forward_backward", shape)
    assert result["custom_calls"] == launches
    assert {kernel["kernel"] for kernel in result["kernels"]} == {"causal_conv_forward", "causal_conv_backward"}
    for kernel in result["kernels"]:
        assert kernel["spill_bytes"] == 0, kernel
