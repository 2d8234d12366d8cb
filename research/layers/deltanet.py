"""DeltaNet (Schlag et al. 2021; Yang et al. 2024, arXiv 2406.06484): the delta rule, no decay."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from research.layers.context import Context, without_padding
from research.layers.norms import RMSNormConfig
from research.layers.parameters import normal, project, read
from research.layers.recurrence import (
    RecurrentState,
    at_least_one,
    attend,
    check_form,
    convolve,
    empty_state,
    heads,
    next_state,
)
from research.ops.norms import l2_norm
from research.sharding.mesh import P


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig:
    """``heads`` heads with keys of width ``key_width`` and values of ``value_width``.

    Attributes:
      taps: of the short convolution on q, k and v.
      negative_eigenvalues: β runs to 2 instead of 1, as in ``GatedDeltaNetConfig``.
      implementation, chunk_size: as in ``linear_attention``.
    """

    heads: int = 4
    key_width: int = 64
    value_width: int = 64
    taps: int = 4
    negative_eigenvalues: bool = False
    norm_eps: float = 1e-6
    implementation: str | None = None
    chunk_size: int | None = None

    def __post_init__(self):
        at_least_one(self, "heads", "key_width", "value_width", "taps")
        check_form(self)

    def flops(self, width: int, context: float) -> float:
        # Read for the error, write, read.
        recurrence = 3 * self.heads * self.key_width * self.value_width
        return 2.0 * (width * self.heads * (2 * self.key_width + 2 * self.value_width + 1) + recurrence)

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "DeltaNet":
        return DeltaNet(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)


class DeltaNet(nnx.Module):
    def __init__(self, config: DeltaNetConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        D, H, K, V = width, config.heads, config.key_width, config.value_width
        self.config = config
        self.channels = H * (2 * K + V)
        self.w_qkv_DN = normal(rngs, (D, self.channels), param_dtype, P("fsdp", None), fan_in=D)
        self.w_beta_DH = normal(rngs, (D, H), param_dtype, P("fsdp", None), fan_in=D)
        self.w_conv_WN = normal(rngs, (config.taps, self.channels), param_dtype, P(None, None), fan_in=config.taps)
        self.norm = RMSNormConfig(eps=config.norm_eps, centred=False).build(V, param_dtype=param_dtype)
        self.w_out_ND = normal(rngs, (H * V, D), param_dtype, P(None, "fsdp"), fan_in=H * V, gain=depth**-0.5)

    def __call__(self, x_BTD, state: RecurrentState | None, context: Context):
        B, T, _ = x_BTD.shape
        c, dtype = self.config, x_BTD.dtype
        x_BTD = without_padding(x_BTD, context)
        b_BTH = project(x_BTD, read(self.w_beta_DH, dtype)).astype(jnp.promote_types(dtype, jnp.float32))
        beta_BTH = jax.nn.sigmoid(b_BTH) * (2 if c.negative_eigenvalues else 1)
        qkv_BTN, tail_BWN = convolve(project(x_BTD, read(self.w_qkv_DN, dtype)), self.w_conv_WN, state, context)
        keys = (c.heads, c.key_width)
        q_BTHK, k_BTHK, v_BTHV = heads(qkv_BTN, keys, keys, (c.heads, c.value_width))
        o_BTHV, memory = attend(
            l2_norm(q_BTHK), l2_norm(k_BTHK), v_BTHV, state, context, c, beta=beta_BTH, scale=c.key_width**-0.5
        )
        y_BTD = project(self.norm(o_BTHV).reshape(B, T, -1), read(self.w_out_ND, dtype))
        return y_BTD, next_state(state, tail_BWN, memory), None

    def init_state(self, batch: int, max_length: int, dtype) -> RecurrentState:
        c = self.config
        memory = (c.heads, c.key_width, c.value_width)
        return empty_state(batch, dtype, memory=memory, tail=(c.taps - 1, self.channels))
