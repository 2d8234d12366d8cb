"""Losses as sums, so that they add up over micro-batches and devices before anything is divided."""

import jax
import jax.numpy as jnp

from research.axes import Array, Bool, Float, Int


def cross_entropy(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed negative log-likelihood of the targets in nats, and how many targets the mask counts; float32 or wider."""
    nats_BT = -token_logprobs(logits_BTV, targets_BT)
    return jnp.sum(jnp.where(mask_BT, nats_BT, 0)), jnp.sum(mask_BT, dtype=nats_BT.dtype)


def token_logprobs(logits_V: Float[Array, "*#rows V"], tokens: Int[Array, "*#rows"]) -> Float[Array, "*#rows"]:
    """Natural log-probability of each token under the logits in its place; float32 or wider."""
    logits_V = logits_V.astype(jnp.promote_types(logits_V.dtype, jnp.float32))
    picked = jnp.take_along_axis(logits_V, tokens[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits_V, axis=-1)
