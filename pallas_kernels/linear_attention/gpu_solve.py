"""The delta rule's solve inside every chunk on GPU, all chunks at once: (I + A)⁻¹ diag(β) (Mosaic GPU, Hopper).

    A_ij = β_i ⟨k_i, k_j⟩ e^{span(j, i]}  for i > j

By the ladder alone, whose products are wgmma's: X starts as the inverse of blocks of two tokens, I less what lies below the
diagonal in them; each step joins blocks in pairs, X − X (A ⊙ the block between) X. Operands are two bfloat16 parts: with one,
correlated keys would double the error of the whole rule.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.hopper import tiles
from pallas_kernels.linear_attention.gpu_scan import (
    C,
    along_columns,
    along_rows,
    as_float,
    decays,
    product,
    split,
    transposed,
)

plgpu: Any = mosaic_gpu  # its types name neither what it exports nor what it takes


def invert(A, A_high, A_low, X_high, X_low, high, low):
    """(I + ``A``)⁻¹ for A [C, C], strictly lower triangular, float32 as a wgmma's result, and blocks [C, C] to work in."""
    i, j = (plgpu.broadcasted_iota(jnp.int32, (C, C), axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))

    def between(x, s):
        """Rows of the odd, columns of the even one of two blocks of ``s`` that a step joins."""
        pair = (i & -(2 * s)) == (j & -(2 * s))
        return jnp.where(pair & ((i & s) > (j & s)), x, 0.0)

    X = jnp.where(i == j, 1.0, 0.0) - between(A, 1)
    split(A, A_high, A_low)
    s = 2
    while s < C:
        split(X, X_high, X_low)
        for whole, block in ((A_high, high), (A_low, low)):
            block[...] = between(as_float(whole), s).astype(jnp.bfloat16)
        plgpu.commit_smem()
        split(product(X_high, high, (X_high, low), (X_low, high)), high, low)
        plgpu.commit_smem()
        X = X - product(high, X_high, (low, X_high), (high, X_low))
        s *= 2
    return X


def kernel(k_gmem, beta_gmem, *refs: Any, groups, k_smem, X_smem, barrier, **scratch: Any):
    """k, β, [gates] → X: one chunk of one value head."""
    *gates_gmem, X_gmem = refs
    n, h, b = (jax.lax.axis_index(name) for name in ("chunk", "head", "batch"))
    plgpu.copy_gmem_to_smem(k_gmem.at[b, pl.ds(n * C, C), h // groups], k_smem, barrier)
    beta = beta_gmem.at[b, h, n]
    plgpu.barrier_wait(barrier)
    write = plgpu.load(beta, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    A = along_rows(write, C) * product(k_smem, transposed(k_smem))
    A = A * decays(gates_gmem[0].at[b, h, n] if gates_gmem else None, strict=True)
    X = invert(A, X_smem, **scratch)
    write = plgpu.load(beta, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    X_smem[...] = (X * along_columns(write, C)).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(X_smem, X_gmem.at[b, h, n])
    plgpu.wait_smem_to_gmem(0)


def inverse(k, beta_BHNC, gates, launch):
    """X [B, H, N, C, C], bfloat16, of keys [B, N·C, G, K]; gates as the walk has them, or None."""
    B, H, N, _ = beta_BHNC.shape
    G, K = k.shape[2:]
    square = plgpu.SMEM((C, C), jnp.bfloat16, transforms=tiles())
    names = ("X_smem", "A_low", "X_high", "X_low", "high", "low")
    scratch: dict[str, Any] = {name: square for name in names}
    scratch |= {"k_smem": plgpu.SMEM((C, K), jnp.bfloat16, transforms=tiles()), "barrier": plgpu.Barrier()}
    (X,) = launch(
        functools.partial(kernel, groups=H // G),
        [k, beta_BHNC, *([] if gates is None else [gates])],
        [jax.ShapeDtypeStruct((B, H, N, C, C), jnp.bfloat16)],
        scratch,
        name="linear_attention_inverse",
        grid=(N, H, B),
        grid_names=("chunk", "head", "batch"),
    )
    return X
