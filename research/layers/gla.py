"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635): one decay a key channel, read off the token."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from research.layers.context import Context, without_padding
from research.layers.norms import RMSNormConfig
from research.layers.parameters import constant, normal, project, read
from research.layers.recurrence import (
    RecurrentState,
    at_least_one,
    attend,
    check_form,
    empty_state,
    heads,
    next_state,
)
from research.sharding.mesh import P


@dataclasses.dataclass(frozen=True)
class GLAConfig:
    """``heads`` heads with keys of width ``key_width`` and values of ``value_width`` (the paper's are twice as wide).

    Attributes:
      rank: of the decay's projection.
      normaliser: τ of the decay σ(·)^(1/τ) (section 4.4): the larger, the slower the state forgets.
      implementation, chunk_size: as in ``linear_attention``.
    """

    heads: int = 4
    key_width: int = 32
    value_width: int = 64
    rank: int = 16
    normaliser: float = 16.0
    norm_eps: float = 1e-6
    implementation: str | None = None
    chunk_size: int | None = None

    def __post_init__(self):
        at_least_one(self, "heads", "key_width", "value_width", "rank")
        check_form(self)
        if self.normaliser <= 0:
            raise ValueError(f"normaliser must be positive, got {self.normaliser}")

    def flops(self, width: int, context: float) -> float:
        keys, values = self.heads * self.key_width, self.heads * self.value_width
        recurrence = 2 * self.key_width * values  # write, read
        return 2.0 * (width * (2 * keys + 3 * values + self.rank) + self.rank * keys + recurrence)

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "GLA":
        return GLA(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)


class GLA(nnx.Module):
    """The norm over a head is an RMS norm, as in the authors' code; the paper writes LayerNorm."""

    def __init__(self, config: GLAConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        D, H, K, V, R = width, config.heads, config.key_width, config.value_width, config.rank
        self.config = config
        self.w_qkv_DN = normal(rngs, (D, H * (2 * K + V)), param_dtype, P("fsdp", None), fan_in=D)
        self.w_gate_DN = normal(rngs, (D, H * V), param_dtype, P("fsdp", None), fan_in=D)
        self.w_decay_DR = normal(rngs, (D, R), param_dtype, P("fsdp", None), fan_in=D)
        self.w_decay_RN = normal(rngs, (R, H * K), param_dtype, P(None, "fsdp"), fan_in=R)
        self.decay_bias_N = constant(jnp.zeros(H * K), jnp.float32, P(None))
        self.norm = RMSNormConfig(eps=config.norm_eps, centred=False).build(V, param_dtype=param_dtype)
        self.w_out_ND = normal(rngs, (H * V, D), param_dtype, P(None, "fsdp"), fan_in=H * V, gain=depth**-0.5)

    def __call__(self, x_BTD, state: RecurrentState | None, context: Context):
        B, T, _ = x_BTD.shape
        c, dtype = self.config, x_BTD.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        x_BTD = without_padding(x_BTD, context)
        a_BTN = project(project(x_BTD, read(self.w_decay_DR, dtype)), read(self.w_decay_RN, dtype)).astype(wide)
        log_decay_BTN = jax.nn.log_sigmoid(a_BTN + read(self.decay_bias_N, wide)) / c.normaliser
        keys = (c.heads, c.key_width)
        q_BTHK, k_BTHK, v_BTHV = heads(project(x_BTD, read(self.w_qkv_DN, dtype)), keys, keys, (c.heads, c.value_width))
        o_BTHV, memory = attend(
            q_BTHK, k_BTHK, v_BTHV, state, context, c,
            log_decay=log_decay_BTN.reshape(B, T, *keys), scale=c.key_width**-0.5,
        )  # fmt: skip
        gate_BTHV = project(x_BTD, read(self.w_gate_DN, dtype)).reshape(o_BTHV.shape)
        o_BTHV = self.norm(o_BTHV) * jax.nn.silu(gate_BTHV)
        y_BTD = project(o_BTHV.reshape(B, T, -1), read(self.w_out_ND, dtype))
        return y_BTD, next_state(state, None, memory), None

    def init_state(self, batch: int, max_length: int, dtype) -> RecurrentState:
        c = self.config
        return empty_state(batch, dtype, memory=(c.heads, c.key_width, c.value_width))
