"""The demo's training step against a 2048³ float32 matrix product, both in this process."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from configs.demo import CONFIG
from research.models.flops import forward_flops
from research.training.optimizers import make_optimizer
from research.training.state import create_state
from research.training.step import make_train_step

SIZE = 2048


def run(quick: bool = False) -> dict[str, Any]:
    """Interleaved pairs of one step and one matrix product; the best of three medians of each, and their ratio.

    FLOPs are the model's own matrix products (``research.models.flops``) times three for forward and backward: active
    experts only, nothing padded or recomputed, the vocabulary projection apart.
    """
    B, T = CONFIG.data.batch_size, CONFIG.data.sequence_length
    optimizer = make_optimizer(CONFIG.optimizer, CONFIG.train.steps)
    graphdef, state = create_state(CONFIG.model, optimizer, seed=0)
    step = make_train_step(graphdef, optimizer)
    tokens_BT = jax.random.randint(jax.random.key(1), (B, T + 1), 0, CONFIG.model.vocab_size)
    batch = {
        "inputs_BT": tokens_BT[:, :-1],
        "targets_BT": tokens_BT[:, 1:],
        "segment_ids_BT": jnp.ones((B, T), jnp.int32),
        "positions_BT": jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)),
        "loss_mask_BT": jnp.ones((B, T), bool),
    }
    square = jax.random.normal(jax.random.key(2), (SIZE, SIZE), jnp.float32)
    matmul = jax.jit(lambda a, b: a @ b)
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, batch))
    compile_seconds = time.perf_counter() - start
    jax.block_until_ready(matmul(square, square))

    step_medians, matmul_medians = [], []
    for _ in range(1 if quick else 3):
        step_seconds, matmul_seconds = [], []
        for _ in range(3 if quick else 10):
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, batch))
            between = time.perf_counter()
            jax.block_until_ready(matmul(square, square))
            step_seconds.append(between - start)
            matmul_seconds.append(time.perf_counter() - between)
        step_medians.append(statistics.median(step_seconds))
        matmul_medians.append(statistics.median(matmul_seconds))

    step_s, matmul_s = min(step_medians), min(matmul_medians)
    flops = {name: 3 * B * T * count for name, count in forward_flops(CONFIG.model, context=(T + 1) / 2).items()}
    matmul_rate = 2 * SIZE**3 / matmul_s
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "tokens_per_step": B * T,
        "compile_seconds": compile_seconds,
        "step_ms": 1e3 * step_s,
        "matmul_2048_ms": 1e3 * matmul_s,
        "matmul_gflops_per_second": matmul_rate / 1e9,
        "layers_gflops_per_step": flops["layers"] / 1e9,
        "head_gflops_per_step": flops["head"] / 1e9,
        "step_gflops_per_second_without_head": flops["layers"] / step_s / 1e9,
        "step_gflops_per_second_with_head": sum(flops.values()) / step_s / 1e9,
        "ratio_without_head": flops["layers"] / step_s / matmul_rate,
        "ratio_with_head": sum(flops.values()) / step_s / matmul_rate,
        "final_loss": float(metrics["loss"]),
    }
