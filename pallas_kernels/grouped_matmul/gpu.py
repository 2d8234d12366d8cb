"""The grouped matrix product on Hopper GPUs: y = x w and dx = dy wᵀ by tiles of rows, dw = xᵀ dy by groups (Mosaic GPU).

A tile of rows starts where its group or the tile before it ends, so no tile has two groups' rows: what hangs over the group's
end is computed and not stored. Tiles are small integers, computed before the call. Rows past the last group are one more group,
whose product takes no steps and is zero.

A thread block is one warpgroup that fetches, four steps ahead, and one or two that multiply, 64 rows each. Products are
wgmma's: bfloat16 operands, float32 sums, one per step left in flight.

jax's own kernels (``jax.experimental.pallas.ops.gpu``) leave rows past the groups unwritten, multiply foreign rows by zero
where NaN must not pass, and search the groups in every tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.hopper import launch, not_hopper, tiles

plgpu: Any = mosaic_gpu  # its types name neither what it exports nor what it takes

_STEP = 64  # of the contraction, and rows of a warpgroup: a line of shared memory
_AHEAD = 4  # steps in flight
_COLUMNS = 256  # of a tile, at most: the sums of [64, 256] take half of a warpgroup's registers
# Tiles of rows that run through the columns together, so that both operands are read from the L2 cache.
_NEIGHBOURS = 16
_FETCHING_REGISTERS = 40


def refuses(x_MK, w_EKN) -> str | None:
    """Why the kernels cannot serve the call, or None; ``w_EKN`` may be the other operand of any leg."""
    if x_MK.dtype != jnp.bfloat16 or w_EKN.dtype != jnp.bfloat16:
        return f"it takes bfloat16, got {x_MK.dtype} and {w_EKN.dtype}"
    widths = x_MK.shape[1], *w_EKN.shape[1:]
    if any(width % _STEP for width in widths):
        return f"it takes widths that are multiples of {_STEP}, got {sorted(set(widths))}"
    return not_hopper()


def product(x_MK, w_EKN, sizes_E, *, transposed=False, interpret=False):
    """y_MN of x_MK and w_EKN, or of dy_MN and w_EKN over N where ``transposed``; rows past the groups are zero."""
    rows = x_MK.shape[0]
    x_MK = jnp.pad(x_MK, [(0, max(0, _STEP - rows)), (0, 0)])
    M, K = x_MK.shape
    E, N = w_EKN.shape[0], w_EKN.shape[1 if transposed else 2]
    warpgroups, tn = 2 if M > _STEP * E else 1, _columns(N)
    items = _tiles(sizes_E, M, warpgroups * _STEP)
    y_MN = _call(
        functools.partial(_product_kernel, E=E, steps=K // _STEP, tn=tn, warpgroups=warpgroups, transposed=transposed),
        "grouped_matmul_transposed" if transposed else "grouped_matmul_product",
        (*items, x_MK, w_EKN),
        jax.ShapeDtypeStruct((M, N), x_MK.dtype),
        {"whole": _lines(warpgroups), "part": plgpu.SMEM((warpgroups, _STEP, _STEP), x_MK.dtype)},
        (items[0].shape[0] * (N // tn),),
        ("block",),
        warpgroups,
        interpret,
    )
    return y_MN[:rows]


def outer(x_MK, dy_MN, sizes_E, *, interpret=False):
    """dw_EKN in x's dtype, summed in float32."""
    K, N = x_MK.shape[1], dy_MN.shape[1]
    warpgroups, tn = 1 if K % (2 * _STEP) else 2, _columns(N)
    stops_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    return _call(
        functools.partial(_outer_kernel, tn=tn, warpgroups=warpgroups),
        "grouped_matmul_outer",
        (stops_E - sizes_E, stops_E, x_MK, dy_MN),
        jax.ShapeDtypeStruct((sizes_E.shape[0], K, N), x_MK.dtype),
        {"whole": _lines(warpgroups), "masked": plgpu.Barrier(num_arrivals=warpgroups)},
        (N // tn, K // (warpgroups * _STEP), sizes_E.shape[0]),
        ("columns", "rows", "group"),
        warpgroups,
        interpret,
    )


def _columns(N):
    return next(tn for tn in (_COLUMNS, 128, _STEP) if N % tn == 0)


def _tiles(sizes_E, M, tm):
    """int32 of every tile, and of some that have no rows: group, first row and the row after the last one."""
    stops_E = jnp.append(jnp.cumsum(sizes_E), M)
    starts_E = jnp.append(0, stops_E[:-1])
    count_E = (stops_E - starts_E + tm - 1) // tm
    ends_E = jnp.cumsum(count_E)
    most = M // tm + sizes_E.shape[0] + 1
    index_I = jnp.arange(-(-most // _NEIGHBOURS) * _NEIGHBOURS, dtype=jnp.int32)
    group_I = jnp.searchsorted(ends_E, index_I, side="right", method="compare_all")
    group_I = jnp.minimum(group_I, sizes_E.shape[0])
    start_I = starts_E[group_I] + (index_I - (ends_E - count_E)[group_I]) * tm
    return tuple(x.astype(jnp.int32) for x in (group_I, start_I, jnp.minimum(start_I + tm, stops_E[group_I])))


def _lines(warpgroups):
    return plgpu.SMEM((warpgroups, _STEP, _STEP), jnp.bfloat16, transforms=tiles())


def _call(kernel, name, inputs, output, scratch, grid, grid_names, warpgroups, interpret):
    threads = {"num_threads": warpgroups + 1, "thread_name": "warpgroup"}
    options = {"grid": grid, "grid_names": grid_names, "interpret": interpret}
    return launch(kernel, inputs, [output], scratch, name=name, **options, **threads)[0]


def _product_kernel(group, start, stop, x, w, y, whole, part, *, E, steps, tn, warpgroups, transposed):
    block, across, tm = jax.lax.axis_index("block"), y.shape[1] // tn, warpgroups * _STEP
    near, n = block % _NEIGHBOURS, block // _NEIGHBOURS % across
    i = block // (_NEIGHBOURS * across) * _NEIGHBOURS + near
    first, e = start[i], group[i]
    rows = stop[i] - first
    mine = jax.lax.axis_index("warpgroup")

    def step(_, x_smem, w_smem, acc):
        matrix = w_smem.transpose((1, 0)) if transposed else w_smem
        plgpu.wgmma(acc, x_smem.at[pl.ds(mine * _STEP, _STEP)], matrix)
        plgpu.wgmma_wait(1)
        return acc

    def finish(sums):
        own = first + mine * _STEP
        count = jnp.clip(rows - mine * _STEP, 0, _STEP)
        for c in range(0, tn, _STEP):
            columns = pl.ds(n * tn + c, _STEP)
            out = sums[:, c : c + _STEP].astype(y.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(count == _STEP)
            def _(out=out, columns=columns):
                whole[mine] = out
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(whole.at[mine], y.at[pl.ds(own, _STEP), columns])

            @pl.when((count > 0) & (count < _STEP))
            def _(out=out, columns=columns):
                part[mine] = out
                plgpu.commit_smem()
                # How many rows a copy has is static: copy as many as each bit of the count stands for.
                for bit in (32, 16, 8, 4, 2, 1):
                    done = count & ~(2 * bit - 1)

                    @pl.when(count & bit != 0)
                    def _(bit=bit, done=done):
                        plgpu.copy_smem_to_gmem(part.at[mine, pl.ds(done, bit)], y.at[pl.ds(own + done, bit), columns])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    if transposed:
        matrix = _Blocks((None, tn, _STEP), lambda k: (jnp.minimum(e, E - 1), n, k))
    else:
        matrix = _Blocks((None, _STEP, tn), lambda k: (jnp.minimum(e, E - 1), k, n))
    tile = _Blocks((pl.Element(tm), _STEP), lambda k: (first, k))
    live = (e < E) & (rows > 0)
    _multiply(step, finish, jnp.where(live, steps, 0), [tile, matrix], tn, warpgroups)(x, w)


def _outer_kernel(starts, stops, x, dy, dw, whole, masked, *, tn, warpgroups):
    n, k, e = (jax.lax.axis_index(name) for name in ("columns", "rows", "group"))
    mine = jax.lax.axis_index("warpgroup")
    first = starts[e]
    count = stops[e] - first
    steps = (count + _STEP - 1) // _STEP
    own = pl.ds(mine * _STEP, _STEP)

    def step(indices, x_smem, dy_smem, acc):
        left = count - indices[0] * _STEP

        def clear(block):
            row = plgpu.broadcasted_iota(jnp.int32, (_STEP, _STEP), 0, layout=plgpu.Layout.WGMMA)
            block[...] = jnp.where(row < left, plgpu.load(block, layout=plgpu.Layout.WGMMA), 0)

        # What is not this group's may be NaN. Each warpgroup clears its own columns of x and its share of dy's.
        @pl.when(left < _STEP)
        def _():
            clear(x_smem.at[:, own])
            for c in range(tn // _STEP):
                pl.when(mine == c % warpgroups)(functools.partial(clear, dy_smem.at[:, pl.ds(c * _STEP, _STEP)]))
            plgpu.commit_smem()
            plgpu.barrier_arrive(masked)
            plgpu.barrier_wait(masked)

        plgpu.wgmma(acc, x_smem.at[:, own].transpose((1, 0)), dy_smem)
        plgpu.wgmma_wait(1)
        return acc

    def finish(sums):
        for c in range(0, tn, _STEP):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            whole[mine] = sums[:, c : c + _STEP].astype(dw.dtype)
            plgpu.commit_smem()
            rows = pl.ds((k * warpgroups + mine) * _STEP, _STEP)
            plgpu.copy_smem_to_gmem(whole.at[mine], dw.at[e, rows, pl.ds(n * tn + c, _STEP)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tokens = lambda columns, at: _Blocks((pl.Element(_STEP), columns), lambda i: (first + i * _STEP, at))  # noqa: E731
    _multiply(step, finish, steps, [tokens(warpgroups * _STEP, k), tokens(tn, n)], tn, warpgroups)(x, dy)


def _Blocks(shape, index):
    return plgpu.BlockSpec(shape, index, delay_release=1, transforms=tiles())


def _multiply(step, finish, steps, in_specs, tn, warpgroups):
    """``finish`` gets the sums of all steps, [64, tn] float32, in each warpgroup that multiplies."""

    def compute(run):
        def scoped(acc):
            run(acc)
            finish(acc[...])

        pl.run_scoped(scoped, plgpu.ACC((_STEP, tn), jnp.float32))

    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        in_specs=in_specs,
        max_concurrent_steps=_AHEAD,
        wg_axis="warpgroup",
        num_compute_wgs=warpgroups,
        memory_registers=_FETCHING_REGISTERS,
        compute_context=compute,
    )
