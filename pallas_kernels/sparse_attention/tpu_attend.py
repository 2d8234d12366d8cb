"""Softmax attention to selected keys on TPU, a block of queries by a block of keys at a time, forwards and backwards.

The selection comes as words of ``tpu_select``: the bits of a block of keys are of the words of its 4096 keys, all in the same
lanes. Blocks none of whose keys any query of the block selected are passed over. Backwards works on scores that lie keys first,
where a query's numbers (the logarithm of its sum, the mean gain of its scores) are rows, and the words are turned once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_attention.tpu_select import GROUP, LANES

_BLOCK = 512
_VMEM_BYTES = 56 * 1024 * 1024
_MASKED = -1e30
_LEAST = -1e29  # more than what is masked: its weight is 0 even before any key was seen
_WIDEST = 1024


def refuses(q_BTHK, v_BSGV) -> str | None:
    """Why the kernels cannot serve the call, or None."""
    if q_BTHK.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, got {q_BTHK.dtype}"
    widest = max(q_BTHK.shape[-1], v_BSGV.shape[-1])
    if widest > _WIDEST:
        return f"it takes heads of at most {_WIDEST} channels, got {widest}"
    return None


def forward(q_BTHK, k_BSGK, v_BSGV, words_BTW, *, interpret=False):
    """(o_BTHV in v's dtype, lse_BHT float32) of scaled queries; 0 where nothing is selected."""
    call = _Call(q_BTHK, v_BSGV, words_BTW)
    o_BHTV, lse_BH1T = call.run(
        _forward_kernel,
        "sparse_attention_forward",
        call.queries_first(),
        (call.q, call.k, call.v, call.words),
        (call.row(call.V, v_BSGV.dtype), call.line()),
        (pltpu.VMEM((call.bt, LANES), jnp.float32),) * 2 + (pltpu.VMEM((call.bt, call.V), jnp.float32),),
        (q_BTHK, k_BSGK, v_BSGV),
        interpret,
    )
    return jnp.swapaxes(o_BHTV, 1, 2)[:, : call.T], lse_BH1T[:, :, 0, : call.T]


def backward(q_BTHK, k_BSGK, v_BSGV, words_BTW, o_BTHV, lse_BHT, do_BTHV, *, interpret=False):
    """Gradients of (scaled q, k, v)."""
    call = _Call(q_BTHK, v_BSGV, words_BTW)
    mean_BHT = jnp.sum(do_BTHV.astype(jnp.float32) * o_BTHV.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    missing = [(0, 0), (0, 0), (0, 0), (0, call.NT * call.bt - call.T)]
    lines = [jnp.pad(x_BHT[:, :, None], missing) for x_BHT in (lse_BHT, mean_BHT)]
    arrays = (q_BTHK, k_BSGK, v_BSGV, do_BTHV)
    inputs = (call.q, call.k, call.v, call.words, call.do, *(functools.partial(call.given_line, x) for x in lines))
    (dq_BHTK,) = call.run(
        _dq_kernel,
        "sparse_attention_backward_queries",
        call.queries_first(),
        inputs,
        (call.row(call.K, q_BTHK.dtype),),
        (pltpu.VMEM((call.bt, call.K), jnp.float32),),
        arrays,
        interpret,
    )
    dk_BGSK, dv_BGSV = call.run(
        functools.partial(_dkv_kernel, visits=call.R * call.NT),
        "sparse_attention_backward_keys",
        call.keys_first(),
        inputs,
        (call.column(call.K, k_BSGK.dtype), call.column(call.V, v_BSGV.dtype)),
        (pltpu.VMEM((call.bs, call.K), jnp.float32), pltpu.VMEM((call.bs, call.V), jnp.float32)),
        arrays,
        interpret,
    )
    tokens_first = lambda x, length: jnp.swapaxes(x, 1, 2)[:, :length]  # noqa: E731
    return tokens_first(dq_BHTK, call.T), tokens_first(dk_BGSK, call.S), tokens_first(dv_BGSV, call.S)


class _Call:
    """The sizes of one call, its blocks, and the two orders in which they are visited."""

    def __init__(self, q_BTHK, v_BSGV, words_BTW):
        self.B, self.T, self.H, self.K = q_BTHK.shape
        self.S, self.G, self.V = v_BSGV.shape[1:]
        self.R = self.H // self.G
        self.bt = min(_BLOCK, -(-self.T // LANES) * LANES)
        self.bs = min(_BLOCK, -(-self.S // LANES) * LANES)
        self.NT, self.NS = -(-self.T // self.bt), -(-self.S // self.bs)
        self.words_BTW = jnp.pad(words_BTW, [(0, 0), (0, self.NT * self.bt - self.T), (0, 0)])
        # [B, T blocks, W // 128]: bit j says whether any of 128 keys was selected.
        blocks = self.words_BTW.reshape(self.B, self.NT, self.bt, -1, LANES)
        self.live = jax.lax.reduce(blocks, jnp.int32(0), jax.lax.bitwise_or, (2, 4))
        self.per_group = GROUP // self.bs

    def queries_first(self):
        """(grid, its indices → row, query head, block of queries, block of keys)."""
        return (self.B, self.H, self.NT, self.NS), lambda b, h, i, j: (b, h, i, j)

    def keys_first(self):
        """One key head after another; each block of keys meets the queries of all its heads."""
        grid = self.B, self.G, self.NS, self.R * self.NT
        return grid, lambda b, g, j, n: (b, g * self.R + n // self.NT, n % self.NT, j)

    def q(self, arrays, at):
        return self._heads_first(arrays[0], self.bt, self.NT), self._spec(
            (self.bt, self.K), at, lambda b, h, i, j: (b, h, i, 0)
        )

    def do(self, arrays, at):
        return self._heads_first(arrays[3], self.bt, self.NT), self._spec(
            (self.bt, self.V), at, lambda b, h, i, j: (b, h, i, 0)
        )

    def k(self, arrays, at):
        return self._heads_first(arrays[1], self.bs, self.NS), self._spec((self.bs, self.K), at, self._key_block)

    def v(self, arrays, at):
        return self._heads_first(arrays[2], self.bs, self.NS), self._spec((self.bs, self.V), at, self._key_block)

    def words(self, arrays, at):
        spec = pl.BlockSpec(
            (1, self.bt, LANES), lambda *n: (lambda b, h, i, j: (b, i, j // self.per_group))(*at(*n[:4]))
        )
        return self.words_BTW, spec

    def given_line(self, x_BH1T, arrays, at):
        return x_BH1T, self._spec((1, self.bt), at, lambda b, h, i, j: (b, h, 0, i))

    def row(self, width, dtype):
        shape = (self.B, self.H, self.NT * self.bt, width), dtype
        return lambda at: (*shape, self._spec((self.bt, width), at, lambda b, h, i, j: (b, h, i, 0)))

    def line(self):
        shape = (self.B, self.H, 1, self.NT * self.bt), jnp.float32
        return lambda at: (*shape, self._spec((1, self.bt), at, lambda b, h, i, j: (b, h, 0, i)))

    def column(self, width, dtype):
        shape = (self.B, self.G, self.NS * self.bs, width), dtype
        return lambda at: (*shape, self._spec((self.bs, width), at, self._key_block))

    def _key_block(self, b, h, i, j):
        return b, h // self.R, j, 0

    def _heads_first(self, x_BTHK, block, blocks):
        x_BTHK = jnp.pad(x_BTHK, [(0, 0), (0, block * blocks - x_BTHK.shape[1]), (0, 0), (0, 0)])
        return jnp.swapaxes(x_BTHK, 1, 2)

    def _spec(self, block, at, index):
        return pl.BlockSpec((1, 1, *block), lambda *n: index(*at(*n[:4])))

    def run(self, kernel, name, order, inputs, outputs, scratch, arrays, interpret):
        grid, at = order
        given = [make(arrays, at) for make in inputs]
        made = [make(at) for make in outputs]
        # Inside jax.shard_map, outputs vary over the mesh axes that the inputs vary over.
        varying = jax.typeof(arrays[0]).manual_axis_type
        flat_live = self.live.reshape(-1)
        groups, tiles = self.live.shape[2], self.bs // LANES

        def whole(live, *refs):
            b, _, i, j = at(*(pl.program_id(n) for n in range(4)))
            first = j % self.per_group * tiles
            word = live[(b * self.NT + i) * groups + j // self.per_group]
            alive = (jax.lax.shift_right_logical(word, first) & ((1 << tiles) - 1)) != 0
            kernel(*refs, alive=alive, first=first, interpret=bool(interpret))

        return pl.pallas_call(
            whole,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=grid,
                in_specs=[spec for _, spec in given],
                out_specs=[spec for _, _, spec in made],
                scratch_shapes=list(scratch),
            ),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype, _ in made],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
            ),
            interpret=interpret,
            name=name,
        )(flat_live, *(x for x, _ in given))


def _forward_kernel(q, k, v, words, o, lse, top, total, acc, *, alive, first, interpret):
    j = pl.program_id(3)

    @pl.when(j == 0)
    def _():
        top[...] = jnp.full_like(top, _LEAST)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(alive)
    def _():
        word = words[0]
        chosen = [_bit(word, first + c) for c in range(k.shape[2] // LANES)]
        score = _dot(q[0, 0], k[0, 0], ((1,), (1,)), interpret)
        score = [jnp.where(bit, score[:, c * LANES : (c + 1) * LANES], _MASKED) for c, bit in enumerate(chosen)]
        new = jnp.maximum(top[...], _all_lanes(functools.reduce(jnp.maximum, score), jnp.max))
        weight = [jnp.exp(x - new) for x in score]
        keep = jnp.exp(top[...] - new)
        top[...] = new
        total[...] = total[...] * keep + functools.reduce(jnp.add, weight)
        read = _dot(jnp.concatenate(weight, axis=1).astype(v.dtype), v[0, 0], ((1,), (0,)), interpret)
        acc[...] = acc[...] * _wide(keep, acc.shape[1]) + read

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        sums = _all_lanes(total[...], jnp.sum)
        sums = jnp.where(sums == 0, 1.0, sums)
        o[0, 0] = (acc[...] / _wide(sums, acc.shape[1])).astype(o.dtype)
        lse[0, 0] = (top[...] + jnp.log(sums)).T[:1]


def _dq_kernel(q, k, v, words, do, lse, mean, dq, total, *, alive, first, interpret):
    j = pl.program_id(3)

    @pl.when(j == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(alive)
    def _():
        _, slope = _slopes(q, k, v, words, do, lse, mean, first, interpret)
        total[...] += _dot(slope, k[0, 0], ((0,), (0,)), interpret)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        dq[0, 0] = total[...].astype(dq.dtype)


def _dkv_kernel(q, k, v, words, do, lse, mean, dk, dv, k_total, v_total, *, visits, alive, first, interpret):
    n = pl.program_id(3)

    @pl.when(n == 0)
    def _():
        k_total[...] = jnp.zeros_like(k_total)
        v_total[...] = jnp.zeros_like(v_total)

    @pl.when(alive)
    def _():
        weight, slope = _slopes(q, k, v, words, do, lse, mean, first, interpret)
        v_total[...] += _dot(weight.astype(do.dtype), do[0, 0], ((1,), (0,)), interpret)
        k_total[...] += _dot(slope, q[0, 0], ((1,), (0,)), interpret)

    @pl.when(n == visits - 1)
    def _():
        dk[0, 0] = k_total[...].astype(dk.dtype)
        dv[0, 0] = v_total[...].astype(dv.dtype)


def _slopes(q, k, v, words, do, lse, mean, first, interpret):
    """(weights float32, gradients of the scores in q's dtype), keys by queries."""
    turned = words[0].T
    score = _dot(k[0, 0], q[0, 0], ((1,), (1,)), interpret)
    gain = _dot(v[0, 0], do[0, 0], ((1,), (1,)), interpret)
    weights, slopes = [], []
    for c in range(k.shape[2] // LANES):
        rows = slice(c * LANES, (c + 1) * LANES)
        weight = jnp.exp(jnp.where(_bit(turned, first + c), score[rows] - lse[0, 0], _MASKED))
        weights.append(weight)
        slopes.append((weight * (gain[rows] - mean[0, 0])).astype(q.dtype))
    return jnp.concatenate(weights, axis=0), jnp.concatenate(slopes, axis=0)


def _bit(words, n):
    return (words & jax.lax.shift_left(jnp.int32(1), n)) != 0


def _all_lanes(x, reduce):
    return jnp.broadcast_to(reduce(x, axis=1, keepdims=True), x.shape)


def _wide(x, width):
    """128 equal lanes to ``width`` of them."""
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]


def _dot(x, y, contract, interpret):
    if interpret:  # XLA:CPU lacks some bfloat16 products; these operands' float32 products are the same
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)
