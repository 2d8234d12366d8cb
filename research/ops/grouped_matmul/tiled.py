"""All tiles at once: as many as any load needs, in one batched product over tiles with a matrix gathered for each."""

import functools

import jax
import jax.numpy as jnp

from research.ops.grouped_matmul.even import EVEN, SPECS, block_outer, einsum, few, unless_even
from research.ops.grouped_matmul.layout import aligned_rows, padded_sizes, tile_rows


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
        if few(a, sizes_E, alignment) and not all(pack):
            return tiles(a, b, sizes_E, alignment=1, clean=clean)
        if alignment > 1:
            return unless_even(even, functools.partial(tiles, alignment=alignment, clean=clean))(a, b, sizes_E)

        def padded(a, b, sizes_E):
            tile = tile_rows(a.shape[0], sizes_E.shape[0])
            room = aligned_rows(a.shape[0], sizes_E.shape[0], tile)
            inside = unless_even(even, functools.partial(tiles, alignment=tile, clean=True))
            return _packed(inside, a, b, sizes_E, padded_sizes(sizes_E, room, tile), room=room, pack=pack)

        return unless_even(even, padded)(a, b, sizes_E)

    return leg


def tile_experts(sizes_E, tile, tiles):
    """Expert of each tile; E past the last group."""
    ends_E = jnp.cumsum(sizes_E // tile)
    return jnp.searchsorted(ends_E, jnp.arange(tiles), side="right", method="compare_all").astype(jnp.int32)


def _tile_product(x_PK, w_EKN, sizes_E, alignment, clean, *, spec):
    rows, groups = x_PK.shape[0], sizes_E.shape[0]
    expert_I = tile_experts(sizes_E, alignment, rows // alignment)
    y_ICN = einsum(spec, x_PK.reshape(-1, alignment, x_PK.shape[1]), w_EKN[jnp.minimum(expert_I, groups - 1)])
    if not clean:
        y_ICN = jnp.where((expert_I < groups)[:, None, None], y_ICN, 0)
    return y_ICN.reshape(rows, -1)


def _tile_outer(x_PK, dy_PN, sizes_E, alignment, clean):
    expert_I = tile_experts(sizes_E, alignment, x_PK.shape[0] // alignment)
    dw_IKN = block_outer(x_PK, dy_PN, alignment)
    # Tiles past the last group have id E: dropped, NaN included.
    return jax.ops.segment_sum(dw_IKN, expert_I, sizes_E.shape[0], indices_are_sorted=True).astype(x_PK.dtype)


_TILES = {name: functools.partial(_tile_product, spec=spec) for name, spec in SPECS.items()} | {"outer": _tile_outer}
_PACK = {"product": (True, False), "transposed": (True, False), "outer": (True, True)}
LEGS = {leg: _tiled(EVEN[leg], _TILES[leg], _PACK[leg]) for leg in _PACK}
