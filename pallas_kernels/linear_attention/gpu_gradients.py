"""Cotangents of q, k and the gates on GPU, every chunk on its own: the states are known (Mosaic GPU, Hopper).

    D = scale · (do vᵀ) ⊙ E        dq = D k + scale · a ⊙ (do Sᵀ)        dk = Dᵀ q + z ⊙ (v dSᵀ)

A thread block is one chunk and 64 channels of one key head; it goes through that head's value heads, 64 columns at a time,
and sums. Everything is linear in K and V, so the blocks' contributions to the gates add up.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.linear_attention.gpu_scan import (
    ACROSS,
    COLUMNS,
    END,
    START,
    C,
    along_rows,
    decays,
    lower,
    product,
    row,
    tiles,
    transposed,
)

plgpu: Any = mosaic_gpu  # its types name neither what it exports nor what it takes


class Gradients(NamedTuple):
    """What is static about a call."""

    B: int
    H: int
    G: int
    K: int
    V: int
    chunks: int
    gated: bool
    scale: float


def _float(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def _top_bits(x):
    """The bfloat16 above ``x`` towards zero, as float32: the remainder is exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def kernel(*refs: Any, s: Gradients, of_queries, x_smem, other_smem, D_smem, y_smem, barrier, after_smem: Any = None):
    """q, k, v, do, S, [dS, gates] → dq, or k, q, v, do, dS, [gates] → dk; with gates, rows of what is to be summed for theirs.

    For queries: q_in · dq_in of every token; Z S · dS in pieces; for every token l, from the pairs around it. For keys:
    k_out · dk_out of every token.
    """
    with_states = of_queries and s.gated
    inputs = 5 + with_states + s.gated
    x, other, *streamed = refs[:inputs]
    dx, *of_gates = refs[inputs:]
    n, b = jax.lax.axis_index("chunk"), jax.lax.axis_index("batch")
    parts, blocks, r = s.K // COLUMNS, s.V // COLUMNS, s.H // s.G
    g, part = jax.lax.axis_index("channels") // parts, jax.lax.axis_index("channels") % parts
    here = (b, pl.ds(n * C, C), g, pl.ds(part * COLUMNS, COLUMNS))
    plgpu.copy_gmem_to_smem(x.at[here], x_smem, barrier)
    plgpu.copy_gmem_to_smem(other.at[here], other_smem, barrier)
    plgpu.barrier_wait(barrier)
    if with_states:
        # Pairs (i, j) with j < l: columns of a matrix of ones above the diagonal.
        after_smem[...] = jnp.where(lower(), 0.0, 1.0).astype(jnp.bfloat16)

    def add(total, i, v, do, state, *more):
        gates = more[-1] if s.gated else None
        faded = _float(do) * s.scale if of_queries else _float(v)
        out: Any = None
        if s.gated:
            out = of_gates[0].at[part * blocks + i % blocks, b, g * r + i // blocks, n]
            faded = faded * along_rows(row(gates, START if of_queries else END), COLUMNS)
            out.at[0][...] = jnp.sum(faded * product(x_smem, state), axis=1)
        y_smem[...] = faded.astype(jnp.bfloat16)
        D = product(do, transposed(v)) * decays(gates) * s.scale
        if with_states:
            out.at[1][...] = jnp.sum(_float(state) * _float(more[0]), axis=1) * row(gates, ACROSS)
            pairs = D * product(x_smem, transposed(other_smem))

            def sums(acc):
                high = _top_bits(pairs)
                for bits in (high, pairs - high):
                    D_smem[...] = bits.astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    plgpu.wgmma(acc, D_smem, after_smem)
                    plgpu.wgmma_wait(0)
                return acc[...]

            before = pl.run_scoped(sums, plgpu.ACC((C, C), jnp.float32))
            out.at[2][...] = jnp.sum(jnp.where(lower(), before, 0.0), axis=0)
        D_smem[...] = D.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.wgmma(total, D_smem if of_queries else transposed(D_smem), other_smem)
        plgpu.wgmma(total, y_smem, transposed(state))
        plgpu.wgmma_wait(0)

    head = lambda i: g * r + i // blocks  # noqa: E731
    tiled = functools.partial(plgpu.BlockSpec, transforms=tiles())
    values = tiled((None, C, None, COLUMNS), lambda i: (b, n, head(i), i % blocks))
    states = tiled((None, None, None, COLUMNS, COLUMNS), lambda i: (n, b, head(i), part, i % blocks))
    gates = plgpu.BlockSpec((None, None, None, 5, C), lambda i: (b, head(i), n, 0, 0))
    specs = [values, values, states, *[states] * with_states, *[gates] * s.gated]

    def summed(total):
        def body(indices, *streamed_smem):
            add(total, indices[0], *streamed_smem)

        plgpu.emit_pipeline(body, grid=(r * blocks,), in_specs=specs, max_concurrent_steps=2)(*streamed)
        return total[...]

    x_smem[...] = pl.run_scoped(summed, plgpu.ACC((C, COLUMNS), jnp.float32)).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(x_smem, dx.at[here])
    plgpu.wait_smem_to_gmem(0)


def gradients(s: Gradients, q, k, v, do, S_NBHKV, dS_NBHKV, gates, launch) -> tuple[Any, Any, Any]:
    """(dq, dk, what the gates' cotangents are summed from or None): (rows, state, pairs, ends), each [B, H, N, C]."""
    square = plgpu.SMEM((C, COLUMNS), jnp.bfloat16, transforms=tiles())
    scratch: dict[str, Any] = {name: square for name in ("x_smem", "other_smem", "D_smem", "y_smem")}
    scratch["barrier"] = plgpu.Barrier(num_arrivals=2)
    pieces = (s.K // COLUMNS * (s.V // COLUMNS), s.B, s.H, s.chunks)
    like = jax.ShapeDtypeStruct((s.B, s.chunks * C, s.G, s.K), jnp.bfloat16)

    def run(of_queries, inputs, rows, name):
        return launch(
            functools.partial(kernel, s=s, of_queries=of_queries),
            [*inputs, *([gates] if s.gated else [])],
            [like, *([jax.ShapeDtypeStruct((*pieces, rows, C), jnp.float32)] if s.gated else [])],
            scratch | ({"after_smem": square} if s.gated and of_queries else {}),
            name=name,
            grid=(s.chunks, s.G * s.K // COLUMNS, s.B),
            grid_names=("chunk", "channels", "batch"),
        )

    inputs = [q, k, v, do, S_NBHKV, *([dS_NBHKV] if s.gated else [])]
    dq, *of_queries = run(True, inputs, 3, "linear_attention_backward_queries")
    dk, *of_keys = run(False, [k, q, v, do, dS_NBHKV], 1, "linear_attention_backward_keys")
    if not s.gated:
        return dq, dk, None
    rows = [jnp.sum(x[0], axis=0) for x in (of_queries, of_keys)]
    return dq, dk, (*(rows[0][..., i, :] for i in range(3)), rows[1][..., 0, :])
