"""Packed documents and padding: which tokens are real, and where a document begins."""

import jax
import jax.numpy as jnp


def real_and_reset(segment_ids_BT, previous_B=None):
    """Which tokens are real (id > 0), and which reset the state: those whose id differs from the last non-zero id before
    them. The first real token of a row does not reset (the initial state belongs to its segment), unless ``previous_B``, the
    last non-zero id before these tokens or 0 for none, says that it does."""
    real_BT = segment_ids_BT > 0
    position_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    latest_BT = jax.lax.cummax(jnp.where(real_BT, position_T, -1), axis=1)
    before_BT = jnp.pad(latest_BT[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
    previous_BT = jnp.take_along_axis(segment_ids_BT, jnp.maximum(before_BT, 0), axis=1)
    previous_BT = jnp.where(before_BT >= 0, previous_BT, 0 if previous_B is None else previous_B[:, None])
    return real_BT, real_BT & (previous_BT > 0) & (previous_BT != segment_ids_BT)


def select(real_BT, x_BT):
    """``x`` where the token is real, zero where it is padding."""
    return jnp.where(real_BT.reshape(real_BT.shape + (1,) * (x_BT.ndim - 2)), x_BT, 0)
