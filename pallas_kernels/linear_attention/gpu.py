"""The chunked linear recurrence on Hopper GPUs, additive or, without per-channel decay, delta: layouts and launches.

Forward is one walk over the chunks that reads outputs on the way. Where rows, heads and value columns are too few to fill the
card, the sequence is cut into parts: every part's state from zero first, then the states between parts in XLA (one decay a
head or channel, or by the delta rule a matrix, which walks beside the state), then the walk. Backward walks twice: forward for
the state before every chunk, in parallel from the saved ones, and back for the cotangent of the state after it, with dv on the
way. Then it takes dq, dk and dg of all chunks at once. Before any walk, either way and in all chunks at once, the delta rule
solves, and gates of a token and channel are multiplied into queries, keys and the pairs inside.

Products are wgmma's: bfloat16 operands, float32 sums. States are float32 from chunk to chunk.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.hopper import PROCESSORS, launch, not_hopper
from pallas_kernels.linear_attention import gpu_channel_gates, gpu_delta, gpu_gradients
from pallas_kernels.linear_attention.gpu_scan import COLUMNS, ERASE, LOG2_E, C, Walk, walk
from pallas_kernels.linear_attention.gpu_solve import inverse

LARGEST_KEY = 128  # a state of more rows would spill
_SHORTEST_PART = 16  # chunks
# A weaker write counts as one of this strength, which no product here can see: dβ divides what was written by β.
_WEAKEST = 2.0**-40


def refuses(q_BTGK, k_BTGK, v_BTHV, g, beta_BTH, state_BHKV, interval) -> str | None:
    """Why the kernels cannot serve the call, or None."""
    if g is not None and g.ndim == 4 and beta_BTH is not None:
        return "its delta rule takes gates one a token and head, and log_decay has one a channel"
    if state_BHKV.dtype != jnp.float32:
        return f"it keeps a float32 state, and these inputs want {state_BHKV.dtype}"
    if any(x.dtype != jnp.bfloat16 for x in (q_BTGK, k_BTGK, v_BTHV)):
        return f"it takes bfloat16, got {q_BTGK.dtype} queries, {k_BTGK.dtype} keys and {v_BTHV.dtype} values"
    if k_BTGK.shape[3] > LARGEST_KEY:
        return f"it takes K up to {LARGEST_KEY}, got K = {k_BTGK.shape[3]}"
    if v_BTHV.shape[1] > interval and interval % C:
        return f"its chunks are {C} tokens, and states are saved every {interval}"
    return not_hopper()


def _seen(beta):
    beta = beta.astype(jnp.float32)
    return jnp.where(jnp.abs(beta) < _WEAKEST, _WEAKEST, beta)


def forward(q_BTGK, k_BTGK, v_BTHV, g, beta_BTH, state_BHKV, *, scale, interval, save, interpret=None, parts=None):
    """(o_BTHV, state_BHKV, saved_NBHKV or None): ``saved`` holds the state before every ``interval`` tokens. ``parts``: into
    how many the sequence is cut; None fills the card."""
    call = _Call(q_BTGK, k_BTGK, v_BTHV, g, beta_BTH, scale, interval, interpret, parts)
    q, k, v = call.keys(q_BTGK), call.keys(k_BTGK), call.values(v_BTHV)
    q, k, gates, X = call.inside(q, k, g, beta_BTH)
    first = call.pad_state(state_BHKV)
    starts = call.starts(k, v, q, gates, X, first, reverse=False)
    w = call.walk(read=True, out=True, keep=call.per_state if save else 0, kept_dtype=jnp.float32)
    end, kept, o = walk(w, k, v, q, gates, X, starts, call.launch)
    cut = (..., slice(call.K), slice(call.V))
    saved = kept[: -(-call.T // interval)][cut] if save else None
    return o[:, : call.T, :, : call.V], end[-1][cut], saved


def backward(
    q_BTGK,
    k_BTGK,
    v_BTHV,
    g,
    beta_BTH,
    saved_NBHKV,
    do_BTHV,
    dstate_BHKV,
    *,
    scale,
    interval,
    interpret=None,
    parts=None,
):
    """Cotangents of (q, k, v, g, beta, initial state)."""
    call = _Call(q_BTGK, k_BTGK, v_BTHV, g, beta_BTH, scale, interval, interpret, parts)
    q, k, v, do = call.keys(q_BTGK), call.keys(k_BTGK), call.values(v_BTHV), call.values(do_BTHV)
    q_in, k_out, gates, X = call.inside(q, k, g, beta_BTH)
    S_NBHKV, u = call.every_state(k_out, v, gates, X, call.pad_state(saved_NBHKV))
    starts = call.starts(q_in, do, k_out, gates, X, call.pad_state(dstate_BHKV), reverse=True)
    w = call.walk(reverse=True, read=True, out=True, keep=1, kept_dtype=jnp.bfloat16)
    end, dS_NBHKV, dv = walk(w, q_in, do, k_out, gates, X, starts, call.launch)
    dq, dk, dg = call.gradients(q, k, u, do, dv, S_NBHKV, dS_NBHKV, g, gates)
    dbeta = call.strength_gradient(u, dv, beta_BTH).astype(beta_BTH.dtype) if call.delta else None
    dq, dk = (x[:, : call.T, :, : call.K] for x in (dq, dk))
    return dq, dk, dv[:, : call.T, :, : call.V], dg, dbeta, end[0][..., : call.K, : call.V]


class _Call:
    """The sizes of one call; its arrays padded to whole blocks."""

    def __init__(self, q_BTGK, k_BTGK, v_BTHV, g, beta_BTH, scale, interval, interpret, parts):
        self.B, self.T, self.H, self.V = v_BTHV.shape
        self.G, self.K = k_BTGK.shape[2:]
        self.Kp, self.Vp = (-(-width // COLUMNS) * COLUMNS for width in (self.K, self.V))
        self.channels = g is not None and g.ndim == 4
        self.gated, self.delta, self.scale = g is not None and not self.channels, beta_BTH is not None, scale
        self.per_state = -(-interval // C)
        chunks = -(-self.T // C)
        if parts is None:
            blocks = self.B * self.H * self.Vp // COLUMNS
            parts = 1 if blocks >= PROCESSORS else max(1, min(chunks // _SHORTEST_PART, 2 * PROCESSORS // blocks))
        # Parts end where a state is saved.
        self.of_part = -(-chunks // (parts * self.per_state)) * self.per_state
        self.parts = -(-chunks // self.of_part)
        self.chunks = self.parts * self.of_part
        self.launch = functools.partial(launch, interpret=interpret)

    def walk(self, **options):
        G = self.H if self.channels else self.G
        sizes = dict(B=self.B, H=self.H, G=G, K=self.Kp, V=self.Vp, parts=self.parts, chunks=self.of_part)
        static: dict[str, Any] = dict(
            gated=self.gated,
            prepared=self.channels,
            delta=self.delta,
            scale=self.scale,
            reverse=False,
            keep=0,
            kept_dtype=None,
            read=False,
            out=False,
        )
        return Walk(**(sizes | static | options))

    def keys(self, x_BTGK):
        return self._pad(x_BTGK, self.Kp)

    def values(self, x_BTHV):
        return self._pad(x_BTHV.astype(jnp.bfloat16), self.Vp)

    def _pad(self, x, width):
        pads = [(0, 0), (0, self.chunks * C - self.T), (0, 0), (0, width - x.shape[3])]
        return jnp.pad(x, pads) if any(map(any, pads)) else x

    def pad_state(self, x):
        pads = [(0, 0)] * (x.ndim - 2) + [(0, self.Kp - self.K), (0, self.Vp - self.V)]
        return jnp.pad(x, pads) if any(map(any, pads)) else x

    def _of_chunks(self, g_BTH):
        g = jnp.pad(g_BTH, [(0, 0), (0, self.chunks * C - self.T), (0, 0)])
        return jnp.transpose(g, (0, 2, 1)).reshape(self.B, self.H, self.chunks, C)

    def gates(self, g_BTH):
        """[B, H, N, 5, C]: running sums in bits, coarse and fine; decay from the chunk's start, to its end, and across.

        A span is the difference of two running sums, and exact all the same: a multiple of 2⁻⁸ up to 64 · 200 log₂ e in
        size has all its bits in float32, and the rests are below 2⁻⁹, their sums off by 2⁻²⁷ at most.
        """
        if g_BTH is None:
            return None
        bits = self._of_chunks(jnp.maximum(g_BTH.astype(jnp.float32), ERASE) * LOG2_E)
        parts = jnp.round(bits * 256) / 256
        coarse, fine = jnp.cumsum(parts, axis=-1), jnp.cumsum(bits - parts, axis=-1)
        start = jnp.exp2(coarse + fine)
        end = jnp.exp2((coarse[..., -1:] - coarse) + (fine[..., -1:] - fine))
        across = jnp.broadcast_to(start[..., -1:], start.shape)
        return jnp.stack([coarse, fine, start, end, across], axis=-2)

    def channel_gates(self, g_BTHK):
        return self._pad(g_BTHK.astype(jnp.float32), self.Kp)

    def inside(self, q, k, g, beta_BTH):
        """(q, k, gates, what comes from inside every chunk: the delta rule's solve, or prepared pairs, or None), as walks take
        them."""
        if self.channels:
            return gpu_channel_gates.prepare(self.sizes(), q, k, self.channel_gates(g), self.launch)
        gates = self.gates(g)
        X = inverse(k, self._of_chunks(_seen(beta_BTH)), gates, self.launch) if self.delta else None
        return q, k, gates, X

    def sizes(self):
        return gpu_gradients.Gradients(self.B, self.H, self.G, self.Kp, self.Vp, self.chunks, self.gated, self.scale)

    def starts(self, x, y, r, gates, X, first_BHKV, reverse):
        """The state before every part, [parts, B, H, K, V]; in reverse, after every part."""
        if self.parts == 1:
            return first_BHKV[None]
        zeros = jnp.zeros((self.parts, *first_BHKV.shape), jnp.float32)
        w = self.walk(reverse=reverse)
        if self.delta:
            # The part's map, from the identity: columns beside the state's, where nothing is written.
            w = self.walk(reverse=reverse, read=reverse, V=self.Vp + self.Kp)
            y = jnp.pad(y, [(0, 0)] * 3 + [(0, self.Kp)])
            eye = jnp.broadcast_to(jnp.eye(self.Kp, dtype=jnp.float32), (*zeros.shape[:-1], self.Kp))
            zeros = jnp.concatenate([zeros, eye], axis=-1)
        ends, _, _ = walk(w, x, y, r, gates, X, zeros, self.launch)
        ends, maps = ends[..., : self.Vp], ends[..., self.Vp :]
        across: Any = jnp.ones((self.parts,))
        if self.gated and not self.delta:
            spans = gates[..., 0, -1] + gates[..., 1, -1]
            spans = jnp.sum(spans.reshape(self.B, self.H, self.parts, self.of_part), axis=-1)
            across = jnp.moveaxis(jnp.exp2(spans), 2, 0)[..., None, None]
        if self.channels:
            decays = jnp.prod(gates.reshape(self.B, self.H, self.parts, self.of_part, self.Kp), axis=3)
            across = jnp.moveaxis(decays, 2, 0)[..., None]

        def body(S_BHKV, part):
            across, end_BHKV = part
            if self.delta:
                return jnp.matmul(across, S_BHKV, precision=jax.lax.Precision.HIGHEST) + end_BHKV, S_BHKV
            return across * S_BHKV + end_BHKV, S_BHKV

        return jax.lax.scan(body, first_BHKV, (maps if self.delta else across, ends), reverse=reverse)[1]

    def every_state(self, k, v, gates, X, saved_NBHKV):
        """(The state before every chunk, what every token writes), bfloat16, from the states before every ``per_state`` chunks:
        one part each."""
        missing = self.chunks // self.per_state - saved_NBHKV.shape[0]
        saved_NBHKV = jnp.pad(saved_NBHKV, [(0, missing)] + [(0, 0)] * 4)
        if self.per_state == 1 and not self.delta:
            return saved_NBHKV.astype(jnp.bfloat16), v
        sizes = dict(parts=saved_NBHKV.shape[0], chunks=self.per_state)
        w = self.walk(keep=1, kept_dtype=jnp.bfloat16, out=self.delta, **sizes)
        _, kept, u = walk(w, k, v, None, gates, X, saved_NBHKV, self.launch)
        return kept, u if self.delta else v

    def gradients(self, q, k, u, do, dv, S_NBHKV, dS_NBHKV, g, gates):
        """(dq, dk of whole blocks, dg or None); ``u`` is what was written."""
        s = self.sizes()
        if self.channels:
            of_chunks = gpu_channel_gates.between_chunks(s, u, do, S_NBHKV, dS_NBHKV, gates, self.launch)
            dq, dk, dg = gpu_channel_gates.within_chunks(s, q, k, self.channel_gates(g), of_chunks, self.launch)
            return dq, dk, dg[:, : self.T, :, : self.K].astype(g.dtype)
        dq, of_queries = gpu_gradients.query_gradient(s, q, k, u, do, S_NBHKV, dS_NBHKV, gates, self.launch)
        if self.delta:
            dk, of_keys = gpu_delta.key_gradient(s, q, k, u, do, dv, S_NBHKV, dS_NBHKV, gates, self.launch)
        else:
            dk, of_keys = gpu_gradients.key_gradient(s, q, k, u, do, dS_NBHKV, gates, self.launch)
        return dq, dk, None if g is None else self.gate_gradient(of_queries, of_keys).astype(g.dtype)

    def strength_gradient(self, u, dv, beta_BTH):
        """[B, T, H]: a token writes u = β e and its value's cotangent is dv = β de, so dβ = ⟨e, de⟩."""
        both = jnp.sum(u.astype(jnp.float32) * dv.astype(jnp.float32), axis=-1)[:, : self.T]
        return both / jnp.square(_seen(beta_BTH))

    def gate_gradient(self, of_queries, of_keys):
        """[B, T, H] from the pieces of every chunk, each [B, H, N, C]: a gate gathers from the pairs around it, from the reads
        of the chunk's state at and after it, from the writes before it, and from the state that crosses."""
        rows, state, pairs = of_queries
        ends, *of_solve = of_keys
        if of_solve:
            rows, pairs = rows + of_solve[0], pairs + of_solve[1]
        after = jnp.flip(jnp.cumsum(jnp.flip(rows, -1), axis=-1), -1)
        before = jnp.cumsum(ends, axis=-1) - ends
        dg = pairs + after + before + jnp.sum(state, axis=-1, keepdims=True)
        return jnp.transpose(dg.reshape(self.B, self.H, self.chunks * C)[..., : self.T], (0, 2, 1))
