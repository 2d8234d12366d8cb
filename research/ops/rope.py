"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

import jax.numpy as jnp

from research.axes import Array, Float, Int


def rope(
    x_BTHK: Float[Array, "B T H K"],
    positions_BT: Int[Array, "B T"],
    *,
    rotary_dim: int | None = None,
    theta: float = 1e4,
) -> Float[Array, "B T H K"]:
    """Rotates the first ``rotary_dim`` channels of each head by angles that grow with the position (eq. 34).

    Channel i pairs with i + rotary_dim/2 (the half-split layout of GPT-NeoX and Llama); the rest pass unchanged.
    Angles are computed in float32.

    Args:
      positions_BT: position of each token in its own document.
      rotary_dim: channels that turn, even and at most K; all of them by default.
      theta: base of the frequencies, ``theta^(-2i/rotary_dim)`` radians per position.

    Raises:
      ValueError: rotary_dim is odd, negative or larger than K.
    """
    width = x_BTHK.shape[-1]
    rotary_dim = width if rotary_dim is None else rotary_dim
    if rotary_dim % 2 or not 0 <= rotary_dim <= width:
        raise ValueError(f"rotary_dim must be even and from 0 to the head width {width}, got {rotary_dim}")
    half = rotary_dim // 2
    dtype = jnp.promote_types(x_BTHK.dtype, jnp.float32)
    frequency_R = theta ** (-jnp.arange(half, dtype=dtype) / max(half, 1))
    angle_BT1R = (positions_BT.astype(dtype)[..., None] * frequency_R)[:, :, None, :]
    cos, sin = jnp.cos(angle_BT1R), jnp.sin(angle_BT1R)
    first, second, rest = jnp.split(x_BTHK, [half, rotary_dim], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([part.astype(x_BTHK.dtype) for part in turned] + [rest], axis=-1)
