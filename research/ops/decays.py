"""Where log-decays come from: the fixed ones of lightning attention and RetNet, and Mamba's step size."""

import jax
import jax.numpy as jnp

from research.axes import Array, Float


def lightning_log_decay(heads: int, layer: Array | int, layers: int) -> Float[Array, " H"]:
    """Lightning attention's log-decays a token (MiniMax-01, arXiv 2501.08313; TransNormerLLM, arXiv 2307.14995):

        g_h = −2^(−8 h / H) · (1 − l / (L − 1 + 1e-5) + 1e-5),      h = 1 … H

    ALiBi's slopes, steepest in the first layer and next to none in the last, so that later layers look further back.

    Args:
      heads: H, across the whole layer.
      layer: l, from 0: the layer's absolute place among the model's L ``layers``; may be traced.

    Returns: [H], float32 (float64 under x64).
    """
    dtype = jnp.result_type(float)
    depth = 1 - jnp.asarray(layer, dtype) / (layers - 1 + 1e-5) + 1e-5
    return -(2.0 ** (-8 * jnp.arange(1, heads + 1, dtype=dtype) / heads)) * depth


def retention_log_decay(heads: int) -> Float[Array, " H"]:
    """RetNet's log-decays a token, log γ_h with γ_h = 1 − 2^(−5−h), h = 0 … H−1 (Sun et al. 2023, arXiv 2307.08621,
    eq. 8). Returns [H], float32 (float64 under x64)."""
    return jnp.log1p(-(2.0 ** (-5 - jnp.arange(heads, dtype=jnp.result_type(float)))))


def step_size(x: Float[Array, "..."], bias: Float[Array, "..."], limits: tuple[float, float] | None = None):
    """Mamba's step size, ``dt = softplus(x + bias)``, clipped to ``limits``; the log-decay is ``−rate · dt``."""
    dt = jax.nn.softplus(x + bias)
    return dt if limits is None else jnp.clip(dt, *limits)
