"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, arXiv 2412.06464) as Qwen3-Next builds it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from research.axes import Array, Float
from research.layers.context import Context
from research.layers.norms import RMSNormConfig
from research.layers.parameters import constant, normal, project, read
from research.ops.causal_conv import causal_conv
from research.ops.linear_attention import linear_attention, linear_attention_step
from research.ops.norms import l2_norm
from research.sharding.mesh import P, per_shard


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig:
    """``heads`` value heads of width ``value_width`` over ``key_heads`` key heads of width ``key_width``; ``taps`` of the
    short convolution on q, k and v; ``implementation`` and ``chunk_size`` as in ``linear_attention``."""

    heads: int = 4
    key_heads: int = 2
    key_width: int = 64
    value_width: int = 64
    taps: int = 4
    norm_eps: float = 1e-6
    implementation: str | None = None
    chunk_size: int | None = None

    def __post_init__(self):
        if self.key_heads < 1 or self.heads % self.key_heads:
            raise ValueError(f"heads must be a multiple of key_heads, got {self.heads} over {self.key_heads}")
        if self.taps < 1:
            raise ValueError(f"taps must be at least 1, got {self.taps}")

    def flops(self, width: int, context: float) -> float:
        # The recurrence itself (read for the error, write, read), whatever its chunked form spends on top.
        recurrence = 3 * self.heads * self.key_width * self.value_width
        keys, values = self.key_heads * self.key_width, self.heads * self.value_width
        return 2 * (width * (2 * keys + 3 * values + 2 * self.heads) + recurrence)

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "GatedDeltaNet":
        return GatedDeltaNet(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)


class GatedDeltaNetState(NamedTuple):
    """The last inputs of the convolution, W-1 taps of N channels, and the recurrent state."""

    tail_BWN: Float[Array, "B W N"]
    state_BHKV: Float[Array, "B H K V"]


class GatedDeltaNet(nnx.Module):
    def __init__(self, config: GatedDeltaNetConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        D, H, V, GK = width, config.heads, config.value_width, config.key_heads * config.key_width
        self.config = config
        self.channels = 2 * GK + H * V
        self.w_qkv_DN = normal(rngs, (D, self.channels), param_dtype, P("fsdp", None), fan_in=D)
        self.w_gate_DN = normal(rngs, (D, H * V), param_dtype, P("fsdp", None), fan_in=D)
        # [β | decay], one of each per value head.
        self.w_ba_DN = normal(rngs, (D, 2 * H), param_dtype, P("fsdp", None), fan_in=D)
        self.w_conv_WN = normal(rngs, (config.taps, self.channels), param_dtype, P(None, None), fan_in=config.taps)
        # A in [1, 16] and dt in [1e-3, 1e-1], log-uniform, as Mamba-2 (Dao & Gu 2024) starts them.
        rate_H = jax.random.uniform(rngs.params(), (H,), minval=1.0, maxval=16.0)
        dt_H = jnp.exp(jax.random.uniform(rngs.params(), (H,), minval=jnp.log(1e-3), maxval=jnp.log(1e-1)))
        self.log_rate_H = constant(jnp.log(rate_H), jnp.float32, P(None))
        self.dt_bias_H = constant(dt_H + jnp.log(-jnp.expm1(-dt_H)), jnp.float32, P(None))  # softplus⁻¹(dt)
        norm = RMSNormConfig(eps=config.norm_eps, centred=False)
        self.norm = norm.build(V, param_dtype=param_dtype)
        self.w_out_ND = normal(rngs, (H * V, D), param_dtype, P(None, "fsdp"), fan_in=H * V, gain=depth**-0.5)

    def __call__(self, x_BTD, state: GatedDeltaNetState | None, context: Context):
        B, T, _ = x_BTD.shape
        c, dtype = self.config, x_BTD.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        beta_BTH, decay_BTH = jnp.split(project(x_BTD, read(self.w_ba_DN, dtype)).astype(wide), 2, axis=-1)
        dt_BTH = jax.nn.softplus(decay_BTH + read(self.dt_bias_H, wide))
        log_decay_BTH = -jnp.exp(read(self.log_rate_H, wide)) * dt_BTH
        batched = (
            project(x_BTD, read(self.w_qkv_DN, dtype)), log_decay_BTH, jax.nn.sigmoid(beta_BTH), state, context.segment_ids_BT
        )  # fmt: skip
        o_BTHV, state = per_shard(self._mix, batched, read(self.w_conv_WN, dtype))
        gate_BTHV = project(x_BTD, read(self.w_gate_DN, dtype)).reshape(B, T, c.heads, c.value_width)
        o_BTHV = self.norm(o_BTHV) * jax.nn.silu(gate_BTHV)
        return project(o_BTHV.reshape(B, T, -1), read(self.w_out_ND, dtype)), state, None

    def _mix(self, batched, w_conv_WN):
        qkv_BTN, log_decay_BTH, beta_BTH, state, segment_ids_BT = batched
        B, T, _ = qkv_BTN.shape
        c, GK = self.config, self.config.key_heads * self.config.key_width
        qkv_BTN, tail_BWN = causal_conv(
            qkv_BTN, w_conv_WN, tail=None if state is None else state.tail_BWN, segment_ids=segment_ids_BT,
            activation="silu",
        )  # fmt: skip
        q_BTN, k_BTN, v_BTN = jnp.split(qkv_BTN, [GK, 2 * GK], axis=-1)
        q_BTGK = l2_norm(q_BTN.reshape(B, T, c.key_heads, c.key_width))
        k_BTGK = l2_norm(k_BTN.reshape(B, T, c.key_heads, c.key_width))
        v_BTHV = v_BTN.reshape(B, T, c.heads, c.value_width)
        scale = c.key_width**-0.5
        if state is not None and T == 1 and segment_ids_BT is None:
            now = (q_BTGK[:, 0], k_BTGK[:, 0], v_BTHV[:, 0], state.state_BHKV)
            o_BHV, state_BHKV = linear_attention_step(
                *now, log_decay=log_decay_BTH[:, 0], beta=beta_BTH[:, 0], scale=scale
            )
            return o_BHV[:, None], GatedDeltaNetState(tail_BWN, state_BHKV)
        o_BTHV, state_BHKV = linear_attention(
            q_BTGK, k_BTGK, v_BTHV, log_decay=log_decay_BTH, beta=beta_BTH, scale=scale,
            initial_state=None if state is None else state.state_BHKV, segment_ids=segment_ids_BT,
            implementation=c.implementation, chunk_size=c.chunk_size,
        )  # fmt: skip
        return o_BTHV, None if state is None else GatedDeltaNetState(tail_BWN, state_BHKV)

    def init_state(self, batch: int, max_length: int, dtype) -> GatedDeltaNetState:
        c = self.config
        return GatedDeltaNetState(
            jnp.zeros((batch, c.taps - 1, self.channels), dtype),
            jnp.zeros((batch, c.heads, c.key_width, c.value_width), jnp.promote_types(dtype, jnp.float32)),
        )
