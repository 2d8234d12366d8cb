"""CPU's form: equal shares in one batched product, and a loop over tiles for the rows that are beyond a share.

Groups of a random load are nearly equal, so the loop has little to do. Where more than a quarter of the rows are beyond
shares it does everything: a batched product that is mostly padding costs more.
"""

import functools
import math

import jax
import jax.numpy as jnp

from research.ops.grouped_matmul.even import EVEN, SPECS, accumulator, block_outer, einsum, few, unless_even
from research.ops.grouped_matmul.layout import tile_rows
from research.ops.grouped_matmul.tiled import tile_experts


def _looped(even, shares, loop, rowwise):
    """A leg over any rows, from one over groups of equal size, one over as many rows of each as a share has, one over the
    rows beyond, and one over few rows."""

    def leg(a, b, sizes_E, *, alignment, clean):
        rows, groups = a.shape[0], sizes_E.shape[0]
        if rowwise is not None and few(a, sizes_E, alignment):
            return rowwise(a, b, sizes_E)
        if rows < 8 * groups:
            return unless_even(even, functools.partial(loop, skip=0, before=None))(a, b, sizes_E)

        def uneven(a, b, sizes_E):
            share = _share(rows, groups, alignment)
            worth = 4 * jnp.maximum(sizes_E - share, 0).sum() <= rows
            shape = jax.eval_shape(functools.partial(shares, share=share), a, b, sizes_E)
            nothing = lambda a, b, sizes_E: jnp.zeros(shape.shape, shape.dtype)  # noqa: E731
            before = jax.lax.cond(worth, functools.partial(shares, share=share), nothing, a, b, sizes_E)
            return loop(a, b, sizes_E, skip=jnp.where(worth, share, 0), before=before)

        return unless_even(even, uneven)(a, b, sizes_E)

    return leg


def _share(rows, groups, alignment):
    """Rows of each group that one batched product takes: what the layout deals, or the mean and two standard deviations of
    a random load."""
    mean = rows / groups
    if alignment > 1 and rows % groups == 0:
        return rows // groups
    return -(-math.ceil(mean + 2 * mean**0.5) // 8) * 8


def _window(x_MK, sizes_E, share):
    """(the first `share` rows from each group's first on [E, C, K], whether each is the group's)."""
    offset_C = jnp.arange(share, dtype=jnp.int32)
    row_EC = (jnp.cumsum(sizes_E) - sizes_E)[:, None] + offset_C
    own_EC1 = (offset_C < sizes_E[:, None])[..., None]
    return x_MK.at[jnp.minimum(row_EC, x_MK.shape[0] - 1)].get(mode="promise_in_bounds"), own_EC1


def _share_product(x_MK, w_EKN, sizes_E, *, spec, share):
    """Rows beyond their group's share, and past the sum, come out zero."""
    rows, groups = x_MK.shape[0], sizes_E.shape[0]
    x_ECK, _ = _window(x_MK, sizes_E, share)
    y_PN = einsum(spec, x_ECK, w_EKN).reshape(groups * share, -1)
    expert_M = tile_experts(sizes_E, 1, rows)
    start_E = jnp.append(jnp.cumsum(sizes_E) - sizes_E, -rows - share)
    offset_M = jnp.arange(rows, dtype=jnp.int32) - start_E[expert_M]
    slot_M = jnp.where(offset_M < share, expert_M * share + offset_M, groups * share)
    return y_PN.at[slot_M].get(mode="fill", fill_value=0)


def _share_outer(x_MK, dy_MN, sizes_E, *, share):
    x_PK, dy_PN = (
        jnp.where(own_EC1, x_ECK, 0).reshape(-1, x_ECK.shape[2])
        for x_ECK, own_EC1 in (_window(x, sizes_E, share) for x in (x_MK, dy_MN))
    )
    return block_outer(x_PK, dy_PN, share)


def _row_product(x_MK, w_EKN, sizes_E, *, spec):
    """Each row times its own matrix, as a sum that XLA computes without copying the matrices (a loop or a conditional would
    have the whole layer's cut from the stack first)."""
    groups, wide = sizes_E.shape[0], accumulator(x_MK)
    expert_M = tile_experts(sizes_E, 1, x_MK.shape[0])
    w_MKN = w_EKN[jnp.minimum(expert_M, groups - 1)].astype(wide)
    x_MKN = x_MK.astype(wide)[:, :, None] if spec == SPECS["product"] else x_MK.astype(wide)[:, None]
    y_MN = jnp.sum(x_MKN * w_MKN, axis=1 if spec == SPECS["product"] else 2)
    return jnp.where((expert_M < groups)[:, None], y_MN, 0).astype(x_MK.dtype)


def _blocks(sizes_E, skip, rows):
    """(rows of a block, how many blocks groups have past their first `skip` rows, expert of each, its first row, the row
    after its last)."""
    groups = sizes_E.shape[0]
    # A product of few rows is slow, and half a block a group is wasted.
    block = min(rows, max(16, tile_rows(rows, groups)))
    left_E = jnp.maximum(sizes_E - skip, 0)
    blocks_E = -(-left_E // block)
    ends_E, index_I = jnp.cumsum(blocks_E), jnp.arange(rows // block + min(groups, rows), dtype=jnp.int32)
    expert_I = jnp.searchsorted(ends_E, index_I, side="right", method="compare_all")
    expert_I = jnp.minimum(expert_I, groups - 1).astype(jnp.int32)
    stops_E = jnp.cumsum(sizes_E)
    starts_I = (stops_E - left_E)[expert_I] + (index_I - (ends_E - blocks_E)[expert_I]) * block
    return block, ends_E[-1], expert_I, starts_I, jnp.minimum(starts_I + block, stops_E[expert_I])


def _cut(x, start, stop, block):
    """(first row read, whether each of the block's rows is in [start, stop), the rows)."""
    first = jnp.minimum(start, x.shape[0] - block)
    row_C1 = first + jnp.arange(block, dtype=jnp.int32)[:, None]
    return first, (row_C1 >= start) & (row_C1 < stop), jax.lax.dynamic_slice_in_dim(x, first, block)


def _loop_product(x_MK, w_EKN, sizes_E, *, spec, skip, before):
    block, count, expert_I, start_I, stop_I = _blocks(sizes_E, skip, x_MK.shape[0])
    if before is None:
        before = jnp.zeros((x_MK.shape[0], w_EKN.shape[2 if spec == SPECS["product"] else 1]), x_MK.dtype)

    def step(i, y_MN):
        first, own_C1, x_CK = _cut(x_MK, start_I[i], stop_I[i], block)
        w_1KN = jax.lax.dynamic_slice_in_dim(w_EKN, expert_I[i], 1)
        new_CN = einsum(spec, x_CK[None], w_1KN)[0]
        old_CN = jax.lax.dynamic_slice_in_dim(y_MN, first, block)
        return jax.lax.dynamic_update_slice_in_dim(y_MN, jnp.where(own_C1, new_CN, old_CN), first, 0)

    return jax.lax.fori_loop(0, count, step, before)


def _loop_outer(x_MK, dy_MN, sizes_E, *, skip, before):
    block, count, expert_I, start_I, stop_I = _blocks(sizes_E, skip, x_MK.shape[0])
    if before is None:
        before = jnp.zeros((sizes_E.shape[0], x_MK.shape[1], dy_MN.shape[1]), accumulator(x_MK, dy_MN))

    def step(i, dw_EKN):
        (_, own_C1, x_CK), (_, _, dy_CN) = (_cut(a, start_I[i], stop_I[i], block) for a in (x_MK, dy_MN))
        new_KN = block_outer(jnp.where(own_C1, x_CK, 0), jnp.where(own_C1, dy_CN, 0), block)
        old_1KN = jax.lax.dynamic_slice_in_dim(dw_EKN, expert_I[i], 1)
        return jax.lax.dynamic_update_slice_in_dim(dw_EKN, old_1KN + new_KN, expert_I[i], 0)

    return jax.lax.fori_loop(0, count, step, before).astype(x_MK.dtype)


LEGS = {
    name: _looped(
        EVEN[name],
        functools.partial(_share_product, spec=spec),
        functools.partial(_loop_product, spec=spec),
        functools.partial(_row_product, spec=spec),
    )
    for name, spec in SPECS.items()
} | {"outer": _looped(EVEN["outer"], _share_outer, _loop_outer, None)}
