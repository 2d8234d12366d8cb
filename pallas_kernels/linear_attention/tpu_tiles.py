"""What the TPU kernels are made of: products, exact splits, masks, heads in and out of blocks, and lockstep.

A head's chunk is a handful of [128, 128] tiles, and one product waits for the one before it. So a grid step holds several
heads, each written as a generator that yields between stages, and ``lockstep`` advances them together: the stages of one
head hide the latencies of the others.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128


def lockstep(heads):
    """Run generators stage by stage, side by side; their return values in order."""
    heads = list(heads)
    results = [None] * len(heads)
    live = list(range(len(heads)))
    while live:
        for i in tuple(live):
            try:
                next(heads[i])
            except StopIteration as done:
                results[i] = done.value
                live.remove(i)
    return results


def top_bits(x):
    """The bfloat16 above ``x`` towards zero, as float32: the remainder is exact, and no compiler may fold it away."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def split(x, parts):
    """bfloat16 arrays that sum to float32 ``x``: exactly with three."""
    out = []
    for _ in range(parts - 1):
        high = top_bits(x)
        out.append(high.astype(jnp.bfloat16))
        x = x - high
    return [*out, x.astype(jnp.bfloat16)]


def split_row(x):
    """The three parts of ``split``, still float32: for a row that is yet to be laid out."""
    high = top_bits(x)
    middle = top_bits(x - high)
    return high, middle, x - high - middle


class Products(NamedTuple):
    """Matrix products of a kernel: operands in ``dtype`` (float32 at the highest precision), float32 out."""

    dtype: Any
    interpret: bool

    def dot(self, x, y, contract=((1,), (0,))):
        """Operands as they are."""
        if self.interpret:  # XLA:CPU lacks some bfloat16 products; these operands' float32 products are the same
            x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return jax.lax.dot_general(x, y, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)

    def nn(self, x, y):
        """x y."""
        return self.dot(x.astype(self.dtype), y.astype(self.dtype))

    def nt(self, x, y):
        """x yᵀ."""
        return self.dot(x.astype(self.dtype), y.astype(self.dtype), ((1,), (1,)))

    def tn(self, x, y):
        """xᵀ y."""
        return self.dot(x.astype(self.dtype), y.astype(self.dtype), ((0,), (0,)))

    def sums(self, x, constant):
        """x times a matrix of zeros and ones, to 16 bits of x more than ``dtype`` needs: cotangents of gates."""
        parts = split(x, 3 if self.dtype == jnp.float32 else 2)
        return self.dot(jnp.concatenate(parts, axis=1), jnp.concatenate([constant] * len(parts), axis=0))

    def three_pass(self, x, y):
        """x y to float32 accuracy but for the product of the two remainders."""
        if self.dtype == jnp.float32:
            return self.nn(x, y)
        (xh, xl), (yh, yl) = split(x, 2), split(y, 2)
        return self.dot(jnp.concatenate([xh, xh, xl], axis=1), jnp.concatenate([yh, yl, yh], axis=0))


def iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def widen(x, width):
    """Columns that are all alike, as many as ``width`` (a multiple of LANES)."""
    return x if x.shape[1] == width else jnp.concatenate([x] * (width // x.shape[1]), axis=1)


def column(row, width):
    """[1, C] as [C, width], every column alike."""
    return jnp.broadcast_to(row, (width, row.shape[1])).T


class Heads:
    """One array's block of heads, [1, C, n, K] (the caller's layout, read and written with a stride) or [1, C, n·K]."""

    def __init__(self, ref, n, width):
        self.ref, self.n, self.width = ref, n, width
        self.direct = len(ref.shape) == 4
        self.packed = self.direct and ref.dtype == jnp.bfloat16
        self.words, self.values = {}, {}
        C = ref.shape[1]
        if self.packed:
            # Two neighbouring heads share a 32-bit word.
            self.rows = ref.bitcast(jnp.uint32).reshape(C * n // 2, width)
        elif self.direct:
            self.rows = ref.reshape(C * n, width)

    def _at(self, h):
        n = self.n // 2 if self.packed else self.n
        return pl.ds(h, self.ref.shape[1], stride=n)

    def load(self, h):
        """Head ``h`` as float32 [C, K]."""
        if not self.direct:
            return self.ref[0, :, h * self.width : (h + 1) * self.width].astype(jnp.float32)
        if not self.packed:
            return self.rows[self._at(h), :].astype(jnp.float32)
        if h // 2 not in self.words:
            self.words[h // 2] = self.rows[self._at(h // 2), :]
        word = self.words[h // 2]
        word = word & jnp.uint32(0xFFFF0000) if h % 2 else word << 16
        return jax.lax.bitcast_convert_type(word, jnp.float32)

    def _apart(self, h, c, scratch):
        """Tokens c, 8 + c, 16 + c, … of head ``h``. A stride wants rows of 128 lanes: heads side by side go through scratch."""
        count = self.ref.shape[1] // 8
        if self.direct:
            return self.rows, (pl.ds(c * self.n + h, count, stride=8 * self.n), slice(None))
        return scratch, (pl.ds(c, count, stride=8), slice(None))

    def load_apart(self, h, scratch):
        """Head ``h`` (float32) as eight arrays [C/8, K]: every eighth token, from the first on, from the second on, ..."""
        if not self.direct:
            scratch[...] = self.ref[0, :, h * self.width : (h + 1) * self.width]
        return [ref[at] for ref, at in (self._apart(h, c, scratch) for c in range(8))]

    def store_apart(self, h, values, scratch):
        for c, value in enumerate(values):
            ref, at = self._apart(h, c, scratch)
            ref[at] = value
        if not self.direct:
            self.ref[0, :, h * self.width : (h + 1) * self.width] = scratch[...]

    def store(self, h, value):
        """Head ``h``; with packed words, when its neighbour has come too."""
        value = value.astype(self.ref.dtype)
        if not self.direct:
            self.ref[0, :, h * self.width : (h + 1) * self.width] = value
        elif not self.packed:
            self.rows[self._at(h), :] = value
        else:
            self.values[h] = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)
            low, high = self.values.get(h & ~1), self.values.get(h | 1)
            if low is not None and high is not None:
                self.rows[self._at(h // 2), :] = (low >> 16) | high
