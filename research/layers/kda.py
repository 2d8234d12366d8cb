"""Kimi Delta Attention (Kimi Team 2025, arXiv 2510.26692): the gated delta rule with one decay a key channel."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from research.layers.context import Context, without_padding
from research.layers.norms import RMSNormConfig
from research.layers.parameters import dt_bias, log_rate, normal, project, read
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
from research.ops.decays import step_size
from research.ops.norms import l2_norm
from research.sharding.mesh import P


@dataclasses.dataclass(frozen=True)
class KDAConfig:
    """``heads`` heads with keys of width ``key_width`` and values of ``value_width``.

    Attributes:
      rank: of the two low-rank projections, the decay's and the output gate's; None is ``value_width``, as published.
      taps: of the short convolution on q, k and v.
      negative_eigenvalues: β runs to 2 instead of 1, as in ``GatedDeltaNetConfig``.
      implementation, chunk_size: as in ``linear_attention``.
    """

    heads: int = 4
    key_width: int = 64
    value_width: int = 64
    rank: int | None = None
    taps: int = 4
    negative_eigenvalues: bool = False
    norm_eps: float = 1e-6
    implementation: str | None = None
    chunk_size: int | None = None

    def __post_init__(self):
        at_least_one(self, "heads", "key_width", "value_width", "taps", "low_rank")
        check_form(self)

    @property
    def low_rank(self) -> int:
        return self.value_width if self.rank is None else self.rank

    def flops(self, width: int, context: float) -> float:
        keys, values = self.heads * self.key_width, self.heads * self.value_width
        low_rank = self.low_rank * (2 * width + keys + values)
        # Read for the error, write, read.
        recurrence = 3 * self.key_width * values
        return 2.0 * (width * (2 * keys + 2 * values + self.heads) + low_rank + recurrence)

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "KDA":
        return KDA(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)


class KDA(nnx.Module):
    def __init__(self, config: KDAConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        D, H, K, V, R = width, config.heads, config.key_width, config.value_width, config.low_rank
        self.config = config
        self.channels = H * (2 * K + V)
        self.w_qkv_DN = normal(rngs, (D, self.channels), param_dtype, P("fsdp", None), fan_in=D)
        self.w_beta_DH = normal(rngs, (D, H), param_dtype, P("fsdp", None), fan_in=D)
        # [decay | gate] down to R each, and up.
        self.w_low_DR = normal(rngs, (D, 2 * R), param_dtype, P("fsdp", None), fan_in=D)
        self.w_decay_RN = normal(rngs, (R, H * K), param_dtype, P(None, "fsdp"), fan_in=R)
        self.w_gate_RN = normal(rngs, (R, H * V), param_dtype, P(None, "fsdp"), fan_in=R)
        self.w_conv_WN = normal(rngs, (config.taps, self.channels), param_dtype, P(None, None), fan_in=config.taps)
        self.log_rate_H = log_rate(rngs, (H,))
        self.dt_bias_HK = dt_bias(rngs, (H, K))
        self.norm = RMSNormConfig(eps=config.norm_eps, centred=False).build(V, param_dtype=param_dtype)
        self.w_out_ND = normal(rngs, (H * V, D), param_dtype, P(None, "fsdp"), fan_in=H * V, gain=depth**-0.5)

    def __call__(self, x_BTD, state: RecurrentState | None, context: Context):
        B, T, _ = x_BTD.shape
        c, dtype = self.config, x_BTD.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        x_BTD = without_padding(x_BTD, context)
        decay_BTR, gate_BTR = jnp.split(project(x_BTD, read(self.w_low_DR, dtype)), 2, axis=-1)
        a_BTHK = project(decay_BTR, read(self.w_decay_RN, dtype)).astype(wide).reshape(B, T, c.heads, c.key_width)
        rate_H1 = jnp.exp(read(self.log_rate_H, wide))[:, None]
        log_decay_BTHK = -rate_H1 * step_size(a_BTHK, read(self.dt_bias_HK, wide))
        beta_BTH = jax.nn.sigmoid(project(x_BTD, read(self.w_beta_DH, dtype)).astype(wide))
        beta_BTH = beta_BTH * (2 if c.negative_eigenvalues else 1)
        qkv_BTN, tail_BWN = convolve(project(x_BTD, read(self.w_qkv_DN, dtype)), self.w_conv_WN, state, context)
        keys = (c.heads, c.key_width)
        q_BTHK, k_BTHK, v_BTHV = heads(qkv_BTN, keys, keys, (c.heads, c.value_width))
        o_BTHV, memory = attend(
            l2_norm(q_BTHK), l2_norm(k_BTHK), v_BTHV, state, context, c,
            log_decay=log_decay_BTHK, beta=beta_BTH, scale=c.key_width**-0.5,
        )  # fmt: skip
        gate_BTHV = project(gate_BTR, read(self.w_gate_RN, dtype)).reshape(o_BTHV.shape)
        o_BTHV = self.norm(o_BTHV) * jax.nn.sigmoid(gate_BTHV)
        y_BTD = project(o_BTHV.reshape(B, T, -1), read(self.w_out_ND, dtype))
        return y_BTD, next_state(state, tail_BWN, memory), None

    def init_state(self, batch: int, max_length: int, dtype) -> RecurrentState:
        c = self.config
        memory = (c.heads, c.key_width, c.value_width)
        return empty_state(batch, dtype, memory=memory, tail=(c.taps - 1, self.channels))
