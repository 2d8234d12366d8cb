"""The TPU kernels besides linear attention's: no races between grid steps, machine code for three generations, no step slower."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from experiments.benchmarks import tpu_cycles
from pallas_kernels.causal_conv import tpu as causal_conv
from pallas_kernels.grouped_matmul import tpu as grouped_matmul
from pallas_kernels.grouped_matmul import tpu_activated
from pallas_kernels.linear_attention import tpu_mamba2_step
from pallas_kernels.sparse_attention import tpu_attend, tpu_select
from tests.pallas_kernels.test_linear_attention_tpu import COMMITTED, needs_libtpu

# By call: the kernels that must be in its program, and a shape of few grid steps, each of them as in the table's shape.
KERNELS = {
    ("causal_conv", "forward_backward"): (
        ["causal_conv_backward", "causal_conv_forward"],
        dict(B=1, T=1024, D=1024, W=4),
    ),
    ("sparse_select", "forward"): (["sparse_attention_select"], dict(B=1, T=8192, H=64, K=128, N=2048)),
    ("sparse_attention", "forward_backward"): (
        ["sparse_attention_backward_keys", "sparse_attention_backward_queries", "sparse_attention_forward"],
        dict(B=1, T=1024, H=2, K=128, V=128),
    ),
    ("step", "forward"): (["linear_attention_step"], dict(B=2, H=32, K=128, V=128)),
    ("gated_deltanet_step", "forward"): (["gated_deltanet_step"], dict(B=2, G=16, H=32, K=128, V=128, W=4)),
    ("mamba2_step", "forward"): (["mamba2_step"], dict(B=16, G=8, H=128, K=128, V=64, W=4)),
    ("expert_mlp", "dx"): (
        ["grouped_matmul_activated", "grouped_matmul_activated_transposed", "grouped_matmul_transposed"],
        dict(M=1024, K=8, N=768, E=32, D=2048),
    ),
    ("grouped_matmul_fine", "forward"): (["grouped_matmul_product"], dict(M=2048, K=2048, N=768, E=8)),
    ("grouped_matmul_fine", "dw"): (["grouped_matmul_outer"], dict(M=2048, K=2048, N=768, E=8)),
}


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def check_races(run):
    """``run(interpret)`` finds no race, and the same values as without looking for one."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    got = run(pltpu.InterpretParams(detect_races=True))
    jax.block_until_ready(got)
    assert not interpreter.races.races_found
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, run(True))


@pytest.mark.slow
def test_convolutions_do_not_race(monkeypatch):
    """Two rows, two chunks, two blocks of channels."""
    monkeypatch.setattr(causal_conv, "_CHUNK", 16)
    monkeypatch.setattr(causal_conv, "_CHANNELS", 128)
    x = normal(2, 32, 256), normal(4, 256), normal(256), normal(2, 3, 256), jnp.full((2, 32), 3).at[:, :3].set(-1)
    check_races(lambda interpret: causal_conv.forward(*x, silu=True, interpret=interpret))
    check_races(lambda interpret: causal_conv.backward(*x, x[0], silu=True, interpret=interpret))


@pytest.mark.slow
def test_grouped_products_do_not_race(monkeypatch):
    """Two blocks of columns, three tiles, four groups."""
    monkeypatch.setattr(grouped_matmul, "_product_tiles", lambda *_: (16, 128))
    monkeypatch.setattr(grouped_matmul, "_outer_tiles", lambda *_: (16, 128, 128))
    x_MK, w_EKN, sizes_E = normal(40, 256), normal(4, 256, 256), jnp.array([10, 0, 20, 3])
    check_races(lambda interpret: grouped_matmul.product(x_MK, w_EKN, sizes_E, interpret=interpret))
    check_races(lambda interpret: grouped_matmul.product(x_MK, w_EKN, sizes_E, transposed=True, interpret=interpret))
    check_races(lambda interpret: grouped_matmul.outer(x_MK, normal(40, 256), sizes_E, interpret=interpret))


@pytest.mark.slow
def test_products_with_their_activation_do_not_race(monkeypatch):
    """Two blocks of columns, two tiles and a short one, four groups: each tile's copies are awaited before its place serves again."""
    monkeypatch.setattr(tpu_activated, "_tiles", lambda *_: (16, 128))

    def activation(h, weight):
        gate, up = jnp.split(h, 2, axis=1)
        return gate * up * weight

    x_MK, w_EKN, sizes_E = normal(40, 128), normal(4, 128, 512), jnp.array([14, 0, 18, 6])
    x_MK, weight_M = x_MK.at[38:].set(0), normal(40)
    run = functools.partial(tpu_activated.product, activation=activation, F=256, keep=True)
    check_races(lambda interpret: run(x_MK, w_EKN, weight_M, sizes_E, interpret=interpret))
    h_MN = normal(40, 512).at[38:].set(0)
    run = functools.partial(tpu_activated.transposed, activation=activation)
    check_races(
        lambda interpret: run(x_MK, w_EKN.reshape(4, 512, 128)[:, :256], h_MN, weight_M, sizes_E, interpret=interpret)
    )


@pytest.mark.slow
def test_sparse_attention_does_not_race(monkeypatch):
    """Two rows of two blocks of queries and of keys, two heads of one key head."""
    monkeypatch.setattr(tpu_select, "_QUERIES", 16)
    monkeypatch.setattr(tpu_select, "_KEYS", 128)
    monkeypatch.setattr(tpu_attend, "_BLOCK", 128)
    T = 140
    tokens = jnp.stack([jnp.ones((2, T), jnp.int32), jnp.broadcast_to(jnp.arange(T), (2, T))], axis=-1)
    indexer = normal(2, T, 2, 8)[:, :24], normal(2, T, 8), normal(2, T, 2)[:, :24], tokens[:, -24:], tokens
    check_races(lambda interpret: tpu_select.select(*indexer, top_k=5, interpret=interpret))
    words = tpu_select.select(
        normal(2, T, 2, 8), *indexer[1:2], normal(2, T, 2), tokens, tokens, top_k=5, interpret=True
    )
    x = normal(2, T, 2, 8), normal(2, T, 1, 8), normal(2, T, 1, 8)
    o, lse = tpu_attend.forward(*x, words, interpret=True)
    check_races(lambda interpret: tpu_attend.forward(*x, words, interpret=interpret))
    check_races(lambda interpret: tpu_attend.backward(*x, words, o, lse, o, interpret=interpret))


@pytest.mark.slow
def test_a_mamba2_step_does_not_race(monkeypatch):
    """Two blocks of two rows, one pair of heads."""
    monkeypatch.setattr(tpu_mamba2_step, "_ROWS", 2)
    x = normal(4, 384), normal(4, 3, 384), normal(4, 2, 128, 64), normal(4, 2), normal(4, 128), normal(4, 384)
    x = *x, normal(384), normal(2, 2), normal(2, 128)
    run = functools.partial(tpu_mamba2_step.step, limits=None, norm_groups=1, eps=1e-5)
    check_races(lambda interpret: run(*x, interpret=interpret))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_kernels_compile_for_the_tpu_and_are_not_slower_than_committed(topology):
    """Lowered on a CPU with implementation=None; fails on VMEM overflow or where the XLA form slipped in.

    Bundles a grid step, where benchmarks/results/tpu_cycles.json has them: at most 5 % more (same libtpu).
    """
    results = tpu_cycles.measure_all(topology, [(*call, None, shape) for call, (_, shape) in KERNELS.items()])
    for (expected, _), result in zip(KERNELS.values(), results, strict=True):
        assert sorted(call.split(".")[0] for call in result["custom_calls"]) == expected
    committed = json.loads(COMMITTED.read_text())
    if topology != committed["topology"]:
        return
    assert committed["libtpu"] == tpu_cycles.libtpu_version(), "run the benchmark again"
    rows = {(row["mechanism"], row["way"]): row for row in committed["rows"] if row["form"] == "kernel"}
    for call, result in zip(KERNELS, results, strict=True):
        for kernel, bundles in rows[call]["bundles_per_step"].items():
            assert result["bundles_per_step"][kernel] <= 1.05 * bundles, kernel
