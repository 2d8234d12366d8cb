"""One gate a token, head and key channel on GPU: every chunk on its own, before the walk and behind it (Mosaic GPU, Hopper).

    P_ij = Σ_K q_i k_j e^{span(j, i]}  (i ≥ j)        q_in = q ⊙ e^{from the start}        k_out = k ⊙ e^{to the end}

The dyadic split: with blocks of s = 1, 2, 4, … 32 tokens, the pair (i, j) is served at the one s where i lies in an odd block
and j in the even block before it: the highest bit of i xor j. There e^{span(j, i]} is the product of two factors ≤ 1, one from
j to the end of its block and one from the start of i's block to i. So every token has one row a level, Y = F ⊙ (q in odd
blocks, k in even ones), and the level's pairs are those of Y Yᵀ. With E = scale · do vᵀ and D its pairs of the level,
H = F ⊙ (D + Dᵀ) Y holds what the level adds to dq, in odd blocks, and to dk, in even ones.

A span is summed as such, by a matrix of ones and zeros: gates in bits, cut in two bfloat16 pieces, are off by 2⁻¹⁷ of
themselves, and a factor is rounded to 2⁻⁹ of itself anyway. The decay across the chunk, which only the float32 state sees, is
the float32 sum.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.hopper import tiles
from pallas_kernels.linear_attention.gpu_gradients import Gradients
from pallas_kernels.linear_attention.gpu_scan import (
    COLUMNS,
    ERASE,
    LOG2_E,
    C,
    along_columns,
    along_rows,
    as_float,
    lower,
    product,
    split,
    transposed,
)

plgpu: Any = mosaic_gpu  # its types name neither what it exports nor what it takes
_LEVELS = C.bit_length() - 1


def _load(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA)


def _iota(axis):
    return plgpu.broadcasted_iota(jnp.int32, (C, C), axis, layout=plgpu.Layout.WGMMA)


class _Masks:
    """Of one level, blocks of ``s`` tokens."""

    def __init__(self, s):
        # s >> 8 is 0. What depends on s is computed within the loop over levels, not kept in registers all along it.
        self.s, self.i, self.l = s, _iota(0) + (s >> 8), _iota(1) + (s >> 8)

    def odd(self):
        """Rows of odd blocks, where a factor fades from the block's start; in even ones it fades to the end."""
        return (self.i & self.s) != 0

    def inside(self):
        """[i, l]: gate l lies in token i's span of the level: l ≤ i in an odd block, l > i in an even one."""
        within = jnp.where((self.i & self.s) != 0, self.i - self.l, self.l - self.i - 1)
        return jnp.where((self.i ^ self.l) < self.s, within, -1) >= 0

    def pairs(self):
        """i and j that the level serves."""
        return ((self.i ^ self.l) & -self.s) == self.s


def _factors(mask, span_smem, high_smem, low_smem):
    """e^{sum of the gates in the mask's row}, [C, COLUMNS]. The mask stays in ``span_smem``."""
    span_smem[...] = jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()
    return jnp.exp2(product(span_smem, high_smem, (span_smem, low_smem)))


def _bits(g_smem):
    return jnp.maximum(_load(g_smem), ERASE) * LOG2_E


def _send(x, smem, to_gmem):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem[...] = x.astype(smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, to_gmem)


def _levels(body, *carry):
    """body(s, carry) → carry, for s = 1, 2, 4, …"""

    def level(_, carry):
        s, *rest = carry
        return s * 2, *body(s, rest)

    return jax.lax.fori_loop(0, _LEVELS, level, (jnp.int32(1), *carry))[1:]


def prepare_kernel(q, k, g, q_in, k_out, P, across, *, s: Gradients, g_smem, P_smem, barrier, **smem: Any):
    """A thread block is one chunk of one value head; it goes through the channels, 64 at a time, and sums P."""
    n, h, b = jax.lax.axis_index("chunk"), jax.lax.axis_index("head"), jax.lax.axis_index("batch")
    tokens, group = pl.ds(n * C, C), h // (s.H // s.G)
    q_smem, k_smem, Y_smem, out_smem = (smem[f"{name}_smem"] for name in ("q", "k", "Y", "out"))
    span_smem, pieces = smem["span_smem"], (smem["high_smem"], smem["low_smem"])

    def of_channels(part, _):
        channels = pl.ds(part * COLUMNS, COLUMNS)
        for x, x_smem, head in ((q, q_smem, group), (k, k_smem, group), (g, g_smem, h)):
            plgpu.copy_gmem_to_smem(x.at[b, tokens, head, channels], x_smem, barrier)
        plgpu.barrier_wait(barrier)
        bits = _bits(g_smem)
        across.at[b, h, n, channels][...] = jnp.exp2(jnp.sum(bits, axis=0))
        split(bits, *pieces)
        since = _factors(lower(), span_smem, *pieces)
        _send(as_float(q_smem) * since, out_smem, q_in.at[b, tokens, h, channels])
        to = _factors(jnp.logical_not(lower()), span_smem, *pieces)
        _send(as_float(k_smem) * to, out_smem, k_out.at[b, tokens, h, channels])

        def add(mask, pairs):
            P_smem[...] = _load(P_smem) + jnp.where(mask, pairs, 0.0)

        def level(s, _):
            masks = _Masks(s)
            F = _factors(masks.inside(), span_smem, *pieces)
            Y_smem[...] = (F * jnp.where(masks.odd(), as_float(q_smem), as_float(k_smem))).astype(jnp.bfloat16)
            plgpu.commit_smem()
            add(masks.pairs(), product(Y_smem, transposed(Y_smem)))
            return ()

        add(_iota(0) == _iota(1), product(q_smem, transposed(k_smem)))
        _levels(level)

    P_smem[...] = plgpu.layout_cast(jnp.zeros((C, C), jnp.float32), plgpu.Layout.WGMMA)
    jax.lax.fori_loop(0, s.K // COLUMNS, of_channels, None)
    _send(jnp.where(lower(), _load(P_smem), 0.0), out_smem, P.at[b, h, n])
    plgpu.wait_smem_to_gmem(0)


def between_kernel(v, do, S, dS, across, dq_in, dk_out, of_state, E, *, s: Gradients, dq_smem, dk_smem, E_smem):
    """A thread block is 64 channels of one chunk of one value head; it goes through the value columns, 64 at a time."""
    n, b, h, part, channels = _place(s)

    def summed(reads, writes, states, pairs):
        def body(_, v, do, S, dS):
            plgpu.wgmma(reads, do, transposed(S))
            plgpu.wgmma(writes, v, transposed(dS))
            plgpu.wgmma(states, S, transposed(dS))
            plgpu.wgmma(pairs, do, transposed(v))
            plgpu.wgmma_wait(0)

        tiled = functools.partial(plgpu.BlockSpec, transforms=tiles())
        values = tiled((None, C, None, COLUMNS), lambda i: (b, n, h, i))
        of_states = tiled((None, None, None, COLUMNS, COLUMNS), lambda i: (n, b, h, part, i))
        specs = [values, values, of_states, of_states]
        plgpu.emit_pipeline(body, grid=(s.V // COLUMNS,), in_specs=specs, max_concurrent_steps=2)(v, do, S, dS)
        dq_smem[...] = (reads[...] * s.scale).astype(jnp.bfloat16)
        dk_smem[...] = writes[...].astype(jnp.bfloat16)
        E_smem[...] = jnp.where(lower(), pairs[...] * s.scale, 0.0).astype(jnp.bfloat16)
        # S · dS of every channel: the diagonal of their product, where a column is a channel.
        crossed = jnp.sum(jnp.where(_iota(0) == _iota(1), states[...], 0.0), axis=0)
        decay = plgpu.load(across.at[b, h, n, channels], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        of_state.at[b, h, n, channels][...] = decay * crossed

    pl.run_scoped(summed, *[plgpu.ACC((C, COLUMNS), jnp.float32)] * 4)
    plgpu.commit_smem()
    here = (b, pl.ds(n * C, C), h, channels)
    plgpu.copy_smem_to_gmem(dq_smem, dq_in.at[here])
    plgpu.copy_smem_to_gmem(dk_smem, dk_out.at[here])

    @pl.when(part == 0)
    def _():
        plgpu.copy_smem_to_gmem(E_smem, E.at[b, h, n])

    plgpu.wait_smem_to_gmem(0)


def within_kernel(
    q, k, g, dq_in, dk_out, of_state, E, dq, dk, dg, *, s: Gradients, g_smem, dg_smem, barrier, **smem: Any
):
    """A thread block is 64 channels of one chunk of one value head; it goes through the levels.

    Registers hold the sum of dk. dq is summed where the gates were.
    """
    n, b, h, _, channels = _place(s)
    here, of_group = (b, pl.ds(n * C, C), h, channels), (b, pl.ds(n * C, C), h // (s.H // s.G), channels)
    q_smem, k_smem, E_smem, Y_smem, D_smem = (smem[f"{name}_smem"] for name in ("q", "k", "E", "Y", "D"))
    span_smem, pieces = smem["span_smem"], (smem["high_smem"], smem["low_smem"])
    for x, x_smem in (
        (q.at[of_group], q_smem),
        (k.at[of_group], k_smem),
        (g.at[here], g_smem),
        (dq_in.at[here], smem["dq_smem"]),
        (dk_out.at[here], smem["dk_smem"]),
        (E.at[b, h, n], E_smem),
    ):
        plgpu.copy_gmem_to_smem(x, x_smem, barrier)
    plgpu.barrier_wait(barrier)
    split(_bits(g_smem), *pieces)

    def gather(d, first=False):
        """To every gate of a span (its mask lies in ``span_smem``) the span's cotangent."""
        plgpu.commit_smem()
        split(d, Y_smem, D_smem)
        plgpu.commit_smem()
        of_gates = product(transposed(span_smem), Y_smem, (transposed(span_smem), D_smem))
        dg_smem[...] = of_gates if first else _load(dg_smem) + of_gates
        plgpu.commit_smem()  # all warps have read what comes to be written over

    H = _factors(lower(), span_smem, *pieces) * as_float(smem["dq_smem"])
    crossed = plgpu.load(of_state.at[b, h, n, channels], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    gather(H * as_float(q_smem) + jnp.where(_iota(0) == C - 1, along_columns(crossed, C), 0.0), first=True)
    g_smem[...] = H
    H = _factors(jnp.logical_not(lower()), span_smem, *pieces) * as_float(smem["dk_smem"])
    gather(H * as_float(k_smem))

    def level(s, carry):
        masks = _Masks(s)
        F = _factors(masks.inside(), span_smem, *pieces)
        row = lambda: jnp.where(masks.odd(), as_float(q_smem), as_float(k_smem))  # noqa: E731
        Y_smem[...] = (F * row()).astype(jnp.bfloat16)
        D_smem[...] = jnp.where(masks.pairs(), as_float(E_smem), 0.0).astype(jnp.bfloat16)
        plgpu.commit_smem()
        H = F * product(D_smem, Y_smem, (transposed(D_smem), Y_smem))
        g_smem[...] = _load(g_smem) + jnp.where(masks.odd(), H, 0.0)
        dk_sum = carry[0] + jnp.where(masks.odd(), 0.0, H)
        gather(H * row())
        return (dk_sum,)

    (dk_sum,) = _levels(level, H)
    diagonal = jnp.sum(jnp.where(_iota(0) == _iota(1), as_float(E_smem), 0.0), axis=1)
    staged = (Y_smem, D_smem) if dq.dtype == jnp.bfloat16 else (g_smem, g_smem)
    _send(_load(g_smem) + along_rows(diagonal, COLUMNS) * as_float(k_smem), staged[0], dq.at[here])
    _send(dk_sum + along_rows(diagonal, COLUMNS) * as_float(q_smem), staged[1], dk.at[here])
    plgpu.copy_smem_to_gmem(dg_smem, dg.at[here])
    plgpu.wait_smem_to_gmem(0)


def _place(s):
    """(chunk, batch row, value head, which 64 channels, those) of a thread block."""
    parts = s.K // COLUMNS
    h, part = jax.lax.axis_index("channels") // parts, jax.lax.axis_index("channels") % parts
    chunk, row = jax.lax.axis_index("chunk"), jax.lax.axis_index("batch")
    return chunk, row, h, part, pl.ds(part * COLUMNS, COLUMNS)


def _tile(dtype=jnp.bfloat16):
    """[C, COLUMNS] in shared memory, rows of 128 bytes."""
    transforms = (plgpu.TilingTransform((8, 128 // dtype(0).itemsize)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((C, COLUMNS), dtype, transforms=transforms)


def prepare(s: Gradients, q, k, g, launch) -> tuple[Any, Any, Any, Any]:
    """q_in, k_out [B, T, H, K], the decay across every chunk [B, H, N, K] float32, and P [B, H, N, C, C]."""
    tokens = s.chunks * C
    like = jax.ShapeDtypeStruct((s.B, tokens, s.H, s.K), jnp.bfloat16)
    names, floats = ("q", "k", "high", "low", "span", "Y", "out"), ("g", "P")
    scratch = {f"{name}_smem": _tile(jnp.float32 if name in floats else jnp.bfloat16) for name in names + floats}
    q_in, k_out, P, across = launch(
        functools.partial(prepare_kernel, s=s),
        [q, k, g],
        [
            like,
            like,
            jax.ShapeDtypeStruct((s.B, s.H, s.chunks, C, C), jnp.bfloat16),
            jax.ShapeDtypeStruct((s.B, s.H, s.chunks, s.K), jnp.float32),
        ],
        scratch | {"barrier": plgpu.Barrier(num_arrivals=3)},
        name="linear_attention_channels",
        grid=(s.chunks, s.H, s.B),
        grid_names=("chunk", "head", "batch"),
    )
    return q_in, k_out, across, P


def between_chunks(s: Gradients, v, do, S_NBHKV, dS_NBHKV, across, launch) -> tuple[Any, ...]:
    """(dq_in, dk_out [B, T, H, K], what every chunk's decay gathers from the state [B, H, N, K] float32, E [B, H, N, C, C])."""
    like = jax.ShapeDtypeStruct((s.B, s.chunks * C, s.H, s.K), jnp.bfloat16)
    pairs = jax.ShapeDtypeStruct((s.B, s.H, s.chunks, C, C), jnp.bfloat16)
    return launch(
        functools.partial(between_kernel, s=s),
        [v, do, S_NBHKV, dS_NBHKV, across],
        [like, like, jax.ShapeDtypeStruct(across.shape, jnp.float32), pairs],
        {"dq_smem": _tile(), "dk_smem": _tile(), "E_smem": _tile()},
        name="linear_attention_backward_chunks",
        grid=(s.chunks, s.H * s.K // COLUMNS, s.B),
        grid_names=("chunk", "channels", "batch"),
    )


def within_chunks(s: Gradients, q, k, g, of_chunks, launch) -> tuple[Any, Any, Any]:
    """(dq, dk [B, T, G, K], dg [B, T, H, K] float32), given what ``between_chunks`` returns. Every value head adds its own to
    dq and dk."""
    shape, r = (s.B, s.chunks * C, s.H, s.K), s.H // s.G
    like = jax.ShapeDtypeStruct(shape, jnp.bfloat16 if r == 1 else jnp.float32)
    names, floats = ("q", "k", "dq", "dk", "E", "high", "low", "span", "Y", "D"), ("g", "dg")
    scratch = {f"{name}_smem": _tile(jnp.float32 if name in floats else jnp.bfloat16) for name in names + floats}
    dq, dk, dg = launch(
        functools.partial(within_kernel, s=s),
        [q, k, g, *of_chunks],
        [like, like, jax.ShapeDtypeStruct(shape, jnp.float32)],
        scratch | {"barrier": plgpu.Barrier(num_arrivals=6)},
        name="linear_attention_backward_channels",
        grid=(s.chunks, s.H * s.K // COLUMNS, s.B),
        grid_names=("chunk", "channels", "batch"),
    )
    if r > 1:
        dq, dk = (jnp.sum(x.reshape(s.B, -1, s.G, r, s.K), axis=3).astype(jnp.bfloat16) for x in (dq, dk))
    return dq, dk, dg
