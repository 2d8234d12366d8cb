"""The short causal convolution on Hopper GPUs with its activation: one pass over x forward, one over x and dy back (Mosaic GPU).

A thread block is one warpgroup: a chunk of tokens by a block of channels. It walks the tokens one by one, a thread keeping its
own channels, so that what taps look back at stays in registers and no row ever has to be shifted. Rows are read eight at a time
ahead of their use. The few tokens before a chunk are read again; backward reads those after it, too, and walks the same way:
a token sends its cotangent back through each tap, and a row is written when the last token that sees it has been passed. The
gradients of taps and bias are summed over a chunk in registers, and over chunks by XLA.

Documents come as ``reach_BT``: how many of the tokens before it a token sees, −1 for padding. Only selected products are
added, so that NaN in padding reaches nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.hopper import PROCESSORS, launch, not_hopper

plgpu: Any = mosaic_gpu  # its types name neither what it exports nor what it takes

TAPS = 4
_THREADS = 128
_VECTOR = 4  # channels of a thread, at most
_AHEAD = 8  # rows
_CHUNKS = (128, 64, 32)  # tokens of a thread block: as many as leave _BLOCKS of them
_BLOCKS = PROCESSORS * 6  # at a time


def refuses(x_BTD, w_WD) -> str | None:
    """Why the kernels cannot serve the call, or None."""
    if x_BTD.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, got {x_BTD.dtype}"
    if w_WD.shape[0] > TAPS:
        return f"it has at most {TAPS} taps, got {w_WD.shape[0]}"
    if x_BTD.shape[2] % _THREADS:
        return f"it takes channels in multiples of {_THREADS}, got {x_BTD.shape[2]}"
    return not_hopper()


def forward(x_BTD, w_WD, bias_D, tail, reach_BT, *, silu, interpret=False):
    """y_BTD in x's dtype."""
    return _forward(x_BTD, w_WD, bias_D, tail, reach_BT, plan=(silu, _CHUNKS, _AHEAD), interpret=interpret)


def backward(x_BTD, w_WD, bias_D, tail, reach_BT, dy_BTD, *, silu, interpret=False):
    """Cotangents of (x, w, bias, tail)."""
    return _backward(x_BTD, w_WD, bias_D, tail, reach_BT, dy_BTD, plan=(silu, _CHUNKS, _AHEAD), interpret=interpret)


# Under jit, a call is traced once for all layers and branches of one shape: every program holds it, whatever its platform.
_traced_once = functools.partial(jax.jit, static_argnames=("plan", "interpret"))


@_traced_once
def _forward(x_BTD, w_WD, bias_D, tail, reach_BT, *, plan, interpret):
    call = _Call(x_BTD, w_WD, bias_D, tail, reach_BT, plan)
    return call.run(_forward_kernel, "causal_conv_forward", {}, {"y": (x_BTD.shape, x_BTD.dtype)}, interpret)["y"]


@_traced_once
def _backward(x_BTD, w_WD, bias_D, tail, reach_BT, dy_BTD, *, plan, interpret):
    call = _Call(x_BTD, w_WD, bias_D, tail, reach_BT, plan)
    outputs = {"dx": (x_BTD.shape, x_BTD.dtype), "sums": ((call.B, call.N, call.W + 1, call.D), jnp.float32)}
    if tail is not None:
        outputs["dtail"] = tail.shape, tail.dtype
    out = call.run(_backward_kernel, "causal_conv_backward", {"dy": dy_BTD}, outputs, interpret)
    sums_WD = jnp.sum(out["sums"], axis=(0, 1))
    dbias = None if bias_D is None else sums_WD[call.W].astype(bias_D.dtype)
    # Without the barrier, XLA (of JAX 0.11) fuses the kernel with an update of these rows, and then fails to compile that.
    dx_BTD = jax.lax.optimization_barrier(out["dx"])
    return dx_BTD, sums_WD[: call.W].astype(w_WD.dtype), dbias, out.get("dtail")


class _Call:
    """The sizes of one call, and what its kernels share: reading a row of channels, and the sum over taps."""

    def __init__(self, x_BTD, w_WD, bias_D, tail, reach_BT, plan):
        self.B, self.T, self.D = x_BTD.shape
        self.W = w_WD.shape[0]
        self.silu, chunks, self.ahead = plan
        self.vector = next(v for v in (_VECTOR, 2, 1) if self.D % (v * _THREADS) == 0)
        self.channels = self.vector * _THREADS
        blocks = lambda C: self.B * (self.D // self.channels) * -(-self.T // C)  # noqa: E731
        self.C = next((C for C in chunks if blocks(C) >= _BLOCKS), chunks[-1])
        self.N = -(-self.T // self.C)
        wide = lambda a: a.astype(jnp.float32)  # noqa: E731
        optional = {"bias": bias_D if bias_D is None else wide(bias_D), "tail": tail, "reach": reach_BT}
        self.inputs = {"x": x_BTD, "w": wide(w_WD)} | {n: a for n, a in optional.items() if a is not None}

    def run(self, kernel, name, inputs, outputs, interpret):
        inputs = self.inputs | inputs
        names = (*inputs, *outputs)

        def named(*refs):
            kernel(self, dict(zip(names, refs, strict=True)))

        out = launch(
            named,
            list(inputs.values()),
            [jax.ShapeDtypeStruct(*output) for output in outputs.values()],
            name=name,
            grid=(self.D // self.channels, self.N, self.B),
            grid_names=("channels", "chunk", "batch"),
            interpret=interpret,
        )
        return dict(zip(outputs, out, strict=True))

    def mine(self, ref, *index):
        """This block's channels of a row, as a reference."""
        return ref.at[(*index, pl.ds(jax.lax.axis_index("channels") * self.channels, self.channels))]

    def read(self, ref, *index):
        layout = plgpu.Layout.WG_STRIDED((self.channels,), vec_size=self.vector)
        value = plgpu.load(self.mine(ref, *index), layout=layout, optimized=False).astype(jnp.float32)
        # Inside jax.shard_map what is loaded varies over the mesh by its type, and what is computed does not.
        return value * 1.0

    def write(self, ref, value, *index):
        self.mine(ref, *index)[...] = value.astype(ref.dtype)

    def rows(self, refs, names, t):
        """The next rows from token t on, those of a name together; past the last token, the last one's."""
        place = [jnp.minimum(t + i, self.T - 1) for i in range(self.ahead)]
        b = jax.lax.axis_index("batch")
        reach = [refs["reach"][b, p] for p in place] if "reach" in refs else [None] * self.ahead
        return [*([self.read(refs[name], b, p) for p in place] for name in names), reach]

    def weights(self, refs):
        """(the weight of the token n before, for every n; the bias)."""
        w = [self.read(refs["w"], self.W - 1 - n) for n in range(self.W)]
        return w, self.read(refs["bias"]) if "bias" in refs else None

    def before(self, refs, first):
        """The W − 1 rows before the chunk, nearest first: the tail before the first one."""
        b, starts = jax.lax.axis_index("batch"), jax.lax.axis_index("chunk") == 0
        rows = []
        for n in range(1, self.W):
            inside = self.read(refs["x"], b, jnp.maximum(first - n, 0))
            rows.append(_where(starts, self.read(refs["tail"], b, self.W - 1 - n), inside))
        return tuple(rows)

    def total(self, seen, weights, reach):
        """The sum over taps and the bias."""
        w, bias = weights
        total = functools.reduce(
            jnp.add, [_seen(reach, n, x * c) for n, (x, c) in enumerate(zip(seen, w, strict=True))]
        )
        return total if bias is None else total + bias


def _forward_kernel(call, refs):
    b, first = jax.lax.axis_index("batch"), jax.lax.axis_index("chunk") * call.C
    weights = call.weights(refs)

    def walk(i, before):
        t = first + i * call.ahead
        for j, (now, reach) in enumerate(zip(*call.rows(refs, ["x"], t), strict=True)):
            seen = (now, *before)
            total = call.total(seen, weights, reach)
            y = _seen(reach, 0, total * _sigmoid(total) if call.silu else total)
            pl.when(t + j < call.T)(functools.partial(call.write, refs["y"], y, b, t + j))
            before = seen[: call.W - 1]
        return before

    jax.lax.fori_loop(0, call.C // call.ahead, walk, call.before(refs, first))


def _backward_kernel(call, refs):
    b, chunk = jax.lax.axis_index("batch"), jax.lax.axis_index("chunk")
    first, taps = chunk * call.C, call.W - 1
    w, _ = weights = call.weights(refs)
    zeros = w[0] * 0.0

    def send(t, now, dy, reach, before, open_rows):
        """(what taps saw, the sum's cotangent, the rows that later tokens may see): of ``open_rows`` the last is done."""
        seen = (now, *before)
        total = call.total(seen, weights, reach)
        d = dy
        if call.silu:
            s = _sigmoid(total)
            d = d * (s + total * s * (1 - s))
        d = _where(t < call.T, _seen(reach, 0, d), zeros)
        sent = [_seen(reach, n, d * w[n]) for n in range(call.W)]
        rows = [sent[0], *(row + more for row, more in zip(open_rows, sent[1:], strict=True))]
        done, place = rows[-1], t - taps
        pl.when((place >= first) & (place < call.T))(functools.partial(call.write, refs["dx"], done, b, place))
        return seen, d, tuple(rows[:-1]), done

    def walk(i, carry):
        before, open_rows, sums = carry
        t = first + i * call.ahead
        for j, (now, dy, reach) in enumerate(zip(*call.rows(refs, ["x", "dy"], t), strict=True)):
            seen, d, open_rows, done = send(t + j, now, dy, reach, before, open_rows)
            if j < taps:
                pl.when((chunk == 0) & (i == 0))(functools.partial(call.write, refs["dtail"], done, b, j))
            # By tap, oldest first; then the bias.
            products = [_seen(reach, n, seen[n] * d) for n in reversed(range(call.W))] + [d]
            sums = tuple(old + new for old, new in zip(sums, products, strict=True))
            before = seen[:taps]
        return before, open_rows, sums

    start = call.before(refs, first), (zeros,) * taps, (zeros,) * (call.W + 1)
    before, open_rows, sums = jax.lax.fori_loop(0, call.C // call.ahead, walk, start)
    for n, total in enumerate(sums):
        call.write(refs["sums"], total, b, chunk, n)
    after = zip(*(rows[:taps] for rows in call.rows(refs, ["x", "dy"], first + call.C)), strict=True)
    for j, (now, dy, reach) in enumerate(after):
        seen, _, open_rows, _ = send(first + call.C + j, now, dy, reach, before, open_rows)
        before = seen[:taps]


def _where(condition, x, y):
    return jnp.where(jax.lax.broadcast_in_dim(condition, x.shape, ()), x, y)


def _seen(reach, n, x):
    """``x`` where the token sees as many before it."""
    return x if reach is None else _where(reach >= n, x, jnp.zeros_like(x))


def _sigmoid(x):
    return 1 / (1 + jnp.exp(-x))
