"""Packed documents and padding, folded into the arguments of the recurrence.

A reset is a log-decay of −inf; a padding token decays nothing (0), writes nothing (k = v = β = 0) and reads nothing
(q = 0). Selecting, never multiplying, keeps NaN in padded positions out of values and gradients.
"""

import jax.numpy as jnp

from research.ops.segments import select


def fold(real_BT, reset_BT, q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH, dtype):
    """(q, k, v, g, beta) with segments and padding folded in; ``g_BTH`` may be None, [B, T, H] or [B, T, H, K]."""
    if g_BTH is None:
        g_BTH = jnp.zeros(v_BTHV.shape[:3], dtype)
    q_BTGK, k_BTGK, v_BTHV, g_BTH = (select(real_BT, x) for x in (q_BTGK, k_BTGK, v_BTHV, g_BTH))
    g_BTH = jnp.where(reset_BT.reshape(reset_BT.shape + (1,) * (g_BTH.ndim - 2)), -jnp.inf, g_BTH)
    return q_BTGK, k_BTGK, v_BTHV, g_BTH, None if beta_BTH is None else select(real_BT, beta_BTH)
