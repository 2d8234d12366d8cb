"""Normalisations over the last axis, in float32 whatever the input."""

import jax
import jax.numpy as jnp

from research.axes import Array, Float


def rms_norm(x: Float[Array, "*batch D"], scale_D: Float[Array, " D"] | None = None, *, eps: float = 1e-6):
    """``x / sqrt(mean(x²) + eps) · scale`` (Zhang & Sennrich 2019, eq. 4), in x's shape and dtype."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    out = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (out if scale_D is None else out * scale_D).astype(x.dtype)


def l2_norm(x: Float[Array, "*batch K"], *, eps: float = 1e-6):
    """``x / sqrt(Σx² + eps)``, in x's shape and dtype: keys of length one for the delta rule."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + eps)).astype(x.dtype)


def layer_norm(x: Float[Array, "*batch D"], *, eps: float = 1e-6):
    """``(x − mean(x)) / sqrt(var(x) + eps)`` (Ba et al. 2016), in x's shape and dtype. Over each head of an output it is a
    group norm with a group a head."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return rms_norm(wide - jnp.mean(wide, axis=-1, keepdims=True), eps=eps).astype(x.dtype)
