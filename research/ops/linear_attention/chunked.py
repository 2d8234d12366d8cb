"""The chunked form: quadratic inside a chunk, recurrent from chunk to chunk. It trains; time is linear in T.

The forward pass scans over chunks in the caller's [B, T, H, ·] layout, transposing one chunk at a time. Under
differentiation it saves the state before every chunk (and, for the delta rule, the chunk's inverse); the backward pass
walks the chunks the other way and recomputes everything else.
"""

import jax
import jax.numpy as jnp

from research.ops.linear_attention import channel_gates, token_gates


def forward(q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, state_BHKV, *, scale, chunk_size, save):
    """Returns (o_BTHV, state_BHKV, saved); ``saved`` is (states, inverses) by chunk, or None unless ``save``."""
    algebra = _algebra(g_BTH)
    B, T, H, V = v_BTHV.shape
    C = chunk_size
    dtype = state_BHKV.dtype
    xs = jax.tree.map(lambda x: _pad(x, C), (q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH))
    padded = xs[2].shape[1]

    def body(carry, chunk):
        S_MKV, o_BTHV = carry
        q, k, v, g, beta = jax.tree.map(lambda x: _load(x, chunk, C, dtype), xs)
        o_MCV, next_MKV, X_MCC = algebra.forward(q, k, v, g, beta, S_MKV)
        o_BTHV = _store(o_BTHV, scale * o_MCV, chunk)
        return (next_MKV, o_BTHV), (S_MKV, X_MCC) if save else None

    o_BTHV = jnp.zeros((B, padded, H, V), v_BTHV.dtype)
    S_MKV = state_BHKV.reshape(-1, *state_BHKV.shape[2:])
    (S_MKV, o_BTHV), saved = jax.lax.scan(body, (S_MKV, o_BTHV), jnp.arange(padded // C, dtype=jnp.int32))
    return o_BTHV[:, :T], S_MKV.reshape(state_BHKV.shape), saved


def backward(q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, saved, do_BTHV, dstate_BHKV, *, scale, chunk_size):
    """Cotangents of (q, k, v, g, beta, initial state)."""
    algebra = _algebra(g_BTH)
    T = v_BTHV.shape[1]
    C = chunk_size
    dtype = dstate_BHKV.dtype
    inputs = (q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH)
    xs = jax.tree.map(lambda x: _pad(x, C), inputs)
    do_BTHV = _pad(do_BTHV, C)
    chunks = do_BTHV.shape[1] // C

    def body(carry, step):
        dS_MKV, grads = carry
        chunk, (S_MKV, X_MCC) = step
        q, k, v, g, beta = jax.tree.map(lambda x: _load(x, chunk, C, dtype), xs)
        do_MCV = scale * _load(do_BTHV, chunk, C, dtype)
        *new, dS_MKV = algebra.backward(q, k, v, g, beta, S_MKV, X_MCC, do_MCV, dS_MKV)
        grads = jax.tree.map(lambda x, d: _store(x, d, chunk), grads, tuple(new))
        return (dS_MKV, grads), None

    grads = jax.tree.map(jnp.zeros_like, xs)
    dS_MKV = dstate_BHKV.reshape(-1, *dstate_BHKV.shape[2:])
    steps = (jnp.arange(chunks, dtype=jnp.int32), saved)
    (dS_MKV, grads), _ = jax.lax.scan(body, (dS_MKV, grads), steps, reverse=True)
    return (*jax.tree.map(lambda x: x[:, :T], grads), dS_MKV.reshape(dstate_BHKV.shape))


def _algebra(g_BTH):
    return channel_gates if g_BTH is not None and g_BTH.ndim == 4 else token_gates


def _pad(x_BT, C):
    """Fill the last chunk: zeros write nothing and decay nothing."""
    missing = -x_BT.shape[1] % C
    return x_BT if missing == 0 else jnp.pad(x_BT, [(0, 0), (0, missing)] + [(0, 0)] * (x_BT.ndim - 2))


def _load(x_BTH, chunk, C, dtype):
    """One chunk of [B, T, H, ·] as [B·H, C, ·]."""
    x_BCH = jax.lax.dynamic_slice_in_dim(x_BTH, chunk * C, C, axis=1)
    x_BHC = jnp.swapaxes(x_BCH, 1, 2).astype(dtype)
    return x_BHC.reshape(-1, C, *x_BTH.shape[3:])


def _store(x_BTH, value_MC, chunk):
    """The inverse of ``_load``, written in place."""
    B, _, H = x_BTH.shape[:3]
    C = value_MC.shape[1]
    value_BCH = jnp.swapaxes(value_MC.reshape(B, H, C, *x_BTH.shape[3:]), 1, 2).astype(x_BTH.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x_BTH, value_BCH, chunk * C, axis=1)
