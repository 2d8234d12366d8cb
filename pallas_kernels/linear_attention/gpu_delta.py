"""Cotangents of k and the gates on GPU by the delta rule, every chunk on its own (Mosaic GPU, Hopper).

    D = scale · (do uᵀ) ⊙ E        W = −(dv uᵀ) ⊙ E, i > j        dk = Dᵀ q + (W + Wᵀ) k + z ⊙ (u dSᵀ) − a ⊙ (dv Sᵀ)

W is β ⊙ dA ⊙ E, A being what the chunk's solve inverts. Those of q are additive writes' with u in the place of v. A thread block
is one chunk and 64 channels of one key head, as there.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.hopper import tiles
from pallas_kernels.linear_attention.gpu_gradients import Gradients, around, sum_over_heads, summed_pieces
from pallas_kernels.linear_attention.gpu_scan import (
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
    transposed,
)

plgpu: Any = mosaic_gpu  # its types name neither what it exports nor what it takes


def kernel(*refs: Any, s: Gradients, k_smem, q_smem, D_smem, y_smem, barrier, after_smem: Any = None):
    """k, q, u, do, dv, S, dS, [gates] → dk; with gates, rows of what is to be summed for theirs.

    k_out · dk_out and k_in · dk_in of every token; for every token l, from the pairs around it.
    """
    inputs = 7 + s.gated
    k, q, *streamed = refs[:inputs]
    dk, *of_gates = refs[inputs:]
    n, b = jax.lax.axis_index("chunk"), jax.lax.axis_index("batch")
    parts, blocks, r = s.K // COLUMNS, s.V // COLUMNS, s.H // s.G
    g, part = jax.lax.axis_index("channels") // parts, jax.lax.axis_index("channels") % parts
    here = (b, pl.ds(n * C, C), g, pl.ds(part * COLUMNS, COLUMNS))
    plgpu.copy_gmem_to_smem(k.at[here], k_smem, barrier)
    plgpu.copy_gmem_to_smem(q.at[here], q_smem, barrier)
    plgpu.barrier_wait(barrier)
    if s.gated:
        # Pairs (i, j) with j < l: columns of a matrix of ones above the diagonal.
        after_smem[...] = jnp.where(lower(), 0.0, 1.0).astype(jnp.bfloat16)

    def add(total, i, u, do, dv, S, dS, gates: Any = None):
        out: Any = None
        if s.gated:
            out = of_gates[0].at[part * blocks + i % blocks, b, g * r + i // blocks, n]

        def through(state, x, which, piece):
            """total += x stateᵀ, ``x`` faded."""
            if s.gated:
                x = x * along_rows(row(gates, which), COLUMNS)
                out.at[piece][...] = jnp.sum(x * product(k_smem, state), axis=1)
            y_smem[...] = x.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.wgmma(total, y_smem, transposed(state))
            plgpu.wgmma_wait(0)

        through(dS, as_float(u), END, 0)
        through(S, -as_float(dv), START, 1)
        D_smem[...] = (product(do, transposed(u)) * decays(gates) * s.scale).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.wgmma(total, transposed(D_smem), q_smem)
        plgpu.wgmma_wait(0)
        W = -product(dv, transposed(u)) * decays(gates, strict=True)
        D_smem[...] = W.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.wgmma(total, D_smem, k_smem)
        plgpu.wgmma(total, transposed(D_smem), k_smem)
        plgpu.wgmma_wait(0)
        if s.gated:
            out.at[2][...] = around(W * product(k_smem, transposed(k_smem)), D_smem, y_smem, after_smem)

    sum_over_heads(s, add, streamed, 3, 2, k_smem, dk, here)


def key_gradient(s: Gradients, q, k, u, do, dv, S_NBHKV, dS_NBHKV, gates, launch) -> tuple[Any, Any]:
    """(dk, what the gates' cotangents are summed from or None): (ends, rows, pairs), each [B, H, N, C]."""
    square = plgpu.SMEM((C, COLUMNS), jnp.bfloat16, transforms=tiles())
    names = ("k_smem", "q_smem", "D_smem", "y_smem", *(["after_smem"] if s.gated else []))
    pieces = (s.K // COLUMNS * (s.V // COLUMNS), s.B, s.H, s.chunks, 3, C)
    dk, *of_gates = launch(
        functools.partial(kernel, s=s),
        [k, q, u, do, dv, S_NBHKV, dS_NBHKV, *([gates] if s.gated else [])],
        [
            jax.ShapeDtypeStruct((s.B, s.chunks * C, s.G, s.K), jnp.bfloat16),
            *([jax.ShapeDtypeStruct(pieces, jnp.float32)] if s.gated else []),
        ],
        {name: square for name in names} | {"barrier": plgpu.Barrier(num_arrivals=2)},
        name="linear_attention_backward_keys_delta",
        grid=(s.chunks, s.G * s.K // COLUMNS, s.B),
        grid_names=("chunk", "channels", "batch"),
    )
    return dk, summed_pieces(of_gates[0]) if s.gated else None
