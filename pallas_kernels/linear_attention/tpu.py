"""The chunked linear recurrence on TPU: layouts, padding and the two ``pallas_call``s around ``tpu_bodies``.

A grid step is one chunk of up to 16 value heads of one row; chunks are the innermost, sequential axis, and the state of those
heads stays in VMEM. Arrays come and go in the caller's [B, T, heads, width] layout, a head of a block read with a stride, when
the block holds a multiple of 8 heads; otherwise heads lie side by side in lanes, which costs XLA a copy.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention import tpu_channel_gates
from pallas_kernels.linear_attention.tpu_bodies import Sizes, backward_kernel, forward_kernel
from pallas_kernels.linear_attention.tpu_tiles import LANES, Products

_SMALLEST_CHUNK = 16  # rows of a bfloat16 tile
_LARGEST_CHUNK = 128
_VMEM_BYTES = 64 * 1024 * 1024


def refuses(q_BTGK, k_BTGK, v_BTHV, g, beta_BTH, state_BHKV, interval) -> str | None:
    """Why the kernels cannot serve the call, or None."""
    if state_BHKV.dtype != jnp.float32:
        return f"it keeps a float32 state, and these inputs want {state_BHKV.dtype}"
    if v_BTHV.dtype not in (jnp.float32, jnp.bfloat16) or q_BTGK.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, got {q_BTGK.dtype} queries and {v_BTHV.dtype} values"
    if g is not None and g.ndim == 4 and g.shape[3] > LANES:
        return f"its gates a channel end at K = {LANES}, got K = {g.shape[3]}"
    chunks = -(-v_BTHV.shape[1] // interval)
    if chunks > 1 and not _SMALLEST_CHUNK <= interval <= _LARGEST_CHUNK:
        return f"its chunks are {_SMALLEST_CHUNK} to {_LARGEST_CHUNK} tokens, got chunk_size={interval}"
    return None


def forward(q_BTGK, k_BTGK, v_BTHV, g, beta_BTH, state_BHKV, *, scale, interval, save, interpret=False):
    """(o_BTHV, state_BHKV, saved_NBHKV or None): ``saved`` holds the state before every ``interval`` tokens."""
    call = _Call(q_BTGK, k_BTGK, v_BTHV, g, beta_BTH, scale, interval, bool(interpret))
    inputs = call.inputs(q_BTGK, k_BTGK, v_BTHV, g, beta_BTH) | {"start": call.state(call.pad_state(state_BHKV))}
    outputs = {"o": call.values(None, v_BTHV.dtype), "state": call.state(state_BHKV)}
    if save:
        outputs["saved"] = call.saved(None)
    out = call.run(forward_kernel, "linear_attention_forward", inputs, outputs, interpret)
    saved = out["saved"][..., : call.K, : call.V] if save else None
    return call.unpad(out["o"], v_BTHV), out["state"][..., : call.K, : call.V], saved


def backward(
    q_BTGK, k_BTGK, v_BTHV, g, beta_BTH, saved_NBHKV, do_BTHV, dstate_BHKV, *, scale, interval, interpret=False
):
    """Cotangents of (q, k, v, g, beta, initial state)."""
    call = _Call(q_BTGK, k_BTGK, v_BTHV, g, beta_BTH, scale, interval, bool(interpret), backwards=True)
    inputs = call.inputs(q_BTGK, k_BTGK, v_BTHV, g, beta_BTH)
    inputs["saved"] = call.saved(call.pad_state(saved_NBHKV))
    inputs["do"] = call.values(do_BTHV, call.dtype)
    inputs["end"] = call.state(call.pad_state(dstate_BHKV))
    partial = call.key_blocks * call.g != call.G
    key_dtype = jnp.float32 if partial else call.dtype
    outputs = {
        "dq": call.keys(None, key_dtype, partial=True),
        "dk": call.keys(None, key_dtype, partial=True),
        "dv": call.values(None, call.dtype),
        "dstate": call.state(dstate_BHKV),
    }
    if g is not None:
        outputs["dg"] = call.rows(None) if g.ndim == 3 else call.channels(None)
    if beta_BTH is not None:
        outputs["dbeta"] = call.rows(None)
    out = call.run(backward_kernel, "linear_attention_backward", inputs, outputs, interpret)
    dq, dk = (call.key_gradient(out[n], x) for n, x in (("dq", q_BTGK), ("dk", k_BTGK)))
    dg = None
    if g is not None:
        dg = call.from_rows(out["dg"], g) if g.ndim == 3 else call.unpad(out["dg"], g)
    dbeta = None if beta_BTH is None else call.from_rows(out["dbeta"], beta_BTH)
    dv = call.unpad(out["dv"], v_BTHV).astype(v_BTHV.dtype)
    return dq, dk, dv, dg, dbeta, out["dstate"][..., : call.K, : call.V]


class _Call:
    """The sizes of one call, and its arrays as (array or shape, BlockSpec)."""

    def __init__(self, q_BTGK, k_BTGK, v_BTHV, g, beta_BTH, scale, interval, interpret, backwards=False):
        self.B, self.T, self.H, self.V = v_BTHV.shape
        self.G, self.K = k_BTGK.shape[2:]
        low = all(x.dtype == jnp.bfloat16 for x in (q_BTGK, k_BTGK, v_BTHV))
        self.dtype = jnp.dtype(jnp.bfloat16 if low else jnp.float32)
        self.C = max(interval, _SMALLEST_CHUNK)
        self.N = -(-self.T // self.C)
        self.Kp, self.Vp = (-(-width // LANES) * LANES for width in (self.K, self.V))
        gate = "none" if g is None else "token" if g.ndim == 3 else "channel"
        most = 8 if self.dtype == jnp.float32 or (gate == "channel" and backwards) else 16
        self.h, self.g = heads_of_a_step(self.H, self.H // self.G, most)
        self.key_blocks = self.H // self.h  # of partial gradients; the key heads of one may be another's too
        self.backwards = backwards
        products = Products(self.dtype, interpret)
        # A chunk with gates a channel has the longer chain of products: more heads hide it.
        together = min(16 if gate == "channel" else 8, self.h)
        self.sizes = Sizes(
            self.N, self.C, self.Kp, self.Vp, self.h, self.g, gate, beta_BTH is not None, scale, products, together
        )

        shape = (together, tpu_channel_gates.SCRATCH, self.C, self.Kp)
        self.scratch = [pltpu.VMEM(shape, jnp.float32)] if gate == "channel" else []

    def inputs(self, q_BTGK, k_BTGK, v_BTHV, g, beta_BTH):
        out: dict[str, Any] = {
            "q": self.keys(q_BTGK, self.dtype),
            "k": self.keys(k_BTGK, self.dtype),
            "v": self.values(v_BTHV, self.dtype),
        }
        if g is not None:
            out["g"] = self.rows(g) if g.ndim == 3 else self.channels(g)
        if beta_BTH is not None:
            out["beta"] = self.rows(beta_BTH)
        return out

    def chunk(self, n):
        return self.N - 1 - n if self.backwards else n

    def keys(self, x_BTGK, dtype, partial=False):
        """Queries, keys or their gradients; partial gradients have their own heads for every block of value heads."""
        block = lambda hb: hb if partial else hb * self.h * self.G // (self.H * self.g)  # noqa: E731
        return self._heads(x_BTGK, self.key_blocks * self.g if partial else self.G, self.g, self.Kp, dtype, block)

    def values(self, x_BTHV, dtype):
        return self._heads(x_BTHV, self.H, self.h, self.Vp, dtype, lambda hb: hb)

    def channels(self, g_BTHK):
        return self._heads(g_BTHK, self.H, self.h, self.Kp, jnp.float32, lambda hb: hb)

    def _heads(self, x_BTH, total, n, width, dtype, block):
        shape = (self.B, self.N * self.C, total, width)
        if n % 8 == 0 and width == LANES:  # Mosaic strides over 128 lanes only
            spec = pl.BlockSpec((1, self.C, n, width), lambda b, hb, c: (b, self.chunk(c), block(hb), 0))
        else:
            shape = (*shape[:2], total * width)
            spec = pl.BlockSpec((1, self.C, n * width), lambda b, hb, c: (b, self.chunk(c), block(hb)))
        if x_BTH is None:
            return jax.ShapeDtypeStruct(shape, dtype), spec
        pads = [(0, 0), (0, self.N * self.C - self.T), (0, 0), (0, width - x_BTH.shape[3])]
        if any(map(any, pads)):
            x_BTH = jnp.pad(x_BTH, pads)
        return x_BTH.astype(dtype).reshape(shape), spec

    def rows(self, x_BTH):
        """[B, T, H] as float32 [B, H / h, N, h, C]: a token's scalars along lanes."""
        shape = (self.B, self.H // self.h, self.N, self.h, self.C)
        spec = pl.BlockSpec((1, 1, 1, self.h, self.C), lambda b, hb, c: (b, hb, self.chunk(c), 0, 0))
        if x_BTH is None:
            return jax.ShapeDtypeStruct(shape, jnp.float32), spec
        x_BTH = jnp.pad(x_BTH.astype(jnp.float32), [(0, 0), (0, self.N * self.C - self.T), (0, 0)])
        x_BNCHh = x_BTH.reshape(self.B, self.N, self.C, self.H // self.h, self.h)
        return jnp.transpose(x_BNCHh, (0, 3, 1, 4, 2)), spec

    def from_rows(self, x, like):
        x_BTH = jnp.transpose(x, (0, 2, 4, 1, 3)).reshape(self.B, self.N * self.C, self.H)
        return x_BTH[:, : self.T].astype(like.dtype)

    def pad_state(self, x):
        pads = [(0, 0)] * (x.ndim - 2) + [(0, self.Kp - self.K), (0, self.Vp - self.V)]
        return jnp.pad(x.astype(jnp.float32), pads)

    def state(self, x):
        spec = pl.BlockSpec((1, self.h, self.Kp, self.Vp), lambda b, hb, c: (b, hb, 0, 0))
        if x.shape[-2:] != (self.Kp, self.Vp):
            x = jax.ShapeDtypeStruct((self.B, self.H, self.Kp, self.Vp), jnp.float32)
        return x, spec

    def saved(self, x):
        spec = pl.BlockSpec((1, 1, self.h, self.Kp, self.Vp), lambda b, hb, c: (self.chunk(c), b, hb, 0, 0))
        shape = (self.N, self.B, self.H, self.Kp, self.Vp)
        return jax.ShapeDtypeStruct(shape, jnp.float32) if x is None else x, spec

    def unpad(self, x, like):
        return x.reshape(self.B, self.N * self.C, like.shape[2], -1)[:, : self.T, :, : like.shape[3]]

    def key_gradient(self, x, like):
        x = x.reshape(self.B, self.N * self.C, self.key_blocks * self.g, self.Kp)[:, : self.T, :, : self.K]
        if x.shape[2] != self.G:
            x = jnp.sum(x.reshape(self.B, self.T, self.G, -1, self.K), axis=3)
        return x.astype(like.dtype)

    def run(self, kernel, name, inputs, outputs, interpret):
        # Inside jax.shard_map, outputs vary over the mesh axes that the inputs vary over.
        varying = jax.typeof(inputs["v"][0]).manual_axis_type
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying) for x, _ in outputs.values()]
        out = pl.pallas_call(
            functools.partial(
                kernel, sizes=self.sizes, given=(*inputs, *outputs, *(["scratch"] if self.scratch else []))
            ),
            grid=(self.B, self.H // self.h, self.N),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in outputs.values()],
            out_shape=shapes,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
            ),
            scratch_shapes=self.scratch,
            interpret=interpret,
            name=name,
        )(*(x for x, _ in inputs.values()))
        return dict(zip(outputs, out, strict=True))


def heads_of_a_step(H, r, most):
    """(value heads, key heads) of a grid step: a divisor of H that holds whole groups of r heads, or parts of one group."""
    fits = [n for n in range(1, min(H, most) + 1) if H % n == 0 and (n % r == 0 or r % n == 0)]
    h = next((n for n in (16, 8) if n in fits), fits[-1])
    return h, max(1, h // r)
