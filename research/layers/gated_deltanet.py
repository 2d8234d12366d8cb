"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, arXiv 2412.06464) as Qwen3-Next builds it.

The rule is the paper's eq. 10, ``S ← e^g (I − β k kᵀ) S + β k vᵀ``: decay, then move what k reads towards v. Lecture notes
print it as ``γ S + β (I − k kᵀ) k vᵀ``. That is a slip: keys have length one, so (I − k kᵀ) k = k − k (kᵀ k) = 0 and
nothing would ever be written. The factor (I − β k kᵀ) belongs to the old state, not to the new key.
"""

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
from research.ops.gated_deltanet_step import gated_deltanet_step
from research.ops.norms import l2_norm
from research.sharding.mesh import P, per_shard


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig:
    """``heads`` value heads of width ``value_width`` over ``key_heads`` key heads of width ``key_width``.

    Attributes:
      taps: of the short convolution on q, k and v.
      negative_eigenvalues: β runs to 2 instead of 1, so that I − β k kᵀ can turn a direction round: what tracking a state
        (parity) takes (Grazzi et al. 2024, arXiv 2411.12537).
      implementation, chunk_size: as in ``linear_attention``.
    """

    heads: int = 4
    key_heads: int = 2
    key_width: int = 64
    value_width: int = 64
    taps: int = 4
    negative_eigenvalues: bool = False
    norm_eps: float = 1e-6
    implementation: str | None = None
    chunk_size: int | None = None

    def __post_init__(self):
        at_least_one(self, "key_width", "value_width", "taps")
        check_form(self)
        if self.key_heads < 1 or self.heads < 1 or self.heads % self.key_heads:
            raise ValueError(f"heads must be a multiple of key_heads, got {self.heads} over {self.key_heads}")

    def flops(self, width: int, context: float) -> float:
        # The recurrence itself (read for the error, write, read), whatever its chunked form spends on top.
        recurrence = 3 * self.heads * self.key_width * self.value_width
        keys, values = self.key_heads * self.key_width, self.heads * self.value_width
        return 2.0 * (width * (2 * keys + 3 * values + 2 * self.heads) + recurrence)

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "GatedDeltaNet":
        return GatedDeltaNet(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)


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
        self.log_rate_H = log_rate(rngs, (H,))
        self.dt_bias_H = dt_bias(rngs, (H,))
        norm = RMSNormConfig(eps=config.norm_eps, centred=False)
        self.norm = norm.build(V, param_dtype=param_dtype)
        self.w_out_ND = normal(rngs, (H * V, D), param_dtype, P(None, "fsdp"), fan_in=H * V, gain=depth**-0.5)

    def __call__(self, x_BTD, state: RecurrentState | None, context: Context):
        B, T, _ = x_BTD.shape
        c, dtype = self.config, x_BTD.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        x_BTD = without_padding(x_BTD, context)
        b_BTH, a_BTH = jnp.split(project(x_BTD, read(self.w_ba_DN, dtype)).astype(wide), 2, axis=-1)
        qkv_BTN, gate_BTM = (project(x_BTD, read(w_DN, dtype)) for w_DN in (self.w_qkv_DN, self.w_gate_DN))
        strongest = 2.0 if c.negative_eigenvalues else 1.0
        if state is not None and T == 1 and context.segment_ids_BT is None:
            o_BTM, state = self._one(qkv_BTN, gate_BTM, b_BTH, a_BTH, state, strongest)
            return project(o_BTM, read(self.w_out_ND, dtype)), state, None
        log_decay_BTH = -jnp.exp(read(self.log_rate_H, wide)) * step_size(a_BTH, read(self.dt_bias_H, wide))
        beta_BTH = jax.nn.sigmoid(b_BTH) * strongest
        qkv_BTN, tail_BWN = convolve(qkv_BTN, self.w_conv_WN, state, context)
        keys = (c.key_heads, c.key_width)
        q_BTGK, k_BTGK, v_BTHV = heads(qkv_BTN, keys, keys, (c.heads, c.value_width))
        o_BTHV, memory = attend(
            l2_norm(q_BTGK), l2_norm(k_BTGK), v_BTHV, state, context, c,
            log_decay=log_decay_BTH, beta=beta_BTH, scale=c.key_width**-0.5,
        )  # fmt: skip
        o_BTHV = self.norm(o_BTHV) * jax.nn.silu(gate_BTM.reshape(o_BTHV.shape))
        y_BTD = project(o_BTHV.reshape(B, T, -1), read(self.w_out_ND, dtype))
        return y_BTD, next_state(state, tail_BWN, memory), None

    def _one(self, qkv_BTN, gate_BTM, b_BTH, a_BTH, state: RecurrentState, strongest: float):
        """One token between the projections, on each device's own rows."""
        wide = b_BTH.dtype
        shared = (
            read(self.w_conv_WN, qkv_BTN.dtype), read(self.log_rate_H, wide), read(self.dt_bias_H, wide),
            read(self.norm.scale_D, wide),
        )  # fmt: skip

        def run(batched, shared):
            tokens, state = batched
            o_BM, *state = gated_deltanet_step(
                *(x[:, 0] for x in tokens), *state, *shared, eps=self.config.norm_eps, strongest=strongest
            )
            return o_BM[:, None], RecurrentState(*state)

        return per_shard(run, ((qkv_BTN, gate_BTM, b_BTH, a_BTH), state), shared)

    def init_state(self, batch: int, max_length: int, dtype) -> RecurrentState:
        c = self.config
        memory = (c.heads, c.key_width, c.value_width)
        return empty_state(batch, dtype, memory=memory, tail=(c.taps - 1, self.channels))
