"""Grouped-query softmax attention with a gated output (Qwen3-Next's; Qiu et al. 2025, arXiv 2505.06708)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from research.axes import Array, Float
from research.layers.context import Context
from research.layers.norms import RMSNorm, RMSNormConfig
from research.layers.parameters import normal, project, read
from research.ops.attention import attention
from research.ops.rope import rope
from research.sharding.mesh import P, per_shard


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """``heads`` query heads over ``key_heads`` key heads of width ``head_width``; the first ``rotary_fraction`` of a
    head's channels turn with the position; ``gated`` multiplies the output by a sigmoid of the input, per channel."""

    heads: int = 4
    key_heads: int = 2
    head_width: int = 64
    rotary_fraction: float = 0.25
    rope_theta: float = 10_000.0
    gated: bool = True
    qk_norm: RMSNormConfig | None = RMSNormConfig()

    def __post_init__(self):
        if self.key_heads < 1 or self.heads % self.key_heads:
            raise ValueError(f"heads must be a multiple of key_heads, got {self.heads} over {self.key_heads}")
        if not 0 <= self.rotary_fraction <= 1 or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_fraction of head_width must be an even number of channels, got {self.rotary_fraction} of "
                f"{self.head_width}"
            )

    @property
    def rotary_dim(self) -> int:
        return int(self.head_width * self.rotary_fraction)

    def flops(self, width: int, context: float) -> float:
        heads = self.heads * (3 if self.gated else 2) + 2 * self.key_heads  # q, gate, output; k and v
        return 2 * self.head_width * (width * heads + 2 * self.heads * context)

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "Attention":
        return Attention(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens so far, row b's in slots 0 … cached_B[b]-1 of S."""

    k_BSGK: Float[Array, "B S G K"]
    v_BSGK: Float[Array, "B S G K"]


class Attention(nnx.Module):
    def __init__(self, config: AttentionConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        D, H, G, K = width, config.heads, config.key_heads, config.head_width
        self.config = config
        # Per head [q | gate], then k, then v: one product.
        self.q_width = H * K * (2 if config.gated else 1)
        self.w_in_DN = normal(rngs, (D, self.q_width + 2 * G * K), param_dtype, P("fsdp", None), fan_in=D)
        self.w_out_ND = normal(rngs, (H * K, D), param_dtype, P(None, "fsdp"), fan_in=H * K, gain=depth**-0.5)
        norm = config.qk_norm
        self.q_norm: RMSNorm | None = norm and norm.build(K, param_dtype=param_dtype)
        self.k_norm: RMSNorm | None = norm and norm.build(K, param_dtype=param_dtype)

    def __call__(self, x_BTD, state: KeyValueCache | None, context: Context):
        c = self.config
        B, T, _ = x_BTD.shape
        in_BTN = project(x_BTD, read(self.w_in_DN, x_BTD.dtype))
        qg_BTN, k_BTN, v_BTN = jnp.split(in_BTN, [self.q_width, self.q_width + c.key_heads * c.head_width], axis=-1)
        q_BTHK = qg_BTN.reshape(B, T, c.heads, -1)
        q_BTHK, gate_BTHK = jnp.split(q_BTHK, 2, axis=-1) if c.gated else (q_BTHK, None)
        k_BTGK = k_BTN.reshape(B, T, c.key_heads, c.head_width)
        v_BTGK = v_BTN.reshape(B, T, c.key_heads, c.head_width)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        turn = {"rotary_dim": c.rotary_dim, "theta": c.rope_theta}
        q_BTHK = rope(q_BTHK, context.positions_BT, **turn)
        k_BTGK = rope(k_BTGK, context.positions_BT, **turn)
        call = (q_BTHK, k_BTGK, v_BTGK, state, context.segment_ids_BT, context.cached_B)
        o_BTHK, state = per_shard(lambda batched, _: _attend(*batched), call)
        if gate_BTHK is not None:
            o_BTHK = o_BTHK * jax.nn.sigmoid(gate_BTHK)
        return project(o_BTHK.reshape(B, T, -1), read(self.w_out_ND, x_BTD.dtype)), state, None

    def init_state(self, batch: int, max_length: int, dtype) -> KeyValueCache:
        shape = (batch, max_length, self.config.key_heads, self.config.head_width)
        return KeyValueCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def _attend(q_BTHK, k_BTGK, v_BTGK, cache, segment_ids_BT, cached_B):
    if cache is None:
        return attention(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT=segment_ids_BT), None
    B, T = q_BTHK.shape[:2]
    S = cache.k_BSGK.shape[1]
    ids_BT = jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT
    real_BT = ids_BT > 0
    slots_BT = cached_B[:, None] + jnp.cumsum(real_BT, axis=1) - 1
    # Padding is written to slot S, which does not exist: dropped.
    row_B1, write_BT = jnp.arange(B)[:, None], jnp.where(real_BT, slots_BT, S)
    cache = KeyValueCache(
        cache.k_BSGK.at[row_B1, write_BT].set(k_BTGK.astype(cache.k_BSGK.dtype), mode="drop"),
        cache.v_BSGK.at[row_B1, write_BT].set(v_BTGK.astype(cache.v_BSGK.dtype), mode="drop"),
    )
    filled_BS = jnp.arange(S) < (cached_B + jnp.sum(real_BT, axis=1))[:, None]
    o_BTHK = attention(
        q_BTHK,
        cache.k_BSGK.astype(q_BTHK.dtype),
        cache.v_BSGK.astype(q_BTHK.dtype),
        segment_ids_BT=real_BT.astype(jnp.int32),
        source_segment_ids_BS=filled_BS.astype(jnp.int32),
        slots_BT=slots_BT,
    )
    return o_BTHK, cache
