"""The state's walk over chunks on GPU, forward or back, with the outputs of forward read on the way (Mosaic GPU, Hopper).

One walk serves additive writes and the delta rule, whose solve inside every chunk is another block that comes with it, and
gates of a token and channel, whose pairs inside every chunk are that block.

A thread block is one warpgroup: 64 value columns of one head, over one part of the sequence. The state [K, 64] stays in
registers from chunk to chunk; chunks arrive by asynchronous copies, two in flight.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.hopper import tiles

plgpu: Any = mosaic_gpu  # its types name neither what it exports nor what it takes
C = 64  # tokens a chunk: the rows of a wgmma
COLUMNS = 64  # value columns a thread block: a state of [128, 64] is what registers hold without spilling
# Rows of the gates' array.
COARSE, FINE, START, END, ACROSS = range(5)
LOG2_E = 1.4426950408889634
# e^−200 is 0 in float32 and so is every product with it: a stronger gate erases no more.
ERASE = -200.0


class Walk(NamedTuple):
    """What is static about a walk. ``keep``: chunks between states that are written out, 0 for none."""

    B: int
    H: int
    G: int
    K: int
    V: int
    parts: int
    chunks: int  # of a part
    gated: bool
    prepared: bool  # gates of a token and channel: x and r have their decays already (and a head each, G = H)
    delta: bool
    reverse: bool
    keep: int
    kept_dtype: Any
    read: bool
    out: bool  # whether what is found for every token is written out
    scale: float


def row(gates_smem, which):
    """A scalar a token, to be broadcast along the rows of a wgmma's result."""
    return plgpu.load(gates_smem.at[which], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def column(gates_smem, which):
    return plgpu.load(gates_smem.at[which], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def along_rows(x_C, width):
    return jax.lax.broadcast_in_dim(x_C, (x_C.shape[0], width), [0])


def along_columns(x_C, height):
    return jax.lax.broadcast_in_dim(x_C, (height, x_C.shape[0]), [1])


def product(x, y, *more):
    """x y, or the sum of such products of pairs, in float32; operands in shared memory."""

    def scoped(acc):
        plgpu.wgmma(acc, x, y)
        for pair in more:
            plgpu.wgmma(acc, *pair)
        return acc[...]

    return pl.run_scoped(scoped, plgpu.ACC((x.shape[0], y.shape[1]), jnp.float32))


def transposed(ref):
    return ref.transpose((1, 0))


def lower(transposed=False, strict=False):
    """i ≥ j, or i ≤ j; ``strict``: i > j, or i < j."""
    i = plgpu.broadcasted_iota(jnp.int32, (C, C), 0, layout=plgpu.Layout.WGMMA)
    j = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=plgpu.Layout.WGMMA)
    if transposed:
        i, j = j, i
    return i > j if strict else i >= j


def decays(gates_smem, transposed=False, strict=False):
    """E [C, C]: e^{span(j, i]} where i ≥ j (``strict``: i > j), 0 elsewhere; or Eᵀ. Coarse running sums are exact, so their
    differences are, too."""
    mask = lower(transposed, strict)
    if gates_smem is None:
        return jnp.where(mask, 1.0, 0.0)
    coarse = along_rows(row(gates_smem, COARSE), C) - along_columns(column(gates_smem, COARSE), C)
    fine = along_rows(row(gates_smem, FINE), C) - along_columns(column(gates_smem, FINE), C)
    span = -(coarse + fine) if transposed else coarse + fine
    return jnp.exp2(jnp.where(mask, span, -jnp.inf))


def as_float(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def top_bits(x):
    """The bfloat16 above ``x`` towards zero, as float32: the remainder is exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def split(x, high_smem, low_smem):
    """``x`` as a sum of two bfloat16."""
    high = top_bits(x)
    high_smem[...] = high.astype(jnp.bfloat16)
    low_smem[...] = (x - high).astype(jnp.bfloat16)


def walk_kernel(
    *refs: Any,
    w: Walk,
    o_smem: Any = None,
    S_smem: Any = None,
    P_smem: Any = None,
    y_smem: Any = None,
    r_smem: Any = None,
    u_smem: Any = None,
):
    """x, y, [r], [gates], [X or P], start → end, [kept], [o]: S ← Z S + xᵀ (f ⊙ y), chunk after chunk, and before it
    o = e ⊙ (r S) + P y.

    Forward, (x, y, r, o) is (k, v, q, o): P is q kᵀ ⊙ E, f fades to the chunk's end and e from its start. In reverse it is
    (q, do, k, dv): P is k qᵀ ⊙ Eᵀ, and f and e change places. A scale goes to outputs, or to what do writes. Prepared, f and
    e are 1, forward's P is given, and the gates are Z: one decay a channel.

    By the delta rule, with X = (I + A)⁻¹ diag(β): forward, u = X (v − e ⊙ (k S)) takes the place of v, and is the output where
    there is no r. In reverse what was o is du; dv = Xᵀ du is the output, and S gains −kᵀ (f ⊙ dv).
    """
    given: list[Any] = list(refs)

    def take(wanted: Any = True) -> Any:
        return given.pop(0) if wanted else None

    x_gmem, y_gmem, r_gmem = take(), take(), take(w.read)
    decayed, inside = w.gated or w.prepared, w.delta or (w.prepared and w.read)
    gates_gmem, X_gmem = take(decayed), take(inside)
    start_gmem, end_gmem, kept_gmem, o_gmem = take(), take(), take(w.keep), take(w.out)

    blocks = w.V // COLUMNS
    h = jax.lax.axis_index("columns") // blocks
    v = jax.lax.axis_index("columns") % blocks
    b, part = jax.lax.axis_index("batch"), jax.lax.axis_index("part")
    g = h // (w.H // w.G)
    columns = pl.ds(v * COLUMNS, COLUMNS)

    def chunk_of(c):
        return part * w.chunks + (w.chunks - 1 - c if w.reverse else c)

    def body(indices, *blocks_smem: Any):
        x, y, *more = blocks_smem[:-1]
        S: Any = blocks_smem[-1]
        r: Any = more.pop(0) if w.read else None
        gates: Any = more.pop(0) if decayed else None
        X: Any = more.pop(0) if inside else None
        P: Any = P_smem if not w.prepared else transposed(X) if w.reverse and w.read else X
        n = chunk_of(indices[0])
        if w.keep:

            @pl.when(n % w.keep == 0)
            def _():
                kept_gmem.at[n // w.keep, b, h, :, columns][...] = S.astype(w.kept_dtype)

        to, since = (START, END) if w.reverse else (END, START)

        def fade(x, which):
            return x * along_rows(row(gates, which), COLUMNS) if w.gated else x

        def put(smem, x):
            smem[...] = x.astype(jnp.bfloat16)

        if w.read or w.delta:
            put(S_smem, S)
        if w.read and not w.prepared:
            put(P_smem, product(r, transposed(x)) * decays(gates, w.reverse))
        o: Any = None
        if w.delta and not w.reverse:
            plgpu.commit_smem()
            put(r_smem, as_float(y) - fade(product(x, S_smem), since))
            plgpu.commit_smem()
            o = product(X, r_smem)
            put(u_smem, o)
            y = u_smem
        writes: list[Any] = [(transposed(x), y)]
        if w.gated or w.reverse:
            faded = fade(as_float(y) if o is None else o, to)
            put(y_smem, faded * w.scale if w.reverse else faded)
            writes = [(transposed(x), y_smem)]
        # Whatever of a chunk goes to registers is there before a commit: behind the last, the copy of a later one may begin.
        if w.gated:
            S = S * gates[ACROSS, 0]
        if w.prepared:
            S = S * along_rows(plgpu.load(gates, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False), COLUMNS)
        plgpu.commit_smem()
        if w.read:
            # The state's cotangent has its scale.
            o = product(r, S_smem) if w.reverse else product(r, S_smem) * w.scale
            o = fade(o, since) + product(P, y) * w.scale
        if w.delta and w.reverse:
            put(r_smem, o)
            plgpu.commit_smem()
            o = product(transposed(X), r_smem)
            put(u_smem, -fade(o, to))
            plgpu.commit_smem()
            writes.append((transposed(r), u_smem))
        if w.out:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            put(o_smem, o)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_smem, o_gmem.at[b, pl.ds(n * C, C), h, columns])
        return S + product(*writes[0], *writes[1:])

    spec = functools.partial(plgpu.BlockSpec, transforms=tiles())
    keys = spec((None, C, None, w.K), lambda c: (b, chunk_of(c), g, 0))
    in_specs = [keys, spec((None, C, None, COLUMNS), lambda c: (b, chunk_of(c), h, v))]
    inputs = [x_gmem, y_gmem]
    if w.read:
        in_specs.append(keys)
        inputs.append(r_gmem)
    if w.gated:
        in_specs.append(plgpu.BlockSpec((None, None, None, 5, C), lambda c: (b, h, chunk_of(c), 0, 0)))
    if w.prepared:
        in_specs.append(plgpu.BlockSpec((None, None, None, w.K), lambda c: (b, h, chunk_of(c), 0)))
    if decayed:
        inputs.append(gates_gmem)
    if inside:
        in_specs.append(spec((None, None, None, C, C), lambda c: (b, h, chunk_of(c), 0, 0)))
        inputs.append(X_gmem)
    start = plgpu.load(start_gmem.at[part, b, h, :, columns], layout=plgpu.Layout.WGMMA, optimized=False)
    # Inside jax.shard_map what is loaded varies over the mesh by its type, and what is computed does not.
    start = start * 1.0
    S = plgpu.emit_pipeline(body, grid=(w.chunks,), in_specs=in_specs, max_concurrent_steps=2, init_carry=start)(
        *inputs
    )
    end_gmem.at[part, b, h, :, columns][...] = S
    if w.out:
        plgpu.wait_smem_to_gmem(0)


def walk(w: Walk, x, y, r, gates, X, start_RBHKV, launch) -> tuple[Any, Any, Any]:
    """``gates``: [B, H, N, 5, C], or [B, H, N, K] across every chunk; ``X`` [B, H, N, C, C]: the delta rule's solve, or P.
    (end_RBHKV float32, kept [N / keep, B, H, K, V] or None, o or None) of one launch."""
    tokens = w.parts * w.chunks * C
    decayed, inside = w.gated or w.prepared, w.delta or (w.prepared and w.read)
    given = ((x, True), (y, True), (r, w.read), (gates, decayed), (X, inside), (start_RBHKV, True))
    inputs = [array for array, wanted in given if wanted]
    outputs = [jax.ShapeDtypeStruct((w.parts, w.B, w.H, w.K, w.V), jnp.float32)]
    square = plgpu.SMEM((C, COLUMNS), jnp.bfloat16, transforms=tiles())
    scratch: dict[str, Any] = {}
    if w.keep:
        outputs.append(jax.ShapeDtypeStruct((-(-w.parts * w.chunks // w.keep), w.B, w.H, w.K, w.V), w.kept_dtype))
    if w.out:
        outputs.append(jax.ShapeDtypeStruct((w.B, tokens, w.H, w.V), jnp.bfloat16))
        scratch["o_smem"] = square
    if w.read or w.delta:
        scratch["S_smem"] = plgpu.SMEM((w.K, COLUMNS), jnp.bfloat16, transforms=tiles())
    if w.read and not w.prepared:
        scratch["P_smem"] = square
    if w.gated or w.reverse:
        scratch["y_smem"] = square
    if w.delta:
        scratch |= {"r_smem": square, "u_smem": square}
    end, *rest = launch(
        functools.partial(walk_kernel, w=w),
        inputs,
        outputs,
        scratch,
        name="linear_attention_" + ("states" if not (w.read and w.out) else "backward" if w.reverse else "forward"),
        grid=(w.H * w.V // COLUMNS, w.B, w.parts),
        grid_names=("columns", "batch", "part"),
    )
    kept = rest.pop(0) if w.keep else None
    return end, kept, rest.pop(0) if w.out else None
