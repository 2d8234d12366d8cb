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
@pytest.mark.parametrize("call", ["additive", "delta_rule", "gla"])
def test_thread_blocks_do_not_race(call, capfd):
    """Two parts of three chunks, two in flight; or one, and two blocks of channels. What lies in shared memory is written and
    read in turn, in every kernel: the detector prints, and forgets with the next kernel."""
    normal = lambda *shape: jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)  # noqa: E731
    T, K, parts = (192, 128, 1) if call == "gla" else (330, 64, 2)
    q = (normal(1, T, 1, K) / 8).astype(jnp.bfloat16)
    v = normal(1, T, 1, 64).astype(jnp.bfloat16)
    g, state = -jnp.abs(normal(1, T, 1, *([K] if call == "gla" else []))), normal(1, 1, K, 64)
    beta = jnp.exp(g) if call == "delta_rule" else None
    options = dict(scale=0.5, interval=192, parts=parts)
    races = plgpu.InterpretGPUParams(detect_races=True)
    o, end, saved = gpu.forward(q, q, v, g, beta, state, save=True, interpret=races, **options)
    gradients = gpu.backward(q, q, v, g, beta, saved, o, end, interpret=races, **options)
    jax.block_until_ready(gradients)
    assert "RACE" not in capfd.readouterr().out
    if call != "additive":
        return
    token = (q[:, 0].astype(jnp.float32), q[:, 1].astype(jnp.float32), v[:, 0].astype(jnp.float32), g[:, 0], g[:, 1])
    jax.block_until_ready(gpu_step.step(*token, state, scale=0.5, interpret=races))
    assert "RACE" not in capfd.readouterr().out


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "shape", "launches"),
    [
        # Few heads: the states of parts first, in both directions; the states of chunks between saved ones.
        ("additive", dict(B=1, T=8192, H=4, G=2, K=128, V=128), 7),
        ("additive", dict(B=2, T=1000, H=80, G=80, K=64, V=64), 4),
        ("delta_rule", dict(B=1, T=8192, H=4, G=2, K=128, V=128), 9),
        ("gla", dict(B=2, T=1000, H=80, G=80, K=128, V=64), 7),
    ],
)
def test_forward_and_gradient_compile_for_the_h200(call, shape, launches):
    """Lowered on a CPU with implementation=None; fails where the XLA form slipped in or a register spilled."""
    result = gpu_registers.measure(call, "forward_backward", shape)
    assert result["custom_calls"] == launches
    names = {"forward", "backward"} | ({"states"} if launches > 6 else set())
    names |= {
        "additive": {"backward_queries", "backward_keys"},
        "delta_rule": {"backward_queries", "backward_keys_delta", "inverse"},
        "gla": {"channels", "backward_chunks", "backward_channels"},
    }[call]
    assert {kernel["kernel"] for kernel in result["kernels"]} == {f"linear_attention_{name}" for name in names}
    for kernel in result["kernels"]:
        assert kernel["spill_bytes"] == 0, kernel


@needs_plugin
@pytest.mark.slow
def test_a_step_compiles_for_the_h200():
    result = gpu_registers.measure("step", "forward", dict(B=16, H=32, K=128, V=128))
    assert result["custom_calls"] == 1
    assert [(kernel["kernel"], kernel["spill_bytes"]) for kernel in result["kernels"]] == [("linear_attention_step", 0)]
