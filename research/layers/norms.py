"""Normalisation with a learned scale."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from research.layers.parameters import constant, read
from research.ops.norms import rms_norm
from research.sharding.mesh import P


@dataclasses.dataclass(frozen=True)
class RMSNormConfig:
    """RMSNorm; ``centred`` stores the scale as its distance from 1 (``x · (1 + w)``), so that weight decay pulls to 1.

    ``mean`` takes the mean away first: LayerNorm (Ba et al. 2016) without a bias, as in DBRX.
    """

    eps: float = 1e-6
    centred: bool = True
    mean: bool = False

    def build(self, width: int, *, param_dtype) -> "RMSNorm":
        return RMSNorm(self, width, param_dtype=param_dtype)


class RMSNorm(nnx.Module):
    def __init__(self, config: RMSNormConfig, width: int, *, param_dtype):
        self.config = config
        self.scale_D = constant(jnp.full(width, 0.0 if config.centred else 1.0), param_dtype, P(None))

    def __call__(self, x):
        scale_D = read(self.scale_D, jnp.promote_types(x.dtype, jnp.float32))
        if self.config.mean:
            wide = x.astype(scale_D.dtype)
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
            return rms_norm(wide, self._scale(scale_D), eps=self.config.eps).astype(x.dtype)
        return rms_norm(x, self._scale(scale_D), eps=self.config.eps)

    def _scale(self, scale_D):
        return 1 + scale_D if self.config.centred else scale_D
