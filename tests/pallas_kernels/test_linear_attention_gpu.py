"""The GPU kernels themselves: no races between thread blocks and copies, and machine code for an H200 that spills nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from experiments.benchmarks import gpu_registers
from pallas_kernels.linear_attention import gpu, gpu_step

needs_plugin = pytest.mark.skipif(
    not gpu_registers.has_plugin(), reason="needs JAX's CUDA plugin and ptxas: make test-slow fetches them"
)


@pytest.mark.slow
@pytest.mark.parametrize("delta", [False, True])
def test_thread_blocks_do_not_race(delta):
    """Three chunks in two parts, two blocks of columns: what lies in shared memory is written and read in turn."""
    normal = lambda *shape: jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)  # noqa: E731
    q = (normal(1, 192, 1, 64) / 8).astype(jnp.bfloat16)
    v = normal(1, 192, 1, 128).astype(jnp.bfloat16)
    g, state = -jnp.abs(normal(1, 192, 1)), normal(1, 1, 64, 128)
    beta = jnp.exp(g) if delta else None
    options = dict(scale=0.5, interval=128, parts=2)
    races = plgpu.InterpretGPUParams(detect_races=True)
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    o, end, saved = gpu.forward(q, q, v, g, beta, state, save=True, interpret=races, **options)
    jax.block_until_ready(o)
    assert not interpreter.get_races().races_found
    gradients = gpu.backward(q, q, v, g, beta, saved, o, end, interpret=races, **options)
    jax.block_until_ready(gradients)
    assert not interpreter.get_races().races_found
    if delta:
        return
    token = (q[:, 0].astype(jnp.float32), q[:, 1].astype(jnp.float32), v[:, 0].astype(jnp.float32), g[:, 0], g[:, 1])
    jax.block_until_ready(gpu_step.step(*token, state, scale=0.5, interpret=races))
    assert not interpreter.get_races().races_found


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "shape", "launches"),
    [
        # Few heads: the states of parts first, in both directions; the states of chunks between saved ones.
        ("additive", dict(B=1, T=8192, H=4, G=2, K=128, V=128), 7),
        ("additive", dict(B=2, T=1000, H=80, G=80, K=64, V=64), 4),
        ("delta_rule", dict(B=1, T=8192, H=4, G=2, K=128, V=128), 9),
    ],
)
def test_forward_and_gradient_compile_for_the_h200(call, shape, launches):
    """Lowered on a CPU with implementation=None; fails where the XLA form slipped in or a register spilled."""
    result = gpu_registers.measure(call, "forward_backward", shape)
    assert result["custom_calls"] == launches
    names = {"forward", "backward", "backward_queries"}
    if call == "additive":
        names |= {"backward_keys"} | ({"states"} if launches > 4 else set())
    else:
        names |= {"backward_keys_delta", "inverse", "states"}
    assert {kernel["kernel"] for kernel in result["kernels"]} == {f"linear_attention_{name}" for name in names}
    for kernel in result["kernels"]:
        assert kernel["spill_bytes"] == 0, kernel


@needs_plugin
@pytest.mark.slow
def test_a_step_compiles_for_the_h200():
    result = gpu_registers.measure("step", "forward", dict(B=16, H=32, K=128, V=128))
    assert result["custom_calls"] == 1
    assert [(kernel["kernel"], kernel["spill_bytes"]) for kernel in result["kernels"]] == [("linear_attention_step", 0)]
