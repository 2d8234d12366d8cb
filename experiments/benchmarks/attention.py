"""Softmax attention and what costs less of it: prefill and decode time and cache bytes over T, one layer each.

Every time is taken in turn with a 1024³ float32 matrix product of the same process, best of three medians; ratios carry
from one machine to another better than milliseconds do. ``--picture docs/images/attention.png`` draws them. A decoded token reads a full cache, which is updated in place.
``deepseek_v3_decode`` is one decoded token a row of one layer with DeepSeek V3's heads, dense (MLA) and sparse (DSA).
"""

import functools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.layers.attention import AttentionConfig
from research.layers.context import Context
from research.layers.dsa import DSAConfig
from research.layers.gated_deltanet import GatedDeltaNetConfig
from research.layers.mla import MLAConfig
from research.ops.attention import tokens_of
from research.ops.sparse_attention import PRECISIONS, select

WIDTH = 256
_LATENT: dict[str, Any] = {"heads": 4, "nope_width": 64, "rope_width": 32, "value_width": 64, "latent": 128}
# The longest row that is prefilled: beyond it one round takes minutes on a CPU.
LONGEST_PREFILL = 16384
LAYERS = {
    "full": AttentionConfig(heads=4, key_heads=2, head_width=64),
    "sliding": AttentionConfig(heads=4, key_heads=2, head_width=64, window=512),
    "mla": MLAConfig(**_LATENT),
    "dsa": DSAConfig(**_LATENT, index_heads=4, index_width=32, top_k=512),
    "gated_deltanet": GatedDeltaNetConfig(heads=4, key_heads=2, key_width=64, value_width=64),
}
DEEPSEEK_V3: dict[str, Any] = {
    "heads": 128, "nope_width": 128, "rope_width": 64, "value_width": 128, "latent": 512, "query_latent": 1536,
}  # fmt: skip
INDEXER: dict[str, Any] = {"index_heads": 64, "index_width": 128, "top_k": 2048}


def run(quick: bool = False) -> dict[str, Any]:
    """Rows: layer, T, prefill_ms (none past ``LONGEST_PREFILL``), decode_ms, matmul_1024_ms, cache_bytes, at B1 and width 256, float32; and
    deepseek_v3_decode: dense_ms, sparse_ms and their ratio, the median of pairs taken in turn; selection_kept."""
    lengths = (512, 1024) if quick else (1024, 4096, 8192, 16384, 32768)
    square = jnp.asarray(np.random.default_rng(0).standard_normal((1024, 1024)), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    matmul = functools.partial(multiply, square, square)
    rows = []
    for T in lengths:
        for name, config in LAYERS.items():
            layer, x_BTD = make(config, WIDTH), draw(1, T, WIDTH)
            state = layer.init_state(1, T, jnp.float32)
            cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            repeats = 1 if T > 4096 else 3
            decode_s, matmul_s = _times((Decode(layer, x_BTD[:, :1], state, T), matmul), 3 * repeats)
            prefill_s = None
            if T <= LONGEST_PREFILL:
                prefill_s, _ = _times((functools.partial(_prefill, layer, x_BTD), matmul), repeats)
            rows.append(
                {
                    "layer": name,
                    "T": T,
                    "prefill_ms": None if prefill_s is None else round(1e3 * prefill_s, 3),
                    "decode_ms": round(1e3 * decode_s, 3),
                    "matmul_1024_ms": round(1e3 * matmul_s, 3),
                    "cache_bytes": cache_bytes,
                }
            )
    return {
        "shape": {"B": 1, "width": WIDTH, "dtype": "float32"},
        "rows": rows,
        "deepseek_v3_decode": deepseek_v3(quick),
        "selection_kept": selection_kept(quick),
    }


def deepseek_v3(quick: bool) -> dict[str, Any]:
    """One decoded token a row over 32K tokens: the whole layer, projections included."""
    B, T, width = (1, 8192, 256) if quick else (2, 32768, 1024)
    dense, sparse = make(MLAConfig(**DEEPSEEK_V3), width), make(DSAConfig(**DEEPSEEK_V3, **INDEXER), width)
    x_B1D = draw(B, 1, width)

    def filled(layer):
        return jax.tree.map(lambda leaf: draw(*leaf.shape), layer.init_state(B, T, jnp.float32))

    pair = [Decode(layer, x_B1D, filled(layer), T) for layer in (dense, sparse)]
    for function in pair:
        jax.block_until_ready(function())
    seconds = [[_seconds(function) for function in pair] for _ in range(3 if quick else 9)]
    dense_s, sparse_s = (statistics.median(column) for column in zip(*seconds, strict=True))
    return {
        "B": B,
        "T": T,
        "width": width,
        "top_k": INDEXER["top_k"],
        "dense_ms": round(1e3 * dense_s, 3),
        "sparse_ms": round(1e3 * sparse_s, 3),
        "dense_over_sparse": round(statistics.median(a / b for a, b in seconds), 3),
    }


def selection_kept(quick: bool) -> dict[str, Any]:
    """Share of the float32 indexer's choice that lower precisions choose too: random heads, whose scores lie closer together
    than trained ones do, of the published sizes."""
    T, queries, H, K = (2048, 16, 64, 128) if quick else (16384, 64, 64, 128)
    top_k, tokens = T // 8, tokens_of(None, (1, T))
    last = type(tokens)(*(x[:, -queries:] for x in tokens))
    rng = np.random.default_rng(0)
    q, k, w = (
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((1, queries, H, K), (1, T, K), (1, queries, H))
    )
    pick = jax.jit(functools.partial(select, top_k=top_k), static_argnames="precision")
    exact, *others = (np.asarray(pick(q, k, w, last, tokens, precision=precision))[0] for precision in PRECISIONS)
    kept = [np.mean([len(set(a) & set(b)) / top_k for a, b in zip(exact, other, strict=True)]) for other in others]
    return {"T": T, "top_k": top_k, **{name: round(float(x), 4) for name, x in zip(PRECISIONS[1:], kept, strict=True)}}


def draw_lines(axes, rows, key: str, scale: float = 1.0) -> None:
    for name, color in zip(LAYERS, ("#1f2933", "#7b8794", "#2563a8", "#d9730d", "#3a7d44"), strict=True):
        points = [(row["T"], row[key] * scale) for row in rows if row["layer"] == name and row[key] is not None]
        axes.loglog(*zip(*points, strict=True), color=color, marker="o", markersize=3, linewidth=1.5, label=name)


def picture(result: dict[str, Any], path: Path) -> None:
    """Prefill, decoding and cache over T, one line a layer, on one page."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = (("prefill_ms", "prefill of T tokens, ms", 1.0), ("decode_ms", "one token after T, ms", 1.0),
              ("cache_bytes", "cache of a row, MiB", 2.0**-20))  # fmt: skip
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 3.4), dpi=100, layout="constrained")
        for axes, (key, title, scale) in zip(figure.subplots(1, 3), panels, strict=True):
            draw_lines(axes, result["rows"], key, scale)
            axes.set_title(title, fontsize=10, loc="left")
            axes.set_xlabel("T")
            axes.grid(color="#e4e7eb", linewidth=0.6)
            axes.set_xticks(
                ticks := sorted({row["T"] for row in result["rows"]}),
                [f"{t // 1024}K" if t >= 1024 else str(t) for t in ticks],
            )
            axes.minorticks_off()
        # Below the panels, where it covers no line.
        handles, labels = figure.axes[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
        figure.suptitle(
            f"{result['device']}, {result['cores']} cores, float32, width {result['shape']['width']}, batch 1",
            fontsize=8,
        )
        FigureCanvasAgg(figure).print_png(path)


def make(config, width: int):
    """A layer of random parameters."""
    return config.build(width, depth=1, rngs=nnx.Rngs(params=0), param_dtype=jnp.float32)


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


@jax.jit
def _prefill(layer, x_BTD):
    B, T, _ = x_BTD.shape
    return layer(x_BTD, None, Context(jnp.broadcast_to(jnp.arange(T), (B, T))))[0]


@functools.partial(jax.jit, donate_argnames="state")
def _decode(layer, x_B1D, state, cached_B):
    return layer(x_B1D, state, Context(cached_B[:, None], None, None, cached_B))[:2]


class Decode:
    """The last token of a cache of T, decoded again at each call."""

    def __init__(self, layer, x_B1D, state, length: int):
        self.layer, self.x_B1D, self.state = layer, x_B1D, state
        self.cached_B = jnp.full(x_B1D.shape[0], length - 1, jnp.int32)

    def __call__(self):
        y_B1D, self.state = _decode(self.layer, self.x_B1D, self.state, self.cached_B)
        return y_B1D, self.state


def _times(functions, repeats: int) -> list[float]:
    """Seconds of each function, taken in turn: best of three medians."""
    for function in functions:
        jax.block_until_ready(function())
    best = [float("inf")] * len(functions)
    for _ in range(3):
        rounds = [[_seconds(function) for function in functions] for _ in range(repeats)]
        best = [min(b, statistics.median(s)) for b, s in zip(best, zip(*rounds, strict=True), strict=True)]
    return best


def _seconds(function) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start
