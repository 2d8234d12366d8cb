"""The token scan: the definition of the recurrence.

    S ← e^g S                        decay first
    u = v, or β (v − Sᵀ k)           additive, or the delta rule on the decayed state
    S ← S + k uᵀ
    o = scale · Sᵀ q                 after the write

The delta rule is that of Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, eq. 10): S ← e^g (I − β k kᵀ) S + β k vᵀ. The
formula ``γ S + β (I − k kᵀ) k vᵀ`` found in some lecture notes is a slip: with unit keys its second term vanishes.
"""

import jax
import jax.numpy as jnp


def step(q_BGK, k_BGK, v_BHV, g_BH, beta_BH, state_BHKV, scale):
    """One token. ``g_BH`` is None, [B, H] or [B, H, K]; everything is in the accumulation dtype."""
    heads_per_group = v_BHV.shape[1] // k_BGK.shape[1]
    q_BHK = jnp.repeat(q_BGK, heads_per_group, axis=1)
    k_BHK = jnp.repeat(k_BGK, heads_per_group, axis=1)
    if g_BH is not None:
        decay = jnp.exp(g_BH)
        state_BHKV = state_BHKV * (decay[..., None, None] if decay.ndim == 2 else decay[..., None])
    u_BHV = v_BHV
    if beta_BH is not None:
        u_BHV = beta_BH[..., None] * (v_BHV - jnp.sum(state_BHKV * k_BHK[..., None], axis=2))
    state_BHKV = state_BHKV + k_BHK[..., None] * u_BHV[..., None, :]
    o_BHV = scale * jnp.sum(state_BHKV * q_BHK[..., None], axis=2)
    return o_BHV, state_BHKV


def recurrent(q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, state_BHKV, scale):
    """Scan ``step`` over the tokens; memory and time are linear in T, parallelism is none."""
    dtype = state_BHKV.dtype

    def body(state_BHKV, token):
        q_BGK, k_BGK, v_BHV, g_BH, beta_BH = jax.tree.map(lambda x: x.astype(dtype), token)
        o_BHV, state_BHKV = step(q_BGK, k_BGK, v_BHV, g_BH, beta_BH, state_BHKV, scale)
        return state_BHKV, o_BHV.astype(v_BTHV.dtype)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH))
    state_BHKV, o_TBHV = jax.lax.scan(body, state_BHKV, tokens)
    return jnp.moveaxis(o_TBHV, 0, 1), state_BHKV
