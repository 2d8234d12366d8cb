"""Normalisation with a learned scale."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from research.layers.parameters import constant, read
from research.ops.norms import rms_norm
from research.sharding.mesh import P


@dataclasses.dataclass(frozen=True)
class RMSNormConfig:
    """RMSNorm; ``centred`` stores the scale as its distance from 1 (``x · (1 + w)``), so that weight decay pulls to 1."""

    eps: float = 1e-6
    centred: bool = True

    def build(self, width: int, *, param_dtype) -> "RMSNorm":
        return RMSNorm(self, width, param_dtype=param_dtype)


class RMSNorm(nnx.Module):
    def __init__(self, config: RMSNormConfig, width: int, *, param_dtype):
        self.config = config
        self.scale_D = constant(jnp.full(width, 0.0 if config.centred else 1.0), param_dtype, P(None))

    def __call__(self, x):
        scale_D = read(self.scale_D, jnp.promote_types(x.dtype, jnp.float32))
        return rms_norm(x, 1 + scale_D if self.config.centred else scale_D, eps=self.config.eps)
