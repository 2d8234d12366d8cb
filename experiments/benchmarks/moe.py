"""Routed experts against dense products of the same FLOPs: grouped_matmul and the MoE layer, forward + backward."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.layers.context import Context
from research.layers.moe import HashRouter, MoEConfig
from research.ops.dispatch import expert_mlp, group, swiglu
from research.ops.grouped_matmul import grouped_matmul
from research.ops.routing import from_choice

LOADS = ("uniform", "multinomial", "zipf", "one_hot")
GROUPS = (1, 8, 64)


def run(quick: bool = False) -> dict[str, Any]:
    """Times as multiples of a dense product (or a dense MLP) of the same active FLOPs, interleaved with it.

    Each entry: the best of three medians of pairwise ratios, and the milliseconds of its median. 'zipf' draws groups in
    proportion to 1/rank, 'one_hot' sends every row to one expert. ``G64_over_G8`` times the two in pairs of their own.
    'grouped_matmul_small' has ``jax.lax.ragged_dot`` under every load, at a shape where that takes no minutes.
    """
    scale = 8 if quick else 1
    return {
        "grouped_matmul": _products(4096 // scale, 128, 256, quick),
        "grouped_matmul_small": _products(1024 // scale, 128, 256, quick, (16,), LOADS),
        "layer": _layers(4096 // scale, 192, 96, 2, quick),
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
    """Forward and backward: the value and every gradient. ``given`` (sizes, choices) is an argument, so that XLA can't
    specialise on a load."""

    def both(cotangent, given, *arguments):
        value, pull = jax.vjp(functools.partial(function, given), *arguments)
        return value, pull(cotangent)

    return jax.jit(both)


def _products(
    M: int, K: int, N: int, quick: bool, counts: Sequence[int] = GROUPS, of_xla: Sequence[str] = ("uniform",)
) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    x_MK, dy_MN = jax.random.normal(keys[0], (M, K)), jax.random.normal(keys[1], (M, N))
    w_EKN = jax.random.normal(keys[2], (max(counts), K, N))
    dense = functools.partial(_gradients(lambda _, x, w: x @ w), dy_MN, None, x_MK, w_EKN[0])
    own, xla = (_gradients(lambda sizes_E, x, w, f=f: f(x, w, sizes_E)) for f in (grouped_matmul, jax.lax.ragged_dot))
    entries: dict[str, Callable] = {}
    for groups in counts:
        w = w_EKN[:groups]
        for load in LOADS if groups > 1 else ("uniform",):
            sizes_E = jnp.asarray(group_sizes(load, M, groups))
            entries[f"G{groups}_{load}"] = functools.partial(own, dy_MN, sizes_E, x_MK, w)
            if load in of_xla:
                entries[f"G{groups}_{load}_ragged_dot"] = functools.partial(xla, dy_MN, sizes_E, x_MK, w)
    results: dict[str, Any] = {name: _against(dense, entry, quick) for name, entry in entries.items()}
    if {8, 64} <= set(counts):
        more = {load: _against(entries[f"G8_{load}"], entries[f"G64_{load}"], quick)["ratio"] for load in LOADS}
        results["G64_over_G8"] = more
    return {"rows": M, "K": K, "N": N, "dense": "one matrix product", **results}


def _layers(T: int, D: int, F: int, K: int, quick: bool) -> dict[str, Any]:
    """The layer as models run it, SwiGLU experts, statistics included; a hash table of token ids makes the load.

    'ragged_dot' is the layer's path (grouping, experts, combination) with XLA's own product in it.
    """
    keys = jax.random.split(jax.random.key(1), 5)
    normal = jax.random.normal
    x_1TD, dy_1TD = normal(keys[0], (1, T, D)), normal(keys[1], (1, T, D))
    w_DN, w_FD = normal(keys[2], (D, 2 * K * F)) * D**-0.5, normal(keys[3], (K * F, D)) * F**-0.5
    mlp = _gradients(lambda _, x_TD, w_DN, w_FD: swiglu(x_TD @ w_DN) @ w_FD)
    dense = functools.partial(mlp, dy_1TD[0], None, x_1TD[0], w_DN, w_FD)
    context = Context(jnp.arange(T)[None], None, jnp.arange(T, dtype=jnp.int32)[None])
    entries: dict[str, Callable] = {}
    for experts in GROUPS:
        width = min(K, experts)
        config = MoEConfig(
            experts=experts, per_token=width, hidden=F * K // width, shared_hidden=0, router=HashRouter(T)
        )
        layer = config.build(D, depth=1, rngs=nnx.Rngs(params=0), param_dtype=jnp.float32)
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

        def moe(rest, params, x_1TD, graphdef=graphdef):
            return nnx.merge(graphdef, params, rest)(x_1TD, None, context)[0]

        def path(expert_TK, params, x_1TD, experts=experts, width=width):
            scores_TE = jnp.zeros((T, experts))
            groups = group(from_choice(expert_TK, jnp.full((T, width), 1 / width), scores_TE, scores_TE))
            weights = (params["w_in_EDF"][...], params["w_out_EFD"][...])
            return expert_mlp(x_1TD[0], *weights, groups, activation=swiglu, implementation="ragged_dot")[None]

        own = _gradients(moe)
        for load in LOADS if experts > 1 else ("uniform",):
            loaded = jax.tree.map(lambda leaf: leaf, rest)
            loaded["table_VK"].set_value(_choices(load, T, experts, width))
            entries[f"E{experts}_{load}"] = functools.partial(own, dy_1TD, loaded, params, x_1TD)
        chosen_TK = _choices("uniform", T, experts, width)
        entries[f"E{experts}_uniform_ragged_dot"] = functools.partial(
            _gradients(path), dy_1TD, chosen_TK, params, x_1TD
        )
    results = {name: _against(dense, entry, quick) for name, entry in entries.items()}
    return {"tokens": T, "D": D, "F": F, "K": K, "dense": "an MLP of the same active FLOPs", **results}


def _choices(load: str, tokens: int, experts: int, k: int) -> jax.Array:
    """Experts of each token with that load, shuffled; a token may visit an expert twice, which costs the same."""
    rows = np.repeat(np.arange(experts), group_sizes(load, tokens * k, experts))
    return jnp.asarray(np.random.default_rng(0).permutation(rows).reshape(tokens, k), jnp.int32)


def _against(base: Callable, entry: Callable, quick: bool) -> dict[str, float]:
    """Best of three medians of pairwise ratios, fewer where a call takes long."""
    for function in (base, entry):
        jax.block_until_ready(function())
    once = _seconds(entry)
    repeats, medians = (3, 1) if quick or once > 0.2 else (15, 3)
    best = (once / _seconds(base), once) if once > 2 else (float("inf"), float("inf"))
    medians = 0 if once > 2 else medians
    for _ in range(medians):
        pairs = [(_seconds(base), _seconds(entry)) for _ in range(repeats)]
        best = min(best, (statistics.median(b / a for a, b in pairs), statistics.median(b for _, b in pairs)))
    return {"ratio": round(best[0], 3), "milliseconds": round(best[1] * 1e3, 3)}


def _seconds(function: Callable) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start
