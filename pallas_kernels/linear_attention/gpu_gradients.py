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

from pallas_kernels.hopper import tiles
from pallas_kernels.linear_attention.gpu_scan import (
    ACROSS,
    COLUMNS,
    END,
    START,
    C,
    along_rows,
    as_float,
    decays,
    lower,
    product,
    row,
    split,
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


def around(pairs, high_smem, low_smem, after_smem):
    """For every token l the sum of pairs (i, j) with i ≥ l > j; ``after_smem`` holds ones above the diagonal."""
    split(pairs, high_smem, low_smem)
    plgpu.commit_smem()
    before = product(high_smem, after_smem, (low_smem, after_smem))
    return jnp.sum(jnp.where(lower(), before, 0.0), axis=0)


def kernel(
    *refs: Any,
    s: Gradients,
    of_queries,
    x_smem,
    other_smem,
    D_smem,
    y_smem,
    barrier,
    low_smem: Any = None,
    after_smem: Any = None,
):
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
        faded = as_float(do) * s.scale if of_queries else as_float(v)
        out: Any = None
        if s.gated:
            out = of_gates[0].at[part * blocks + i % blocks, b, g * r + i // blocks, n]
            faded = faded * along_rows(row(gates, START if of_queries else END), COLUMNS)
            out.at[0][...] = jnp.sum(faded * product(x_smem, state), axis=1)
        y_smem[...] = faded.astype(jnp.bfloat16)
        D = product(do, transposed(v)) * decays(gates) * s.scale
        if with_states:
            out.at[1][...] = jnp.sum(as_float(state) * as_float(more[0]), axis=1) * row(gates, ACROSS)
            out.at[2][...] = around(D * product(x_smem, transposed(other_smem)), D_smem, low_smem, after_smem)
        D_smem[...] = D.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.wgmma(total, D_smem if of_queries else transposed(D_smem), other_smem)
        plgpu.wgmma(total, y_smem, transposed(state))
        plgpu.wgmma_wait(0)

    sum_over_heads(s, add, streamed, 2, 1 + with_states, x_smem, dx, here)


def sum_over_heads(s: Gradients, add, streamed, values: int, states: int, smem, dx, here):
    """``dx`` at ``here`` is what ``add(total, i, ...)`` sums over the blocks i of a key head's value heads, 64 columns each.

    ``streamed``: as many arrays of value columns and as many of states as told, and the gates, a block of each for every i.
    """
    n, b = jax.lax.axis_index("chunk"), jax.lax.axis_index("batch")
    parts, blocks, r = s.K // COLUMNS, s.V // COLUMNS, s.H // s.G
    g, part = jax.lax.axis_index("channels") // parts, jax.lax.axis_index("channels") % parts
    head = lambda i: g * r + i // blocks  # noqa: E731
    tiled = functools.partial(plgpu.BlockSpec, transforms=tiles())
    value = tiled((None, C, None, COLUMNS), lambda i: (b, n, head(i), i % blocks))
    state = tiled((None, None, None, COLUMNS, COLUMNS), lambda i: (n, b, head(i), part, i % blocks))
    gates = plgpu.BlockSpec((None, None, None, 5, C), lambda i: (b, head(i), n, 0, 0))
    specs = [*[value] * values, *[state] * states, *[gates] * s.gated]

    def summed(total):
        def body(indices, *streamed_smem):
            add(total, indices[0], *streamed_smem)

        plgpu.emit_pipeline(body, grid=(r * blocks,), in_specs=specs, max_concurrent_steps=2)(*streamed)
        return total[...]

    smem[...] = pl.run_scoped(summed, plgpu.ACC((C, COLUMNS), jnp.float32)).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, dx.at[here])
    plgpu.wait_smem_to_gmem(0)


def query_gradient(s: Gradients, q, k, v, do, S_NBHKV, dS_NBHKV, gates, launch) -> tuple[Any, Any]:
    """(dq, what the gates' cotangents are summed from or None): (rows, state, pairs), each [B, H, N, C]. By the delta rule ``v``
    is what was written, u."""
    inputs = [q, k, v, do, S_NBHKV, *([dS_NBHKV] if s.gated else [])]
    return _launch(s, True, inputs, gates, 3, "queries", launch)


def key_gradient(s: Gradients, q, k, v, do, dS_NBHKV, gates, launch) -> tuple[Any, Any]:
    """(dk, what the gates' cotangents are summed from or None): (ends,), [B, H, N, C]. Additive writes alone."""
    return _launch(s, False, [k, q, v, do, dS_NBHKV], gates, 1, "keys", launch)


def _launch(s, of_queries, inputs, gates, rows, name, launch):
    square = plgpu.SMEM((C, COLUMNS), jnp.bfloat16, transforms=tiles())
    scratch: dict[str, Any] = {name: square for name in ("x_smem", "other_smem", "D_smem", "y_smem")}
    scratch["barrier"] = plgpu.Barrier(num_arrivals=2)
    pieces = (s.K // COLUMNS * (s.V // COLUMNS), s.B, s.H, s.chunks, rows, C)
    dx, *of_gates = launch(
        functools.partial(kernel, s=s, of_queries=of_queries),
        [*inputs, *([gates] if s.gated else [])],
        [
            jax.ShapeDtypeStruct((s.B, s.chunks * C, s.G, s.K), jnp.bfloat16),
            *([jax.ShapeDtypeStruct(pieces, jnp.float32)] if s.gated else []),
        ],
        scratch | ({"low_smem": square, "after_smem": square} if s.gated and of_queries else {}),
        name=f"linear_attention_backward_{name}",
        grid=(s.chunks, s.G * s.K // COLUMNS, s.B),
        grid_names=("chunk", "channels", "batch"),
    )
    return dx, summed_pieces(of_gates[0]) if s.gated else None


def summed_pieces(rows):
    """Every kind of piece, [B, H, N, C], from those of every block of channels and columns."""
    rows = jnp.sum(rows, axis=0)
    return tuple(rows[..., i, :] for i in range(rows.shape[-2]))
