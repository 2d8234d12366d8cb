"""One matrix product per group of rows: the arithmetic of sparsely routed experts.

Rows of ``x_MK`` come sorted by group, ``group_sizes_E[e]`` of them for expert e, and each group meets its own
``w_EKN[e]``. The XLA form costs what M rows cost, not what all experts would (``jax.lax.ragged_dot`` is expanded to a dense
product over every expert on CPU and CUDA). Where no group needs more than an equal share with some slack, groups get
equal shares, and it is one batched product over experts. Otherwise rows are cut into tiles that never straddle two
groups: on CPU a loop over the tiles there are, each reading its matrix where it lies; elsewhere one batched product over
as many tiles as any load needs. Axes besides the glossary's: P padded rows, I tiles, C rows of one tile.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import tpu
from research.axes import Array, Float, Int

IMPLEMENTATIONS = ("looped", "tiled", "ragged_dot", "dense", "pallas_tpu", "pallas_tpu_interpret")
_MISSING = ("pallas_gpu", "pallas_gpu_interpret")


def tile_rows(rows: int, groups: int) -> int:
    """Rows of one tile: the power of two nearest 3·√(mean group), in [8, 256].

    `aligned_rows` has room for nearly a tile more than the mean in every group: three standard deviations of a random
    load, so that equal shares usually do.
    """
    return int(min(256, max(8, 2 ** round(np.log2(3 * max(rows / max(groups, 1), 1) ** 0.5)))))


def aligned_rows(rows: int, groups: int, alignment: int) -> int:
    """Rows enough for `rows` rows in `groups` groups under any load, each group padded to a multiple of `alignment`.

    Where a group is likely to have rows at all, groups × an equal share, so that `padded_sizes` may deal them evenly.
    """
    worst = (rows + min(groups, rows) * (alignment - 1)) // alignment * alignment
    if rows < 4 * groups:
        return worst
    step = alignment // math.gcd(groups, alignment)
    step = math.lcm(step, 8)
    return groups * (-(-worst // (groups * step)) * step)


def padded_sizes(counts_E: Int[Array, "E"], rows: int, alignment: int) -> Int[Array, "E"]:
    """Rows to give each group out of `aligned_rows`: equal shares if they are enough for all, else padded counts."""
    groups = counts_E.shape[0]
    padded_E = -(-counts_E // alignment) * alignment
    if rows % groups:
        return padded_E
    return jnp.where((counts_E <= rows // groups).all(), rows // groups, padded_E)


def grouped_matmul(
    x_MK: Float[Array, "M K"],
    w_EKN: Float[Array, "E K N"],
    group_sizes_E: Int[Array, "E"],
    *,
    alignment: int = 1,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """y[m] = x[m] @ w[e] for the expert e whose group holds row m.

    Args:
      x_MK: rows sorted by group.
      w_EKN: one matrix per group; taken in x's dtype.
      group_sizes_E: rows of each group, sum ≤ M. Rows past the sum are ignored (NaN included): they come out zero and
        have zero gradient.
      alignment: above 1 a promise that M is a multiple of it, and that the group sizes are as well or are all M / E
        (see `padded_sizes`). Nothing is gathered then: equal groups are one batched product over experts, others one
        over tiles of that many rows. What breaks the promise is undefined.
      implementation: 'looped' (a loop over tiles; CPU's), 'tiled' (all tiles at once; CUDA's), 'ragged_dot' (XLA's own), 'dense'
        (every row against every expert: the definition), each for any platform; 'pallas_tpu' (TPU's where it serves the
        dtype and the widths) and 'pallas_tpu_interpret'; or None: chosen per platform when lowered.

    Returns:
      y_MN in x's dtype, accumulated in float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes that don't fit, or an unknown implementation.
      NotImplementedError: a named kernel that can't serve the call.
    """
    rows, width = x_MK.shape
    if w_EKN.shape[1] != width:
        raise ValueError(f"w_EKN has K = {w_EKN.shape[1]}, it must equal x_MK's K = {width}")
    if group_sizes_E.shape[0] != w_EKN.shape[0]:
        raise ValueError(f"group_sizes_E has {group_sizes_E.shape[0]} groups, w_EKN has {w_EKN.shape[0]} experts")
    if alignment < 1 or rows % alignment:
        raise ValueError(f"alignment is {alignment}, it must be positive and divide x_MK's {rows} rows")
    check_implementation(implementation)
    if x_MK.size == 0 or w_EKN.size == 0:
        return jnp.zeros((rows, w_EKN.shape[2]), x_MK.dtype)
    # The cast stands outside the custom_vjp, so that the gradient of w is accumulated in x's dtype and cast once.
    return _grouped_matmul(x_MK, w_EKN.astype(x_MK.dtype), group_sizes_E.astype(jnp.int32), alignment, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped_matmul(x_MK, w_EKN, sizes_E, alignment, implementation):
    return _choose("product", alignment, implementation)(x_MK, w_EKN, sizes_E)


def _forward(x_MK, w_EKN, sizes_E, alignment, implementation):
    return _grouped_matmul(x_MK, w_EKN, sizes_E, alignment, implementation), (x_MK, w_EKN, sizes_E)


def _backward(alignment, implementation, residuals, dy_MN):
    x_MK, w_EKN, sizes_E = residuals
    # dx is the grouped product with transposed matrices; dw is one outer product over the rows of each group.
    dx_MK = _choose("transposed", alignment, implementation)(dy_MN, w_EKN, sizes_E)
    dw_EKN = _choose("outer", alignment, implementation)(x_MK, dy_MN, sizes_E)
    return dx_MK, dw_EKN, np.zeros(sizes_E.shape, jax.dtypes.float0)


_grouped_matmul.defvjp(_forward, _backward)


def _choose(leg, alignment, implementation, clean=False):
    bound = {name: functools.partial(_LEGS[name, leg], alignment=alignment, clean=clean) for name in IMPLEMENTATIONS}
    if implementation is not None:
        return bound[implementation]

    def by_platform(a, b, sizes_E):
        # XLA has a real grouped matmul on TPU only (elsewhere it expands ragged_dot to all experts), and on TPU the kernel
        # beats it and megablox in every leg: benchmarks/kernels.md.
        own = "ragged_dot" if tpu.refuses(a, b) else "pallas_tpu"
        forms = {"tpu": bound[own], "cpu": bound["looped"], "default": bound["tiled"]}
        return jax.lax.platform_dependent(a, b, sizes_E, **forms)

    return by_platform


def clean_leg(
    leg: str, a: Array, b: Array, sizes_E: Int[Array, "E"], *, alignment: int, implementation: str | None = None
) -> Array:
    """One leg of the product where rows past the sum are known to be zero, for callers with a custom_vjp of their own.

    leg: 'product' (x_MK, w_EKN) -> y_MN, 'transposed' (dy_MN, w_EKN) -> dx_MK or 'outer' (x_MK, dy_MN) -> dw_EKN. Not
    differentiable by itself. It spares the pass over memory that hides foreign rows.
    """
    check_implementation(implementation)
    return _choose(leg, alignment, implementation, clean=True)(a, b, sizes_E)


def check_implementation(implementation: str | None) -> None:
    if implementation in _MISSING:
        raise NotImplementedError(f"implementation {implementation!r}: grouped_matmul has no GPU kernel")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}, it must be None or one of {IMPLEMENTATIONS + _MISSING}"
        )


def _accumulator(*arrays):
    return functools.reduce(jnp.promote_types, [a.dtype for a in arrays], jnp.float32)


def _einsum(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=_accumulator(a, b)).astype(a.dtype)


_SPECS = {"product": "ick,ikn->icn", "transposed": "icn,ikn->ick"}


# --- tiled and looped -----------------------------------------------------------------------------------------------


def _unless_even(even, uneven):
    """A leg over any sizes from one over equal ones."""

    def leg(a, b, sizes_E):
        if a.shape[0] % sizes_E.shape[0]:
            return uneven(a, b, sizes_E)
        same = (sizes_E == a.shape[0] // sizes_E.shape[0]).all()
        return jax.lax.cond(same, even, uneven, a, b, sizes_E)

    return leg


def _packed(leg, a, b, sizes_E, padded_E, *, room, pack):
    """`leg` over rows gathered so that group e has padded_E[e] of `room`; pack says which of the operands are rows."""
    rows, groups = a.shape[0], sizes_E.shape[0]
    expert_M = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(rows), side="right", method="compare_all")
    shift_E = (jnp.cumsum(padded_E) - padded_E) - (jnp.cumsum(sizes_E) - sizes_E)
    row_M = jnp.arange(rows, dtype=jnp.int32)
    slot_M = jnp.where(expert_M < groups, row_M + shift_E[jnp.minimum(expert_M, groups - 1)], room)
    row_P = jnp.full(room, rows, jnp.int32).at[slot_M].set(row_M, mode="drop", unique_indices=True)
    a, b = (
        x.at[row_P].get(mode="fill", fill_value=0) if is_rows else x for x, is_rows in zip((a, b), pack, strict=True)
    )
    result = leg(a, b, padded_E)
    return result if all(pack) else result.at[slot_M].get(mode="fill", fill_value=0)


def _tiled(even, tiles, pack):
    """A leg over any rows, from one over groups of equal size and one over groups that start on tiles."""

    def leg(a, b, sizes_E, *, alignment, clean):
        if alignment > 1:
            return _unless_even(even, functools.partial(tiles, alignment=alignment, clean=clean))(a, b, sizes_E)

        def padded(a, b, sizes_E):
            tile = tile_rows(a.shape[0], sizes_E.shape[0])
            room = aligned_rows(a.shape[0], sizes_E.shape[0], tile)
            inside = _unless_even(even, functools.partial(tiles, alignment=tile, clean=True))
            return _packed(inside, a, b, sizes_E, padded_sizes(sizes_E, room, tile), room=room, pack=pack)

        return _unless_even(even, padded)(a, b, sizes_E)

    return leg


def _looped(even, loop, pack):
    """A leg over any rows, from one over groups of equal size and one over any."""

    def shared(a, b, sizes_E):
        """Equal shares with three standard deviations of a random load to spare, where they are enough."""
        groups, mean = sizes_E.shape[0], a.shape[0] / sizes_E.shape[0]
        if mean < 8:
            return loop(a, b, sizes_E)
        share = -(-math.ceil(mean + 3 * mean**0.5) // 8) * 8
        padded_E = jnp.full(groups, share, jnp.int32)
        pad = functools.partial(_packed, even, padded_E=padded_E, room=groups * share, pack=pack)
        return jax.lax.cond((sizes_E <= share).all(), pad, loop, a, b, sizes_E)

    def leg(a, b, sizes_E, *, alignment, clean):
        return _unless_even(even, loop if alignment > 1 else shared)(a, b, sizes_E)

    return leg


def _blocks(sizes_E, rows):
    """(rows of a block, how many there are, expert of each, its first row, the row after its last)."""
    groups = sizes_E.shape[0]
    # A product of few rows is slow, and half a block a group is wasted.
    block = min(rows, max(16, tile_rows(rows, groups)))
    blocks_E = -(-sizes_E // block)
    ends_E, index_I = jnp.cumsum(blocks_E), jnp.arange(rows // block + min(groups, rows), dtype=jnp.int32)
    expert_I = jnp.searchsorted(ends_E, index_I, side="right", method="compare_all")
    expert_I = jnp.minimum(expert_I, groups - 1).astype(jnp.int32)
    stops_E = jnp.cumsum(sizes_E)
    starts_I = (stops_E - sizes_E)[expert_I] + (index_I - (ends_E - blocks_E)[expert_I]) * block
    return block, ends_E[-1], expert_I, starts_I, jnp.minimum(starts_I + block, stops_E[expert_I])


def _cut(x, start, stop, block):
    """(first row read, whether each of the block's rows is in [start, stop), the rows)."""
    first = jnp.minimum(start, x.shape[0] - block)
    row_C1 = first + jnp.arange(block, dtype=jnp.int32)[:, None]
    return first, (row_C1 >= start) & (row_C1 < stop), jax.lax.dynamic_slice_in_dim(x, first, block)


def _loop_product(x_MK, w_EKN, sizes_E, *, spec):
    block, count, expert_I, start_I, stop_I = _blocks(sizes_E, x_MK.shape[0])
    width = w_EKN.shape[2 if spec == _SPECS["product"] else 1]

    def step(i, y_MN):
        first, own_C1, x_CK = _cut(x_MK, start_I[i], stop_I[i], block)
        w_1KN = jax.lax.dynamic_slice_in_dim(w_EKN, expert_I[i], 1)
        new_CN = _einsum(spec, x_CK[None], w_1KN)[0]
        old_CN = jax.lax.dynamic_slice_in_dim(y_MN, first, block)
        return jax.lax.dynamic_update_slice_in_dim(y_MN, jnp.where(own_C1, new_CN, old_CN), first, 0)

    return jax.lax.fori_loop(0, count, step, jnp.zeros((x_MK.shape[0], width), x_MK.dtype))


def _loop_outer(x_MK, dy_MN, sizes_E):
    block, count, expert_I, start_I, stop_I = _blocks(sizes_E, x_MK.shape[0])

    def step(i, dw_EKN):
        (_, own_C1, x_CK), (_, _, dy_CN) = (_cut(a, start_I[i], stop_I[i], block) for a in (x_MK, dy_MN))
        new_KN = _block_outer(jnp.where(own_C1, x_CK, 0), jnp.where(own_C1, dy_CN, 0), block)
        old_1KN = jax.lax.dynamic_slice_in_dim(dw_EKN, expert_I[i], 1)
        return jax.lax.dynamic_update_slice_in_dim(dw_EKN, old_1KN + new_KN, expert_I[i], 0)

    zeros_EKN = jnp.zeros((sizes_E.shape[0], x_MK.shape[1], dy_MN.shape[1]), _accumulator(x_MK, dy_MN))
    return jax.lax.fori_loop(0, count, step, zeros_EKN).astype(x_MK.dtype)


def _tile_experts(sizes_E, tile, tiles):
    """Expert of each tile; E past the last group."""
    ends_E = jnp.cumsum(sizes_E // tile)
    return jnp.searchsorted(ends_E, jnp.arange(tiles), side="right", method="compare_all").astype(jnp.int32)


def _even_product(x_MK, w_EKN, sizes_E, *, spec):
    return _einsum(spec, x_MK.reshape(sizes_E.shape[0], -1, x_MK.shape[1]), w_EKN).reshape(x_MK.shape[0], -1)


def _tile_product(x_PK, w_EKN, sizes_E, alignment, clean, *, spec):
    rows, groups = x_PK.shape[0], sizes_E.shape[0]
    expert_I = _tile_experts(sizes_E, alignment, rows // alignment)
    y_ICN = _einsum(spec, x_PK.reshape(-1, alignment, x_PK.shape[1]), w_EKN[jnp.minimum(expert_I, groups - 1)])
    if not clean:
        y_ICN = jnp.where((expert_I < groups)[:, None, None], y_ICN, 0)
    return y_ICN.reshape(rows, -1)


def _block_outer(x_MK, dy_MN, rows):
    """One outer product per block of rows."""
    x_ICK, dy_ICN = (a.reshape(-1, rows, a.shape[1]) for a in (x_MK, dy_MN))
    outer = functools.partial(jnp.einsum, "ica,icb->iab", preferred_element_type=_accumulator(x_MK, dy_MN))
    # XLA on CPU transposes the first operand in memory: let it be the narrower one.
    return outer(x_ICK, dy_ICN) if x_MK.shape[1] <= dy_MN.shape[1] else outer(dy_ICN, x_ICK).swapaxes(1, 2)


def _even_outer(x_MK, dy_MN, sizes_E):
    return _block_outer(x_MK, dy_MN, x_MK.shape[0] // sizes_E.shape[0]).astype(x_MK.dtype)


def _tile_outer(x_PK, dy_PN, sizes_E, alignment, clean):
    expert_I = _tile_experts(sizes_E, alignment, x_PK.shape[0] // alignment)
    dw_IKN = _block_outer(x_PK, dy_PN, alignment)
    # Tiles past the last group have id E: dropped, NaN included.
    return jax.ops.segment_sum(dw_IKN, expert_I, sizes_E.shape[0], indices_are_sorted=True).astype(x_PK.dtype)


# --- ragged_dot -----------------------------------------------------------------------------------------------------


def _live(x_MK, sizes_E, clean=False):
    if clean:
        return x_MK
    return jnp.where((jnp.arange(x_MK.shape[0]) < sizes_E.sum())[:, None], x_MK, 0)


@jax.custom_batching.sequential_vmap  # ragged_dot's own batching refuses an operand without the batch axis
def _ragged_dot(x_MK, w_EKN, sizes_E):
    return jax.lax.ragged_dot(x_MK, w_EKN, sizes_E, preferred_element_type=_accumulator(x_MK)).astype(x_MK.dtype)


@jax.custom_batching.sequential_vmap
def _ragged_dot_over_rows(x_MK, dy_MN, sizes_E):
    over_rows = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    kind = _accumulator(x_MK, dy_MN)
    return jax.lax.ragged_dot_general(x_MK, dy_MN, sizes_E, over_rows, preferred_element_type=kind).astype(x_MK.dtype)


def _ragged_product(x_MK, w_EKN, sizes_E, *, alignment, clean):
    return _live(_ragged_dot(_live(x_MK, sizes_E, clean), w_EKN, sizes_E), sizes_E)


def _ragged_outer(x_MK, dy_MN, sizes_E, *, alignment, clean):
    return _ragged_dot_over_rows(_live(x_MK, sizes_E, clean), _live(dy_MN, sizes_E, clean), sizes_E)


# --- the TPU kernel -------------------------------------------------------------------------------------------------


def _kernel(function, **options):
    """A leg from a kernel: over a batch, one call after another."""
    call = jax.custom_batching.sequential_vmap(functools.partial(function, **options))

    def leg(a, b, sizes_E, *, alignment, clean):
        why = tpu.refuses(a, b)
        if why:
            raise NotImplementedError(f"grouped_matmul's TPU kernel cannot serve this call: {why}")
        return call(a, b, sizes_E)

    return leg


# --- dense ----------------------------------------------------------------------------------------------------------


def _member(sizes_E, rows, dtype):
    ends_E = jnp.cumsum(sizes_E)
    row_M = jnp.arange(rows)[:, None]
    return ((row_M < ends_E) & (row_M >= ends_E - sizes_E)).astype(dtype)


def _dense_product(x_MK, w_EKN, sizes_E, *, alignment, clean):
    member_ME = _member(sizes_E, x_MK.shape[0], _accumulator(x_MK))
    every_MEN = jnp.einsum("mk,ekn->men", _live(x_MK, sizes_E, clean), w_EKN, preferred_element_type=_accumulator(x_MK))
    return jnp.einsum("men,me->mn", every_MEN, member_ME).astype(x_MK.dtype)


def _dense_outer(x_MK, dy_MN, sizes_E, *, alignment, clean):
    member_ME = _member(sizes_E, x_MK.shape[0], _accumulator(x_MK))
    x_MEK = jnp.einsum("mk,me->mek", _live(x_MK, sizes_E, clean), member_ME)
    return jnp.einsum("mek,mn->ekn", x_MEK, _live(dy_MN, sizes_E, clean)).astype(x_MK.dtype)


def _transposed(product):
    return lambda dy_MN, w_EKN, sizes_E, **options: product(dy_MN, w_EKN.swapaxes(1, 2), sizes_E, **options)


_EVEN = {name: functools.partial(_even_product, spec=spec) for name, spec in _SPECS.items()} | {"outer": _even_outer}
_TILES = {name: functools.partial(_tile_product, spec=spec) for name, spec in _SPECS.items()} | {"outer": _tile_outer}
_LOOPS = {name: functools.partial(_loop_product, spec=spec) for name, spec in _SPECS.items()} | {"outer": _loop_outer}
_PACK = {"product": (True, False), "transposed": (True, False), "outer": (True, True)}
_LEGS = {
    **{("looped", leg): _looped(_EVEN[leg], _LOOPS[leg], _PACK[leg]) for leg in _PACK},
    **{("tiled", leg): _tiled(_EVEN[leg], _TILES[leg], _PACK[leg]) for leg in _PACK},
    ("ragged_dot", "product"): _ragged_product,
    ("ragged_dot", "transposed"): _transposed(_ragged_product),
    ("ragged_dot", "outer"): _ragged_outer,
    ("dense", "product"): _dense_product,
    ("dense", "transposed"): _transposed(_dense_product),
    ("dense", "outer"): _dense_outer,
    **{
        (f"pallas_tpu{name}", leg): _kernel(function, interpret=bool(name), **options)
        for name in ("", "_interpret")
        for leg, function, options in (
            ("product", tpu.product, {}),
            ("transposed", tpu.product, {"transposed": True}),
            ("outer", tpu.outer, {}),
        )
    },
}
