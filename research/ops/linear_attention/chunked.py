"""The chunked form: quadratic inside a chunk, recurrent from chunk to chunk. It trains; time is linear in T.

Both passes scan over blocks of J chunks in the caller's [B, T, H, ·] layout, transposing one block at a time. Under
differentiation the forward pass saves the state before every ``interval`` tokens; the backward pass walks the blocks the
other way and recomputes everything else.
"""

from typing import Any

import jax
import jax.numpy as jnp

from research.ops.linear_attention import channel_gates, state, token_gates


def forward(q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, state_BHKV, *, scale, interval, chunk_size, save):
    """Returns (o_BTHV, state_BHKV, saved_NBHKV); the states before each interval, or None unless ``save``."""
    gates = _gates(g_BTH)
    B, T, H, _ = v_BTHV.shape
    C, dtype = chunk_size, state_BHKV.dtype
    J = _at_once(interval, C, T, B * H, beta_BTH is not None)
    xs = jax.tree.map(lambda x: _pad(x, C * J), (q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH))
    padded = xs[2].shape[1]

    def body(carry, block) -> Any:
        S_MKV, o_BTHV = carry
        q, k, v, g, beta = jax.tree.map(lambda x: _load(x, block, J, C, dtype), xs)
        chunk, _ = gates.prepare(q, k, g, beta, B * H)
        u, _, S_JMKV, next_MKV = state.states(chunk, v, beta, S_MKV)
        o_BTHV = _store(o_BTHV, scale * state.read(chunk, u, S_JMKV), block)
        return (next_MKV, o_BTHV), S_JMKV[:: interval // C] if save else None

    o_BTHV = jnp.zeros_like(xs[2])
    S_MKV = state_BHKV.reshape(-1, *state_BHKV.shape[2:])
    (S_MKV, o_BTHV), saved = jax.lax.scan(body, (S_MKV, o_BTHV), jnp.arange(padded // (C * J), dtype=jnp.int32))
    saved_NBHKV = None if saved is None else saved.reshape(-1, *state_BHKV.shape)[: -(-T // interval)]
    return o_BTHV[:, :T], S_MKV.reshape(state_BHKV.shape), saved_NBHKV


def backward(
    q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, saved_NBHKV, do_BTHV, dstate_BHKV, *, scale, interval, chunk_size
):
    """Cotangents of (q, k, v, g, beta, initial state)."""
    gates = _gates(g_BTH)
    B, T, H, _ = v_BTHV.shape
    C, dtype = chunk_size, dstate_BHKV.dtype
    J = _at_once(interval, C, T, B * H, beta_BTH is not None)
    inputs = (q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH)
    xs = jax.tree.map(lambda x: _pad(x, C * J), inputs)
    do_BTHV = _pad(do_BTHV, C * J)
    blocks = do_BTHV.shape[1] // (C * J)
    # Nothing is read from, or written to, a state in a block's tail: it may be anything.
    saved_NBHKV = jnp.pad(saved_NBHKV, [(0, blocks * C * J // interval - saved_NBHKV.shape[0])] + [(0, 0)] * 4)

    def body(carry, step):
        dS_MKV, grads = carry
        block, S_IMKV = step
        q, k, v, g, beta = jax.tree.map(lambda x: _load(x, block, J, C, dtype), xs)
        do = scale * _load(do_BTHV, block, J, C, dtype)
        chunk, inside = gates.prepare(q, k, g, beta, B * H)
        u, U, S_JMKV = state.states_again(chunk, v, beta, S_IMKV)
        d, dv, dbeta, dS_MKV = state.backward(chunk, u, U, beta, S_JMKV, do, dS_MKV)
        dq, dk, dg, dbeta_A = gates.backward(q, k, g, beta, chunk, inside, d)
        new = (dq, dk, dv, dg, None if dbeta is None else dbeta(dbeta_A))
        grads = jax.tree.map(lambda x, d: _store(x, d, block), grads, new)
        return (dS_MKV, grads), None

    grads = jax.tree.map(jnp.zeros_like, xs)
    dS_MKV = dstate_BHKV.reshape(-1, *dstate_BHKV.shape[2:])
    steps = (jnp.arange(blocks, dtype=jnp.int32), saved_NBHKV.reshape(blocks, -1, *dS_MKV.shape))
    (dS_MKV, grads), _ = jax.lax.scan(body, (dS_MKV, grads), steps, reverse=True)
    return (*jax.tree.map(lambda x: x[:, :T], grads), dS_MKV.reshape(dstate_BHKV.shape))


def _at_once(interval, C, T, rows, delta):
    """How many chunks a block holds: whole intervals. With the delta rule more would be slow to compile, each with products of
    its own; additive writes share theirs, as long as the cache holds them."""
    intervals = 1 if delta else max(1, min(8 * C, 2048 // rows) // interval)
    return interval // C * min(intervals, -(-T // interval))


def _gates(g_BTH) -> Any:
    return channel_gates if g_BTH is not None and g_BTH.ndim == 4 else token_gates


def _pad(x_BT, length):
    """Fill the last block: zeros write nothing and decay nothing."""
    missing = -x_BT.shape[1] % length
    return x_BT if missing == 0 else jnp.pad(x_BT, [(0, 0), (0, missing)] + [(0, 0)] * (x_BT.ndim - 2))


def _load(x_BTH, block, J, C, dtype):
    """J chunks of [B, T, H, ·] as [J, B·H, C, ·]."""
    B, _, H, *rest = x_BTH.shape
    x_BJCH = jax.lax.dynamic_slice_in_dim(x_BTH, block * (J * C), J * C, axis=1).reshape(B, J, C, H, *rest)
    return jnp.transpose(x_BJCH, (1, 0, 3, 2, *range(4, x_BJCH.ndim))).astype(dtype).reshape(J, B * H, C, *rest)


def _store(x_BTH, value_JMC, block):
    """The inverse of ``_load``, written in place."""
    B, _, H, *rest = x_BTH.shape
    J, _, C = value_JMC.shape[:3]
    value_JBHC = value_JMC.reshape(J, B, H, C, *rest)
    value_BJCH = jnp.transpose(value_JBHC, (1, 0, 3, 2, *range(4, value_JBHC.ndim))).astype(x_BTH.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x_BTH, value_BJCH.reshape(B, J * C, H, *rest), block * (J * C), axis=1)
