"""The grouped matrix product on TPU: y = x w and dx = dy wᵀ by tiles of rows, dw = xᵀ dy by groups.

Rows are cut into tiles; an item is the part of one tile that belongs to one group, and there are at most tiles + groups of
them. What items there are is small integers, computed before the call and prefetched. A tile that several groups share is
visited by each in turn and stays in VMEM meanwhile; rows past the last group are one more group, whose product is zero.

The whole contraction is one block, so no sum is kept between steps of a product, and matrices are read once: items are the
inner axis, blocks of columns the outer one.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 16  # rows of a bfloat16 tile
VMEM_BYTES = 56 * 1024 * 1024
BLOCK_BYTES = 44 * 1024 * 1024  # of all blocks, twice for those that are fetched ahead


def refuses(x_MK, w_EKN) -> str | None:
    """Why the kernels cannot serve the call, or None; ``w_EKN`` may be the other operand of any leg."""
    if x_MK.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, got {x_MK.dtype}"
    widths = x_MK.shape[1], *w_EKN.shape[1:]
    # A strip of 128 columns and the smallest tile of rows must fit.
    least = 2 * x_MK.dtype.itemsize * max(widths) * (LANES + LANES)
    if least > BLOCK_BYTES:
        return f"its blocks end at about {BLOCK_BYTES // (4 * LANES * x_MK.dtype.itemsize)} columns, got {max(widths)}"
    return None


def product(x_MK, w_EKN, sizes_E, *, transposed=False, interpret=False):
    """y_MN of x_MK and w_EKN, or of dy_MN and w_EKN over N where ``transposed``; rows past the groups are zero."""
    M, K = x_MK.shape
    E, N = w_EKN.shape[0], w_EKN.shape[1 if transposed else 2]
    tm, tn = _product_tiles(M, K, N, E, x_MK.dtype.itemsize)
    x_MK, rows = _whole_rows(x_MK, tm)
    items = make_items(sizes_E, rows, tm, rest=True)
    last = lambda items, i: jnp.minimum(i, items[4][0] - 1)  # noqa: E731
    group = lambda items, i: jnp.minimum(items[0][last(items, i)], E - 1)  # noqa: E731
    tile = lambda items, i: items[1][last(items, i)]  # noqa: E731
    if transposed:
        matrix = pl.BlockSpec((1, tn, K), lambda n, i, *items: (group(items, i), n, 0))
    else:
        matrix = pl.BlockSpec((1, K, tn), lambda n, i, *items: (group(items, i), 0, n))
    kernel = functools.partial(_product_kernel, E=E, transposed=transposed, interpret=bool(interpret))
    y_MN = _call(
        kernel,
        "grouped_matmul_transposed" if transposed else "grouped_matmul_product",
        items,
        (pl.cdiv(N, tn), items[0].shape[0]),
        (x_MK, w_EKN),
        [pl.BlockSpec((tm, K), lambda n, i, *items: (tile(items, i), 0)), matrix],
        jax.ShapeDtypeStruct((rows, N), x_MK.dtype),
        pl.BlockSpec((tm, tn), lambda n, i, *items: (tile(items, i), n)),
        (),
        interpret,
    )
    return y_MN[:M]


def outer(x_MK, dy_MN, sizes_E, *, interpret=False):
    """dw_EKN in x's dtype, summed in float32."""
    K, N = x_MK.shape[1], dy_MN.shape[1]
    tm, tk, tn = _outer_tiles(x_MK.shape[0], K, N, sizes_E.shape[0], x_MK.dtype.itemsize)
    x_MK, rows = _whole_rows(x_MK, tm)
    dy_MN, _ = _whole_rows(dy_MN, tm)
    items = make_items(sizes_E, rows, tm, rest=False)
    last = lambda items, i: jnp.minimum(i, items[4][0] - 1)  # noqa: E731
    tile = lambda items, i: items[1][last(items, i)]  # noqa: E731
    return _call(
        functools.partial(_outer_kernel, interpret=bool(interpret)),
        "grouped_matmul_outer",
        items,
        (pl.cdiv(K, tk), pl.cdiv(N, tn), items[0].shape[0]),
        (x_MK, dy_MN),
        [
            pl.BlockSpec((tm, tk), lambda k, n, i, *items: (tile(items, i), k)),
            pl.BlockSpec((tm, tn), lambda k, n, i, *items: (tile(items, i), n)),
        ],
        jax.ShapeDtypeStruct((sizes_E.shape[0], K, N), x_MK.dtype),
        pl.BlockSpec((1, tk, tn), lambda k, n, i, *items: (items[0][last(items, i)], k, n)),
        (pltpu.VMEM((tk, tn), jnp.float32),),
        interpret,
    )


def _product_tiles(M, K, N, E, itemsize):
    """(rows, columns) of a tile: rows by the mean group, for a group's last tile is half empty; columns as many as fit."""
    tm = rows_of_a_tile(M, E, 512)
    while tm > LANES and 2 * itemsize * K * (tm + LANES) > BLOCK_BYTES:
        tm //= 2
    room = (BLOCK_BYTES - 2 * itemsize * tm * K) // (2 * itemsize * (K + tm))
    return tm, _columns(N, max(room, LANES))


def _outer_tiles(M, K, N, E, itemsize):
    tm, most = rows_of_a_tile(M, E, 512), 2048 if itemsize == 2 else 1024
    tn = _columns(N, most)
    room = (BLOCK_BYTES - 2 * itemsize * tm * tn) // (2 * itemsize * (tm + tn) + 4 * tn)
    return tm, _columns(K, min(most, max(room, LANES))), tn


def rows_of_a_tile(M, E, most):
    mean = max(M // E, 1)
    tm = min(most, max(LANES, 1 << (mean // 2).bit_length()))
    return tm if tm <= M else -(-M // SUBLANES) * SUBLANES


def _columns(N, most):
    """All of them, or nearly equal blocks of whole lanes."""
    if most >= N:
        return N
    blocks = pl.cdiv(N, most // LANES * LANES)
    return min(most // LANES, pl.cdiv(pl.cdiv(N, blocks), LANES)) * LANES


def _whole_rows(x_MK, tm):
    """(x, its rows): padded only where one tile is more than all rows."""
    missing = max(0, tm - x_MK.shape[0])
    return (jnp.pad(x_MK, [(0, missing), (0, 0)]) if missing else x_MK), x_MK.shape[0] + missing


def make_items(sizes_E, rows, tm, *, rest):
    """int32: group, tile, first row and the row after the last one of each item; and how many items there are.

    ``rest``: the rows past the groups are an item's too, of group E, and empty groups have none. Otherwise every group has an
    item, for its gradient to be zeroed.
    """
    ends_E = jnp.cumsum(sizes_E)
    starts_E = ends_E - sizes_E
    if rest:
        starts_E, ends_E = jnp.append(starts_E, ends_E[-1]), jnp.append(ends_E, jnp.int32(rows))
    tiles = pl.cdiv(rows, tm)
    first_E = jnp.minimum(starts_E // tm, tiles - 1)
    count_E = jnp.where(ends_E > starts_E, (ends_E + tm - 1) // tm - first_E, 0 if rest else 1)
    stop_E = jnp.cumsum(count_E)
    index_I = jnp.arange(tiles + sizes_E.shape[0], dtype=jnp.int32)
    group_I = jnp.searchsorted(stop_E, index_I, side="right", method="compare_all")
    group_I = jnp.minimum(group_I, stop_E.shape[0] - 1).astype(jnp.int32)
    tile_I = jnp.minimum(first_E[group_I] + index_I - (stop_E - count_E)[group_I], tiles - 1)
    return [x.astype(jnp.int32) for x in (group_I, tile_I, starts_E[group_I], ends_E[group_I], stop_E[-1:])]


def _call(kernel, name, items, grid, arrays, in_specs, shape, out_spec, scratch, interpret):
    # Inside jax.shard_map, outputs vary over the mesh axes that the inputs vary over.
    shape = jax.ShapeDtypeStruct(shape.shape, shape.dtype, manual_axis_type=jax.typeof(arrays[0]).manual_axis_type)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=grid,
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=list(scratch),
        ),
        out_shape=shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (len(grid) - 1) + ("arbitrary",), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name=name,
    )(*items, *arrays)


def _product_kernel(group, tile, start, stop, count, x, w, y, *, E, transposed, interpret):
    i = pl.program_id(1)

    @pl.when(i < count[0])
    def _():
        mine = rows_between(tile[i] * x.shape[0], start[i], stop[i], (x.shape[0], 1))
        contract = ((1,), (1 if transposed else 0,))
        new = dot(x[...], w[0], contract, interpret).astype(y.dtype)
        new = jnp.where(group[i] < E, new, jnp.zeros_like(new))
        y[...] = jnp.where(mine, new, y[...])


def _outer_kernel(group, tile, start, stop, count, x, dy, dw, total, *, interpret):
    i = pl.program_id(2)
    before, after = jnp.maximum(i - 1, 0), jnp.minimum(i + 1, count[0] - 1)

    @pl.when(i < count[0])
    def _():
        @pl.when((i == 0) | (group[before] != group[i]))
        def _():
            total[...] = jnp.zeros_like(total)

        # Both are masked: what is not this group's may be NaN.
        mine = rows_between(tile[i] * x.shape[0], start[i], stop[i], (x.shape[0], 1))
        own_x, own_dy = (jnp.where(mine, a[...], jnp.zeros((), a.dtype)) for a in (x, dy))
        total[...] += dot(own_x, own_dy, ((0,), (0,)), interpret)

        @pl.when((i == count[0] - 1) | (group[after] != group[i]))
        def _():
            dw[0] = total[...].astype(dw.dtype)


def rows_between(first, start, stop, shape):
    row = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= start) & (row < stop)


def dot(x, y, contract, interpret):
    if interpret:  # XLA:CPU lacks some bfloat16 products; these operands' float32 products are the same
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)
