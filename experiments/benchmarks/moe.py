"""Routed experts against dense products of the same FLOPs: grouped_matmul and the MoE layer's path, forward + backward."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.ops.dispatch import expert_mlp, group, swiglu
from research.ops.grouped_matmul import grouped_matmul
from research.ops.routing import from_choice

LOADS = ("uniform", "multinomial", "zipf", "one_hot")
GROUPS = (1, 8, 64)


def run(quick: bool = False) -> dict[str, Any]:
    """Times as multiples of a dense product (or a dense MLP) of the same active FLOPs, interleaved with it.

    Each entry: the best of three medians of pairwise ratios, and the milliseconds of its median. 'zipf' draws groups in
    proportion to 1/rank, 'one_hot' sends every row to one expert.
    """
    scale = 8 if quick else 1
    return {
        "grouped_matmul": _products(4096 // scale, 128, 256, quick),
        "expert_mlp": _layers(4096 // scale, 192, 96, 2, quick),
    }


def group_sizes(load: str, rows: int, groups: int, seed: int = 0) -> np.ndarray:
    """Rows of each group, [groups] int32, summing to `rows`."""
    rng = np.random.default_rng(seed)
    rank = 1 / np.arange(1, groups + 1)
    sizes = {
        "uniform": lambda: np.diff(np.linspace(0, rows, groups + 1).astype(int)),
        "multinomial": lambda: rng.multinomial(rows, np.full(groups, 1 / groups)),
        "zipf": lambda: rng.multinomial(rows, rank / rank.sum()),
        "one_hot": lambda: np.eye(groups, dtype=int)[groups // 2] * rows,
    }[load]()
    return sizes.astype(np.int32)


def _gradients(function: Callable) -> Callable:
    """Forward and backward: the value and every gradient."""

    def both(cotangent, *arguments):
        value, pull = jax.vjp(function, *arguments)
        return value, pull(cotangent)

    return jax.jit(both)


def _products(M: int, K: int, N: int, quick: bool) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    x_MK, dy_MN = jax.random.normal(keys[0], (M, K)), jax.random.normal(keys[1], (M, N))
    w_EKN = jax.random.normal(keys[2], (max(GROUPS), K, N))
    dense = functools.partial(_gradients(jnp.matmul), dy_MN, x_MK, w_EKN[0])
    entries: dict[str, Callable] = {}
    for groups in GROUPS:
        for load in LOADS if groups > 1 else ("uniform",):
            sizes_E = jnp.asarray(group_sizes(load, M, groups))
            own = _gradients(lambda x, w, s=sizes_E: grouped_matmul(x, w, s))
            entries[f"G{groups}_{load}"] = functools.partial(own, dy_MN, x_MK, w_EKN[:groups])
        sizes_E = jnp.asarray(group_sizes("uniform", M, groups))
        xla = _gradients(lambda x, w, s=sizes_E: jax.lax.ragged_dot(x, w, s))
        entries[f"G{groups}_uniform_ragged_dot"] = functools.partial(xla, dy_MN, x_MK, w_EKN[:groups])
    results = _interleaved(dense, entries, quick)
    ratio = {load: results[f"G64_{load}"]["ratio"] / results[f"G8_{load}"]["ratio"] for load in LOADS}
    return {"rows": M, "K": K, "N": N, "dense": "one matrix product", **results, "G64_over_G8": ratio}


def _layers(T: int, D: int, F: int, K: int, quick: bool) -> dict[str, Any]:
    """The layer's path between router logits and residual stream: grouping, experts, combine; SwiGLU experts."""
    keys = jax.random.split(jax.random.key(1), 5)
    normal = jax.random.normal
    x_TD, dy_TD = normal(keys[0], (T, D)), normal(keys[1], (T, D))
    w_DN, w_FD = normal(keys[2], (D, 2 * K * F)) * D**-0.5, normal(keys[3], (K * F, D)) * F**-0.5
    dense = functools.partial(_gradients(lambda x_TD, w_DN, w_FD: swiglu(x_TD @ w_DN) @ w_FD), dy_TD, x_TD, w_DN, w_FD)
    entries: dict[str, Callable] = {}
    for experts in GROUPS:
        width = min(K, experts)
        w_EDN = normal(keys[2], (experts, D, 2 * F * K // width)) * D**-0.5
        w_EFD = normal(keys[3], (experts, F * K // width, D)) * F**-0.5
        for load in LOADS if experts > 1 else ("uniform",):
            expert_TK = _choices(load, T, experts, width)

            def layer(x_TD, weight_TK, w_EDN, w_EFD, expert_TK=expert_TK):
                scores_TE = jnp.zeros((x_TD.shape[0], w_EDN.shape[0]))
                groups = group(from_choice(expert_TK, weight_TK, scores_TE, scores_TE))
                return expert_mlp(x_TD, w_EDN, w_EFD, groups, activation=swiglu)

            weight_TK = jnp.full((T, width), 1 / width)
            entries[f"E{experts}_{load}"] = functools.partial(_gradients(layer), dy_TD, x_TD, weight_TK, w_EDN, w_EFD)
    results = _interleaved(dense, entries, quick)
    return {"tokens": T, "D": D, "F": F, "K": K, "dense": "an MLP of the same active FLOPs", **results}


def _choices(load: str, tokens: int, experts: int, k: int) -> jax.Array:
    """Experts of each token with that load, shuffled; a token may visit an expert twice, which costs the same."""
    rows = np.repeat(np.arange(experts), group_sizes(load, tokens * k, experts))
    return jnp.asarray(np.random.default_rng(0).permutation(rows).reshape(tokens, k), jnp.int32)


def _interleaved(dense: Callable, entries: dict[str, Callable], quick: bool) -> dict[str, Any]:
    repeats, medians = (3, 1) if quick else (9, 3)
    results = {}
    jax.block_until_ready(dense())
    for name, entry in entries.items():
        jax.block_until_ready(entry())
        best = (float("inf"), float("inf"))
        for _ in range(medians):
            pairs = [(_seconds(dense), _seconds(entry)) for _ in range(repeats)]
            ratio = statistics.median(b / a for a, b in pairs)
            best = min(best, (ratio, statistics.median(b for _, b in pairs)))
        results[name] = {"ratio": round(best[0], 3), "milliseconds": round(best[1] * 1e3, 3)}
    return results


def _seconds(function: Callable) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start
