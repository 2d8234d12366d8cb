"""The chunked form: quadratic inside a chunk, recurrent from chunk to chunk. It trains; time is linear in T."""

import jax
import jax.numpy as jnp

from research.ops.linear_attention.quadratic import block


def chunked(q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, state_BHKV, scale, chunk_size):
    """Scan ``block`` over chunks of ``chunk_size`` tokens (a power of two)."""
    T, C, dtype = v_BTHV.shape[1], chunk_size, state_BHKV.dtype
    chunks = -(-T // C)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, chunks * C - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, C, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def body(state_BHKV, xs):
        q, k, v, g, beta = jax.tree.map(lambda x: jnp.moveaxis(x.astype(dtype), 1, 2), xs)
        o_BHCV, state_BHKV = block(q, k, v, g, beta, state_BHKV, scale)
        return state_BHKV, jnp.moveaxis(o_BHCV, 2, 1).astype(v_BTHV.dtype)

    xs = jax.tree.map(split, (q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH))
    state_BHKV, o_NBCHV = jax.lax.scan(body, state_BHKV, xs)
    o_BTHV = jnp.moveaxis(o_NBCHV, 0, 1).reshape(v_BTHV.shape[0], chunks * C, *v_BTHV.shape[2:])
    return o_BTHV[:, :T], state_BHKV
