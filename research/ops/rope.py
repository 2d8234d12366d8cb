"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), whole or partial, and its ways to longer contexts."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

from research.axes import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Every frequency divided by ``factor`` (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: wavelengths above ``original_length / low_factor`` are stretched by ``factor``, those below
    ``original_length / high_factor`` are left, and frequencies between are blended."""

    factor: float = 8.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_length: int = 8192


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071, §3.2 and eq. 22): channels that turn more than ``beta_fast`` times within
    ``original_length`` are left, those that turn less than ``beta_slow`` times are stretched by ``factor``.

    Attributes:
      truncate: the bounds between are whole channels (not so in gpt-oss).
      attention_factor: multiplies cosines and sines; None is 0.1·ln(factor)+1, or where ``mscale_all_dim`` is set the
        ratio of (0.1·mscale·ln(factor)+1) to the same with ``mscale_all_dim`` (DeepSeek, whose attention multiplies its
        scores by the square of the latter: see ``score_scale``).
    """

    factor: float = 40.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        whole = self._growth(self.mscale_all_dim) if self.mscale_all_dim else 1.0
        return self._growth(self.mscale if self.mscale_all_dim else 1.0) / whole

    @property
    def score_scale(self) -> float:
        """What DeepSeek's attention multiplies its scores by: 1 without ``mscale_all_dim``."""
        return self._growth(self.mscale_all_dim) ** 2

    def _growth(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling
RopeLayout = Literal["halves", "pairs"]


def rope(
    x_BTHK: Float[Array, "B T H K"],
    positions_BT: Int[Array, "B T"],
    *,
    rotary_dim: int | None = None,
    theta: float = 1e4,
    layout: RopeLayout = "halves",
    scaling: RopeScaling | None = None,
) -> Float[Array, "B T H K"]:
    """Rotates the first ``rotary_dim`` channels of each head by angles that grow with the position (eq. 34).

    The rest pass unchanged. Angles are computed in float32.

    Args:
      positions_BT: position of each token in its own document.
      rotary_dim: channels that turn, even and at most K; all of them by default.
      theta: base of the frequencies, ``theta^(-2i/rotary_dim)`` radians per position.
      layout: channel i turns with i + rotary_dim/2 ('halves': GPT-NeoX, Llama in its published form), or 2i with 2i + 1
        ('pairs': the paper, DeepSeek, Llama 4). Each stays where it was.
      scaling: of the frequencies, for contexts longer than trained on.

    Raises:
      ValueError: rotary_dim is odd, negative or larger than K.
    """
    width = x_BTHK.shape[-1]
    rotary_dim = width if rotary_dim is None else rotary_dim
    if rotary_dim % 2 or not 0 <= rotary_dim <= width:
        raise ValueError(f"rotary_dim must be even and from 0 to the head width {width}, got {rotary_dim}")
    if not rotary_dim:
        return x_BTHK
    dtype = jnp.promote_types(x_BTHK.dtype, jnp.float32)
    frequency_R = jnp.asarray(frequencies(rotary_dim, theta, scaling), dtype)
    angle_BT1R = (positions_BT.astype(dtype)[..., None] * frequency_R)[:, :, None, :]
    cos, sin = jnp.cos(angle_BT1R), jnp.sin(angle_BT1R)
    if isinstance(scaling, YarnScaling) and scaling.magnitude != 1:
        cos, sin = cos * scaling.magnitude, sin * scaling.magnitude
    turning, rest = x_BTHK[..., :rotary_dim], x_BTHK[..., rotary_dim:]
    if layout == "halves":
        first, second = jnp.split(turning, 2, axis=-1)
    else:
        first, second = turning[..., 0::2], turning[..., 1::2]
    turned = (first * cos - second * sin).astype(x_BTHK.dtype), (second * cos + first * sin).astype(x_BTHK.dtype)
    if layout == "halves":
        return jnp.concatenate([*turned, rest], axis=-1)
    return jnp.concatenate([jnp.stack(turned, axis=-1).reshape(turning.shape), rest], axis=-1)


def frequencies(rotary_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per position of each of the ``rotary_dim / 2`` angles, float64."""
    index_R = np.arange(rotary_dim // 2)
    plain_R = theta ** (-2.0 * index_R / rotary_dim)
    if scaling is None:
        return plain_R
    if isinstance(scaling, LinearScaling):
        return plain_R / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        turns_R = scaling.original_length * plain_R / (2 * math.pi)
        keep_R = np.clip((turns_R - scaling.low_factor) / (scaling.high_factor - scaling.low_factor), 0, 1)
    else:
        # The channel that turns so many times within the original length.
        channel = [
            rotary_dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        ]
        low, high = (math.floor(channel[0]), math.ceil(channel[1])) if scaling.truncate else channel
        low, high = max(low, 0), min(high, rotary_dim - 1)
        keep_R = 1 - np.clip((index_R - low) / max(high - low, 0.001), 0, 1)
    return plain_R * (keep_R + (1 - keep_R) / scaling.factor)
