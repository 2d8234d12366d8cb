"""The short causal convolution on TPU with its activation: one pass over x forward, one over x and dy backward.

A grid step is one chunk of tokens (sublanes) by a block of channels (lanes). The tokens just before a chunk come as a block
of their own, so forward's steps share nothing. Backward walks a row's chunks from last to first, carries what the taps of
later tokens send back, and adds up the gradients of taps and bias in VMEM; the sums before the activation are computed again.

Documents come as ``reach_BT``: how many of the tokens before it a token sees, −1 for padding. Only selected products are
added, so that NaN in padding reaches nothing. Tuned by static cycles on v6e (``experiments.benchmark tpu_cycles``): strips of
16 rows and 512 channels keep a strip, the rows before it and the taps in registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
TAPS = 9  # a chunk sees the eight rows before it
_STRIP = 16  # rows of a bfloat16 tile
_BEFORE = 8
_CHUNK = 512
_CHANNELS = 512


def refuses(x_BTD, w_WD) -> str | None:
    """Why the kernels cannot serve the call, or None."""
    if x_BTD.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, got {x_BTD.dtype}"
    if w_WD.shape[0] > TAPS:
        return f"it has at most {TAPS} taps, got {w_WD.shape[0]}"
    return None


def forward(x_BTD, w_WD, bias_D, tail, reach_BT, *, silu, interpret=False):
    """y_BTD in x's dtype."""
    call = _Call(x_BTD, w_WD, reach_BT)
    inputs = call.inputs(x_BTD, w_WD, bias_D, tail, reach_BT)
    outputs = {"y": call.chunk(None, x_BTD.dtype)}
    kernel = functools.partial(_forward_kernel, W=call.W, silu=silu)
    y = call.run(kernel, "causal_conv_forward", inputs, outputs, interpret)["y"]
    return y[:, : x_BTD.shape[1]]


def backward(x_BTD, w_WD, bias_D, tail, reach_BT, dy_BTD, *, silu, interpret=False):
    """Cotangents of (x, w, bias, tail)."""
    call = _Call(x_BTD, w_WD, reach_BT, backwards=True)
    inputs = call.inputs(x_BTD, w_WD, bias_D, tail, reach_BT) | {"dy": call.chunk(dy_BTD, dy_BTD.dtype)}
    outputs = {
        "dx": call.chunk(None, x_BTD.dtype),
        "dw": call.weights(None, call.W),
        "dbias": call.weights(None, 1),
        "first": call.tail(None),
    }
    kernel = functools.partial(_backward_kernel, W=call.W, silu=silu)
    out = call.run(kernel, "causal_conv_backward", inputs, outputs, interpret)
    dbias = None if bias_D is None else out["dbias"][0].astype(bias_D.dtype)
    dtail = None if tail is None else _tail_gradient(out["first"], w_WD, reach_BT).astype(tail.dtype)
    return out["dx"][:, : x_BTD.shape[1]], out["dw"].astype(w_WD.dtype), dbias, dtail


def _tail_gradient(d_B8D, w_WD, reach_BT):
    """From the cotangents of the row's first sums: tail token j is seen by token j + n − (W − 1) through tap n."""
    W = w_WD.shape[0]
    if reach_BT is not None:
        reach_BT = jnp.pad(reach_BT[:, :_BEFORE], [(0, 0), (0, max(0, _BEFORE - reach_BT.shape[1]))])
    dtail = jnp.zeros((d_B8D.shape[0], W - 1, d_B8D.shape[2]), jnp.float32)
    for n in range(1, W):
        sent_BnD = d_B8D[:, :n] * w_WD[W - 1 - n].astype(jnp.float32)
        if reach_BT is not None:
            sent_BnD = jnp.where((reach_BT[:, :n] >= n)[..., None], sent_BnD, 0)
        dtail = dtail.at[:, W - 1 - n :].add(sent_BnD[:, : min(n, W - 1)])
    return dtail


class _Call:
    """The sizes of one call, and its arrays as (array or shape, BlockSpec)."""

    def __init__(self, x_BTD, w_WD, reach_BT, backwards=False):
        self.B, self.T, self.D = x_BTD.shape
        self.W = w_WD.shape[0]
        self.C = min(_CHUNK, -(-self.T // _STRIP) * _STRIP)
        self.N = -(-self.T // self.C)
        self.rows = self.C if self.N == 1 else self.T
        self.channels = min(_CHANNELS, self.D)
        self.masked = reach_BT is not None or self.T % self.C != 0
        self.backwards = backwards
        self.grid = (-(-self.D // self.channels), self.B, self.N)

    def _spec(self, shape, index):
        """index: (row of the batch, chunk, block of channels) → block."""
        n = lambda c: self.N - 1 - c if self.backwards else c  # noqa: E731
        return pl.BlockSpec(shape, lambda d, b, c: index(b, n(c), d))

    def inputs(self, x_BTD, w_WD, bias_D, tail, reach_BT):
        out = {"x": self.chunk(x_BTD, x_BTD.dtype), "w": self.weights(w_WD, self.W)}
        if self.N > 1:
            strips = self.C // _STRIP
            before = lambda b, c, d: (b, jnp.maximum(c * strips - 1, 0), d)  # noqa: E731
            out["before"] = x_BTD, self._spec((1, _STRIP, self.channels), before)
        if bias_D is not None:
            out["bias"] = self.weights(bias_D[None], 1)
        if tail is not None and self.W > 1:
            tail = jnp.pad(tail.astype(jnp.float32), [(0, 0), (_BEFORE - self.W + 1, 0), (0, 0)])
            out["tail"] = self.tail(tail)
        if self.masked:
            out["reach"] = self._reach(x_BTD, reach_BT)
        return out

    def _reach(self, x_BTD, reach_BT):
        """[B, N, 8, C] float32: row 0 how many tokens back a token sees, row 1 how many tokens ahead see it."""
        length = self.N * self.C
        if reach_BT is None:
            reach_BT = jnp.full_like(x_BTD[:, :, 0], self.W - 1, dtype=jnp.int32)
        reach_BT = jnp.pad(reach_BT, [(0, 0), (0, length + self.W - self.T)], constant_values=-1)
        back = [(reach_BT[:, n : n + length] >= n).astype(jnp.int32) for n in range(self.W)]
        rows = [reach_BT[:, :length], functools.reduce(jnp.add, back) - 1]
        rows = [x.reshape(self.B, self.N, self.C).astype(jnp.float32) for x in rows]
        rows_BN8C = jnp.pad(jnp.stack(rows, axis=2), [(0, 0), (0, 0), (0, 6), (0, 0)])
        return rows_BN8C, self._spec((1, 1, 8, self.C), lambda b, c, d: (b, c, 0, 0))

    def chunk(self, x_BTD, dtype):
        spec = self._spec((1, self.C, self.channels), lambda b, c, d: (b, c, d))
        if x_BTD is None:
            return jax.ShapeDtypeStruct((self.B, self.rows, self.D), dtype), spec
        if self.rows != self.T:
            x_BTD = jnp.pad(x_BTD, [(0, 0), (0, self.rows - self.T), (0, 0)])
        return x_BTD, spec

    def weights(self, w_WD, W):
        spec = pl.BlockSpec((W, self.channels), lambda d, b, c: (0, d))
        return jax.ShapeDtypeStruct((W, self.D), jnp.float32) if w_WD is None else w_WD.astype(jnp.float32), spec

    def tail(self, tail):
        spec = pl.BlockSpec((1, _BEFORE, self.channels), lambda d, b, c: (b, 0, d))
        return jax.ShapeDtypeStruct((self.B, _BEFORE, self.D), jnp.float32) if tail is None else tail, spec

    def run(self, kernel, name, inputs, outputs, interpret):
        # Inside jax.shard_map, outputs vary over the mesh axes that the inputs vary over.
        varying = jax.typeof(inputs["x"][0]).manual_axis_type
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x, _ in outputs.values()]
        scratch = {"columns": pltpu.VMEM((2, self.C, LANES), jnp.float32)} if self.masked else {}
        if self.backwards:
            scratch["later"] = pltpu.VMEM((_BEFORE, self.channels), jnp.float32)
        names = (*inputs, *outputs, *scratch)

        def named(*refs):
            kernel(dict(zip(names, refs, strict=True)))

        order = "arbitrary" if self.backwards else "parallel"
        out = pl.pallas_call(
            named,
            grid=self.grid,
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in outputs.values()],
            out_shape=shapes,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", order, order)),
            scratch_shapes=list(scratch.values()),
            interpret=interpret,
            name=name,
        )(*(x for x, _ in inputs.values()))
        return dict(zip(outputs, out, strict=True))


def _forward_kernel(refs, *, W, silu):
    x, y = refs["x"], refs["y"]
    _lay_out(refs)

    def strip(i, before):
        rows = pl.ds(pl.multiple_of(i * _STRIP, _STRIP), _STRIP)
        now = x[0, rows].astype(jnp.float32)
        reach = _column(refs, 0, rows, now.shape[1])
        total, _ = _sum(before, now, refs, W, reach)
        out = total * jax.nn.sigmoid(total) if silu else total
        y[0, rows] = _where(reach, 0, out).astype(y.dtype)
        return now[-_BEFORE:]

    count = x.shape[1] // _STRIP
    jax.lax.fori_loop(0, count, strip, _first_rows(refs, pl.program_id(2) == 0), unroll=True)


def _backward_kernel(refs, *, W, silu):
    x, dx, dy, later = refs["x"], refs["dx"], refs["dy"], refs["later"]
    b, c, N = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
    _lay_out(refs)

    @pl.when(c == 0)
    def _():
        later[...] = jnp.zeros_like(later)

    @pl.when((b == 0) & (c == 0))
    def _():
        refs["dw"][...] = jnp.zeros_like(refs["dw"])
        refs["dbias"][...] = jnp.zeros_like(refs["dbias"])

    width = x.shape[2]
    first = _first_rows(refs, c == N - 1)
    count = x.shape[1] // _STRIP

    def strip(i, carry):
        """From the last strip to the first."""
        after, sums = carry
        i = count - 1 - i
        start = pl.multiple_of(i * _STRIP, _STRIP)
        rows = pl.ds(start, _STRIP)
        now = x[0, rows].astype(jnp.float32)
        above = x[0, pl.ds(pl.multiple_of(jnp.maximum(start - _STRIP, 0), _STRIP), _STRIP)]
        before = jnp.where(i == 0, first, above[-_BEFORE:].astype(jnp.float32))
        reach = _column(refs, 0, rows, width)
        total, seen = _sum(before, now, refs, W, reach)
        d = dy[0, rows].astype(jnp.float32)
        if silu:
            s = jax.nn.sigmoid(total)
            d = d * (s + total * s * (1 - s))
        d = _where(reach, 0, d)
        row = jnp.concatenate([d, after], axis=0)
        ahead = _column(refs, 1, rows, width)
        back = [_where(ahead, n, row[n : n + _STRIP] * _tap(refs, n)) for n in range(W)]
        dx[0, rows] = functools.reduce(jnp.add, back).astype(dx.dtype)
        products = [_where(reach, n, seen[n] * d) for n in range(W)] + [d]
        sums = [old + _fold(product) for old, product in zip(sums, products, strict=True)]
        return d[:_BEFORE], sums

    zeros = jnp.zeros((_BEFORE, width), jnp.float32)
    after, sums = jax.lax.fori_loop(0, count, strip, (later[...], [zeros] * (W + 1)), unroll=True)
    later[...] = after
    for n in range(W):
        refs["dw"][W - 1 - n : W - n] += jnp.sum(sums[n], axis=0, keepdims=True)
    refs["dbias"][...] += jnp.sum(sums[W], axis=0, keepdims=True)

    @pl.when(c == N - 1)
    def _():
        refs["first"][0] = after


def _lay_out(refs):
    """Rows of scalars a token as columns, every lane alike: once a step."""
    if "reach" in refs:
        for n in range(refs["columns"].shape[0]):
            row = refs["reach"][0, 0, n : n + 1]
            refs["columns"][n] = jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _column(refs, n, rows, width):
    if "reach" not in refs:
        return None
    column = refs["columns"][n, rows]
    return jnp.concatenate([column] * -(-width // LANES), axis=1)[:, :width]


def _where(column, n, x):
    """``x`` where the column is at least n."""
    return x if column is None else jnp.where(column >= n, x, 0)


def _first_rows(refs, is_first):
    """The eight rows before the chunk: the tail before the first one."""
    x = refs["x"]
    zeros = jnp.zeros((_BEFORE, x.shape[2]), jnp.float32)
    tail = refs["tail"][0] if "tail" in refs else zeros
    return jnp.where(is_first, tail, refs["before"][0, -_BEFORE:].astype(jnp.float32)) if "before" in refs else tail


def _sum(before, now, refs, W, reach):
    """(the sum over taps and the bias, by how far they look back: the rows that taps see)."""
    row = jnp.concatenate([before, now], axis=0)
    seen = [row[_BEFORE - n : _BEFORE - n + now.shape[0]] for n in range(W)]
    total = functools.reduce(jnp.add, [_where(reach, n, seen[n] * _tap(refs, n)) for n in range(W)])
    return (total + refs["bias"][...] if "bias" in refs else total), seen


def _tap(refs, n):
    """The weight of the token n before, as a row."""
    w = refs["w"]
    return w[w.shape[0] - 1 - n : w.shape[0] - n]


def _fold(x):
    """Sixteen rows to eight."""
    return x[:_BEFORE] + x[_BEFORE:]
