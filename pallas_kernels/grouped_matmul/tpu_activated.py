"""The grouped product with what stands between an expert's two matrices, on TPU: forward and backward in one pass over its rows.

    h = x w_in,  a = act(h, weight)              da = dy w_outᵀ,  a, dh, dweight = act and its gradient at (h, weight, da)

A tile's columns of gate and of up are produced together, so the activation meets them in VMEM. What is kept for the backward
pass (h) and its cotangent lie as the products want them, gate beside up: one tile writes two places, by copies of its own that
run behind the next tile's products. Tiles and items are those of ``tpu``.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import tpu
from pallas_kernels.grouped_matmul.tpu import BLOCK_BYTES, LANES, SUBLANES, VMEM_BYTES


def refuses(x_MK, w_EKN, F: int) -> str | None:
    """Why the kernels cannot serve the call, or None; ``w_EKN`` is the matrix whose product's rows meet the activation."""
    why = tpu.refuses(x_MK, w_EKN)
    M, N = x_MK.shape[0], w_EKN.shape[2]
    if why:
        return why
    if F % LANES or N not in (F, 2 * F):
        return f"hidden widths are multiples of {LANES}, and rows one or two of them, got {N} and {F}"
    if M < LANES or M % SUBLANES:
        return f"rows are at least {LANES} and a multiple of {SUBLANES}, got {M}"
    if _tiles(M, x_MK.shape[1], F, w_EKN.shape[0], N // F, x_MK.dtype.itemsize)[1] < min(F, 2 * LANES):
        return f"its blocks are too narrow for widths {x_MK.shape[1]} and {F}"
    return None


def product(x_MK, w_EKN, weight_M, sizes_E, *, activation, F, keep, interpret=False):
    """(a_MF, h_MN if ``keep``): a = activation(h, weight_M1), h = x w. Rows of x past the groups are zero, and the activation's
    value and gradient there finite, zero of zero."""
    call = _Call(x_MK, w_EKN, weight_M, sizes_E, F, interpret)
    matrices = [
        pl.BlockSpec((1, call.K, call.tf), lambda n, i, *items, p=p: (call.group(items, i), 0, p * call.blocks + n))
        for p in range(call.parts)
    ]
    kernel = functools.partial(_product_kernel, call=call.sizes, activation=activation)
    return call.run(kernel, "grouped_matmul_activated", [w_EKN] * call.parts, matrices, [call.hidden()], parted=keep)


def transposed(dy_MO, w_EFO, h_MN, weight_M, sizes_E, *, activation, interpret=False):
    """(dh_MN, a_MF, dweight_M): from the output's cotangent to the hidden rows', and the hidden rows again. ``dy`` and ``h`` are zero
    past the groups."""
    E, F, _ = w_EFO.shape
    call = _Call(
        dy_MO, jax.ShapeDtypeStruct((E, dy_MO.shape[1], h_MN.shape[1]), w_EFO.dtype), weight_M, sizes_E, F, interpret
    )
    matrix = pl.BlockSpec((1, call.tf, call.K), lambda n, i, *items: (call.group(items, i), n, 0))
    parts = [
        pl.BlockSpec((call.tm, call.tf), lambda n, i, *items, p=p: (call.tile(items, i), p * call.blocks + n))
        for p in range(call.parts)
    ]
    kernel = functools.partial(_transposed_kernel, call=call.sizes, activation=activation)
    a_MF, dweight, dh_MN = call.run(
        kernel,
        "grouped_matmul_activated_transposed",
        [w_EFO, *[h_MN] * call.parts],
        [matrix, *parts],
        [call.hidden(), call.sums()],
        parted=True,
    )
    return dh_MN, a_MF, jnp.sum(dweight, axis=0).reshape(-1)[: call.M]


def _tiles(M, K, F, E, parts, itemsize):
    """(rows, columns of each part) of a tile; columns divide F. Both directions take the same: so do h and its cotangent."""
    tm = tpu.rows_of_a_tile(M, E, 512)
    while tm > LANES and 2 * itemsize * tm * K > BLOCK_BYTES // 2:
        tm //= 2
    room = (BLOCK_BYTES - 2 * itemsize * tm * K) // (itemsize * (2 * parts * K + tm * (4 * parts + 2)) + 16 * tm)
    fit = [n for n in range(LANES, F + 1, LANES) if F % n == 0 and n <= max(room, LANES)]
    return tm, fit[-1]


class _Call:
    """The tiles of one call, and its ``pallas_call``."""

    def __init__(self, x_MK, w_EKN, weight_M, sizes_E, F, interpret):
        (self.M, self.K), (E, _, N) = x_MK.shape, w_EKN.shape
        self.parts, self.x_MK, self.F, self.interpret = N // F, x_MK, F, interpret
        self.tm, self.tf = _tiles(self.M, self.K, F, E, self.parts, x_MK.dtype.itemsize)
        self.blocks, self.rows = F // self.tf, pl.cdiv(self.M, self.tm)
        self.items = tpu.make_items(sizes_E, self.M, self.tm, rest=True)
        weight_M = jnp.pad(weight_M.astype(jnp.float32), (0, self.rows * self.tm - self.M))
        self.weight = weight_M.reshape(self.rows, 1, self.tm)
        self.sizes = {"M": self.M, "F": F, "E": E, "parts": self.parts, "interpret": bool(interpret)}
        last = lambda items, i: jnp.minimum(i, items[4][0] - 1)  # noqa: E731
        self.group = lambda items, i: jnp.minimum(items[0][last(items, i)], E - 1)
        self.tile = lambda items, i: items[1][last(items, i)]

    def hidden(self):
        spec = pl.BlockSpec((self.tm, self.tf), lambda n, i, *items: (self.tile(items, i), n))
        return (self.M, self.F), self.x_MK.dtype, spec

    def sums(self):
        spec = pl.BlockSpec((1, 1, 1, self.tm), lambda n, i, *items: (n, self.tile(items, i), 0, 0))
        return (self.blocks, self.rows, 1, self.tm), jnp.float32, spec

    def run(self, kernel, name, arrays, specs, outputs, *, parted):
        """``parted``: one more output [M, N], which the kernel copies there."""
        scratch = []
        if parted:
            anywhere = pl.BlockSpec(memory_space=pl.ANY)
            outputs = [*outputs, ((self.M, self.parts * self.F), self.x_MK.dtype, anywhere)]
            kept = pltpu.VMEM((2, self.parts, self.tm, self.tf), self.x_MK.dtype)
            scratch = [kept, pltpu.SemaphoreType.DMA((2, self.parts))]
        # Inside jax.shard_map, outputs vary over the mesh axes that the inputs vary over.
        varying = jax.typeof(self.x_MK).manual_axis_type
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(self.items),
                grid=(self.blocks, self.items[0].shape[0]),
                in_specs=[
                    pl.BlockSpec((self.tm, self.K), lambda n, i, *items: (self.tile(items, i), 0)),
                    pl.BlockSpec((1, 1, self.tm), lambda n, i, *items: (self.tile(items, i), 0, 0)),
                    *specs,
                ],
                out_specs=[spec for _, _, spec in outputs],
                scratch_shapes=scratch,
            ),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype, _ in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            interpret=self.interpret,
            name=name,
        )(*self.items, self.x_MK, self.weight, *arrays)


def _product_kernel(group, tile, start, stop, count, x, weight, *refs, call, activation):
    i = pl.program_id(1)
    w, (a, *kept) = refs[: call["parts"]], refs[call["parts"] :]
    copies = _Copies(tile, count, *kept, call=call) if kept else None

    @pl.when(i < count[0])
    def _():
        mine = tpu.rows_between(tile[i] * x.shape[0], start[i], stop[i], (x.shape[0], 1))
        h = [tpu.dot(x[...], part[0], ((1,), (0,)), call["interpret"]).astype(a.dtype) for part in w]
        a[...] = jnp.where(mine, activation(_beside(h), _column(weight)).astype(a.dtype), a[...])
        if copies:
            copies.store(h, mine)

    if copies:
        copies.finish()


def _transposed_kernel(group, tile, start, stop, count, dy, weight, w, *refs, call, activation):
    i = pl.program_id(1)
    h, (a, dweight, *kept) = refs[: call["parts"]], refs[call["parts"] :]
    copies = _Copies(tile, count, *kept, call=call)

    @pl.when(i < count[0])
    def _():
        tm = dy.shape[0]
        mine = tpu.rows_between(tile[i] * tm, start[i], stop[i], (tm, 1))
        da = tpu.dot(dy[...], w[0], ((1,), (1,)), call["interpret"])
        again, pull = jax.vjp(activation, _beside([part[...] for part in h]), _column(weight))
        dh, dcolumn = pull(da)
        a[...] = jnp.where(mine, again.astype(a.dtype), a[...])
        copies.store(jnp.split(dh, call["parts"], axis=1), mine)
        row = jnp.broadcast_to(dcolumn, (tm, LANES)).T[:1]
        token = tile[i] * tm + jax.lax.broadcasted_iota(jnp.int32, (1, tm), 1)
        dweight[0, 0] = jnp.where((token >= start[i]) & (token < stop[i]), row, dweight[0, 0])

    copies.finish()


class _Copies:
    """A tile's parts on their way to memory, two tiles at a time: each is begun when the tile's last item is done, and awaited
    before its place in VMEM serves again."""

    def __init__(self, tile, count, out, kept, semaphores, *, call):
        self.tile, self.count, self.out, self.kept, self.semaphores, self.call = (
            tile,
            count,
            out,
            kept,
            semaphores,
            call,
        )
        self.tiles = pl.cdiv(call["M"], kept.shape[2])
        # Not within a branch: interpreted, they are not known there.
        self.n, self.i, self.end = pl.program_id(0), pl.program_id(1), pl.num_programs(1) - 1

    def store(self, values, mine):
        i = self.i
        here, before = self.tile[i], self.tile[jnp.maximum(i - 1, 0)]
        after = self.tile[jnp.minimum(i + 1, self.count[0] - 1)]

        @pl.when(((i == 0) | (before != here)) & (here >= 2))
        def _():
            self._each(here - 2, lambda copy: copy.wait())

        for p, value in enumerate(values):
            old = self.kept[here % 2, p]
            self.kept[here % 2, p] = jnp.where(mine, value.astype(old.dtype), old)

        @pl.when((i == self.count[0] - 1) | (after != here))
        def _():
            self._each(here, lambda copy: copy.start())

    def finish(self):
        @pl.when(self.i == self.end)
        def _():
            for tile in range(max(self.tiles - 2, 0), self.tiles):
                self._each(tile, lambda copy: copy.wait())

    def _each(self, tile, act):
        """The last tile may hold fewer rows."""
        tm, tf = self.kept.shape[2:]
        slot, short = tile % 2, self.call["M"] % tm

        def rows_of(rows):
            for p in range(self.call["parts"]):
                columns = pl.ds(pl.multiple_of(p * self.call["F"] + self.n * tf, LANES), tf)
                to = self.out.at[pl.ds(pl.multiple_of(tile * tm, SUBLANES), rows), columns]
                act(pltpu.make_async_copy(self.kept.at[slot, p, pl.ds(0, rows)], to, self.semaphores.at[slot, p]))

        if not short:
            rows_of(tm)
        elif isinstance(tile, int):
            rows_of(short if tile == self.tiles - 1 else tm)
        else:
            pl.when(tile < self.tiles - 1)(lambda: rows_of(tm))
            pl.when(tile == self.tiles - 1)(lambda: rows_of(short))


def _beside(parts):
    return jnp.concatenate([part.astype(jnp.float32) for part in parts], axis=1)


def _column(weight):
    """The tile's [1, 1, tm] as [tm, 1]."""
    return jnp.broadcast_to(weight[0], (LANES, weight.shape[2])).T[:, :1]
