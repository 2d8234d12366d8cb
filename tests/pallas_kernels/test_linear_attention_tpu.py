"""The TPU kernels themselves: no races between grid steps, machine code for three generations of TPU, and no step slower."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from experiments.benchmarks import tpu_cycles
from pallas_kernels.linear_attention import tpu

COMMITTED = pathlib.Path(__file__).parents[2] / "benchmarks/results/tpu_cycles.json"
needs_libtpu = pytest.mark.skipif(not tpu_cycles.has_libtpu(), reason="libtpu is not installed (make test-slow does)")


def arguments(B, T, H, K, decay, delta):
    normal = lambda *shape: jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)  # noqa: E731
    g = -jnp.abs(normal(B, T, H, K) if decay == "channel" else normal(B, T, H))
    beta = jax.nn.sigmoid(normal(B, T, H)) if delta else None
    return normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, K), g, beta, normal(B, H, K, K)


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "delta"), [("token", False), ("token", True), ("channel", False)])
def test_grid_steps_do_not_race(decay, delta):
    """Two rows, two chunks, one head: the axes said to be parallel share nothing, and every copy is awaited."""
    x = arguments(2, 32, 1, 8, decay, delta)
    options = dict(scale=0.5, interval=16, interpret=pltpu.InterpretParams(detect_races=True))
    plain = dict(scale=0.5, interval=16, interpret=True)
    o, state, saved = tpu.forward(*x, save=True, **options)
    jax.block_until_ready(o)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    assert not interpreter.races.races_found
    want = tpu.forward(*x, save=True, **plain)
    np.testing.assert_allclose(o, want[0], atol=1e-5)
    gradients = tpu.backward(*x[:5], saved, o, state, **options)
    jax.block_until_ready(gradients)
    assert not interpreter.races.races_found
    for got, expected in zip(gradients, tpu.backward(*x[:5], want[2], want[0], want[1], **plain), strict=True):
        if expected is not None:
            np.testing.assert_allclose(got, expected, atol=1e-4)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("additive", dict(B=1, T=256, H=4, K=64, V=128, G=2)),
        ("delta_rule", dict(B=1, T=256, H=4, K=128, V=128, G=2)),
        ("kda", dict(B=1, T=256, H=2, K=128, V=128)),
    ],
)
def test_forward_and_gradient_compile_for_the_tpu(topology, name, shape):
    """Lowered on a CPU with implementation=None; fails on VMEM overflow or where the XLA form slipped in."""
    result = tpu_cycles.measure(topology, name, "forward_backward", None, shape)
    assert [call.split(".")[0] for call in result["custom_calls"]] == [
        "linear_attention_backward",
        "linear_attention_forward",
    ]


@needs_libtpu
@pytest.mark.slow
def test_no_kernel_is_slower_than_committed():
    """Bundles a grid step, at most 5 % more than benchmarks/results/tpu_cycles.json says (same libtpu)."""
    committed = json.loads(COMMITTED.read_text())
    ours = tpu_cycles.libtpu_version()
    assert committed["libtpu"] == ours, f"{committed['libtpu']} was measured, this is {ours}: run the benchmark again"
    rows = {(row["mechanism"], row["way"], row["form"]): row for row in committed["rows"]}
    shape = {n: v for n, v in committed["shape"].items() if n != "dtype"} | {"T": 512}
    names = ("additive", "delta_rule", "kda")
    results = tpu_cycles.measure_all(committed["topology"], [(name, "forward_backward", None, shape) for name in names])
    for name, result in zip(names, results, strict=True):
        for kernel, bundles in rows[name, "forward_backward", "kernel"]["bundles_per_step"].items():
            assert result["bundles_per_step"][kernel] <= 1.05 * bundles, (name, kernel)
