"""Losses as sums, so that they add up over micro-batches and devices before anything is divided."""

import jax
import jax.numpy as jnp

from research.axes import Array, Bool, Float, Int


def cross_entropy(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed negative log-likelihood of the targets in nats, and how many targets the mask counts; float32 or wider."""
    wide = jnp.promote_types(logits_BTV.dtype, jnp.float32)
    logits_BTV = logits_BTV.astype(wide)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nats_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT
    return jnp.sum(jnp.where(mask_BT, nats_BT, 0)), jnp.sum(mask_BT, dtype=wide)
