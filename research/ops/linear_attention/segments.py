"""Packed documents and padding, folded into the arguments of the recurrence.

A reset is a log-decay of −inf; a padding token decays nothing (0), writes nothing (k = v = β = 0) and reads nothing
(q = 0). Selecting, never multiplying, keeps NaN in padded positions out of values and gradients.
"""

import jax
import jax.numpy as jnp


def real_and_reset(segment_ids_BT):
    """Which tokens are real (id > 0), and which reset the state: those whose id differs from the last non-zero id before
    them. The first real token of a row does not reset: the initial state belongs to its segment."""
    real_BT = segment_ids_BT > 0
    position_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    latest_BT = jax.lax.cummax(jnp.where(real_BT, position_T, -1), axis=1)
    before_BT = jnp.pad(latest_BT[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
    previous_BT = jnp.take_along_axis(segment_ids_BT, jnp.maximum(before_BT, 0), axis=1)
    return real_BT, real_BT & (before_BT >= 0) & (previous_BT != segment_ids_BT)


def select(real_BT, x_BT):
    """``x`` where the token is real, zero where it is padding."""
    return jnp.where(real_BT.reshape(real_BT.shape + (1,) * (x_BT.ndim - 2)), x_BT, 0)


def gates(real_BT, reset_BT, g_BTH):
    """The log-decay with padding at 0 and resets at −inf."""
    shape = real_BT.shape + (1,) * (g_BTH.ndim - 2)
    return jnp.where(reset_BT.reshape(shape), -jnp.inf, jnp.where(real_BT.reshape(shape), g_BTH, 0))
