"""Grouped-query softmax attention, with what published models add to it."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from research.axes import Array, Float
from research.layers import caches
from research.layers.context import Context, without_padding
from research.layers.norms import RMSNorm, RMSNormConfig
from research.layers.parameters import constant, normal, project, read
from research.ops.attention import attention
from research.ops.attention.dispatch import check_implementation
from research.ops.norms import rms_norm
from research.ops.rope import RopeLayout, RopeScaling, rope
from research.sharding.mesh import P, per_shard


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """``heads`` query heads over ``key_heads`` key heads of width ``head_width``.

    Attributes:
      rotary_fraction: the share of a head's channels, its first, that turn with the position; 0 for no RoPE.
      rope_theta, rope_layout, rope_scaling: as in ``research.ops.rope``.
      gated: the output times a sigmoid of the input, per channel (Qwen3-Next; Qiu et al. 2025, arXiv 2505.06708).
      qk_norm: on queries and keys, before RoPE; ``qk_norm_over`` each head, or the whole projection (OLMoE).
      rms_after_rope: queries and keys divided by their root mean square after RoPE (Llama 4), eps ``rms_after_rope_eps``.
      clip_qkv: queries, keys and values are cut to ±this, after their norm and before RoPE (DBRX, OLMoE).
      window: places a token sees, itself included (Mistral, gpt-oss). The cache then holds so many tokens.
      chunk: a token sees its own run of so many places alone (Llama 4). The cache then holds so many tokens.
      sinks: a learned score per head that takes part in the softmax and has no value (gpt-oss).
      softcap: c·tanh(score / c) for the score (Gemma 2, Grok-1).
      scale: of the scores; None is head_width^-1/2.
      temperature, temperature_floor: queries times ``1 + temperature·log(1 + ⌊(position+1)/floor⌋)`` (Llama 4).
      bias, out_bias: on the projections in, and out.
      implementation: as in ``research.ops.attention``.
    """

    heads: int = 4
    key_heads: int = 2
    head_width: int = 64
    rotary_fraction: float = 0.25
    rope_theta: float = 10_000.0
    rope_layout: RopeLayout = "halves"
    rope_scaling: RopeScaling | None = None
    gated: bool = True
    qk_norm: RMSNormConfig | None = RMSNormConfig()
    qk_norm_over: Literal["head", "projection"] = "head"
    rms_after_rope: bool = False
    rms_after_rope_eps: float = 1e-6
    clip_qkv: float | None = None
    window: int | None = None
    chunk: int | None = None
    sinks: bool = False
    softcap: float | None = None
    scale: float | None = None
    temperature: float = 0.0
    temperature_floor: int = 8192
    bias: bool = False
    out_bias: bool = False
    implementation: str | None = None

    def __post_init__(self):
        check_implementation(self.implementation)
        if self.key_heads < 1 or self.heads % self.key_heads:
            raise ValueError(f"heads must be a multiple of key_heads, got {self.heads} over {self.key_heads}")
        if not 0 <= self.rotary_fraction <= 1 or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_fraction of head_width must be an even number of channels, got {self.rotary_fraction} of "
                f"{self.head_width}"
            )
        for name in ("window", "chunk"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be None or at least 1, got {value}")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_width * self.rotary_fraction)

    @property
    def reach(self) -> int | None:
        """How many tokens back a token sees, at most; None is all."""
        return min((n for n in (self.window, self.chunk) if n is not None), default=None)

    def flops(self, width: int, context: float) -> float:
        heads = self.heads * (3 if self.gated else 2) + 2 * self.key_heads  # q, gate, output; k and v
        seen = context if self.reach is None else min(context, self.reach)
        return 2 * self.head_width * (width * heads + 2 * self.heads * seen)

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "Attention":
        return Attention(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens so far: place p in slot p, or where attention reaches S tokens back, in p mod S."""

    k_BSGK: Float[Array, "B S G K"]
    v_BSGK: Float[Array, "B S G K"]


class Attention(nnx.Module):
    def __init__(self, config: AttentionConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        D, H, G, K = width, config.heads, config.key_heads, config.head_width
        self.config = config
        # Per head [q | gate], then k, then v: one product.
        self.q_width = H * K * (2 if config.gated else 1)
        N = self.q_width + 2 * G * K
        self.w_in_DN = normal(rngs, (D, N), param_dtype, P("fsdp", None), fan_in=D)
        self.w_out_ND = normal(rngs, (H * K, D), param_dtype, P(None, "fsdp"), fan_in=H * K, gain=depth**-0.5)
        self.bias_N = constant(jnp.zeros(N), param_dtype, P(None)) if config.bias else None
        self.out_bias_D = constant(jnp.zeros(D), param_dtype, P(None)) if config.out_bias else None
        self.sinks_H = constant(jnp.zeros(H), param_dtype, P(None)) if config.sinks else None
        norm, whole = config.qk_norm, config.qk_norm_over == "projection"
        self.q_norm: RMSNorm | None = norm and norm.build(H * K if whole else K, param_dtype=param_dtype)
        self.k_norm: RMSNorm | None = norm and norm.build(G * K if whole else K, param_dtype=param_dtype)

    def __call__(self, x_BTD, state: KeyValueCache | None, context: Context):
        c, dtype = self.config, x_BTD.dtype
        B, T, _ = x_BTD.shape
        x_BTD = without_padding(x_BTD, context)
        in_BTN = project(x_BTD, read(self.w_in_DN, dtype))
        if self.bias_N is not None:
            in_BTN = in_BTN + read(self.bias_N, dtype)
        qg_BTN, k_BTN, v_BTN = jnp.split(in_BTN, [self.q_width, self.q_width + c.key_heads * c.head_width], axis=-1)
        q_BTHK = qg_BTN.reshape(B, T, c.heads, -1)
        q_BTHK, gate_BTHK = jnp.split(q_BTHK, 2, axis=-1) if c.gated else (q_BTHK, None)
        k_BTGK = k_BTN.reshape(B, T, c.key_heads, c.head_width)
        v_BTGK = v_BTN.reshape(B, T, c.key_heads, c.head_width)
        q_BTHK, k_BTGK = self._normalised(q_BTHK, k_BTGK)
        if c.clip_qkv is not None:
            q_BTHK, k_BTGK, v_BTGK = (jnp.clip(x, -c.clip_qkv, c.clip_qkv) for x in (q_BTHK, k_BTGK, v_BTGK))
        q_BTHK, k_BTGK = self._turn(q_BTHK, k_BTGK, context)
        temperature_BT = None
        if c.temperature:
            wide = jnp.promote_types(dtype, jnp.float32)
            steps_BT = jnp.floor((context.positions_BT + 1) / c.temperature_floor).astype(wide)
            temperature_BT = 1 + c.temperature * jnp.log1p(steps_BT)
        batched = (q_BTHK, k_BTGK, v_BTGK, temperature_BT, state, context.segment_ids_BT, context.cached_B)
        sinks_H = None if self.sinks_H is None else read(self.sinks_H, dtype)
        attend = functools.partial(self._attend, deferred=context.deferred and self.defers)
        o_BTHK, state = per_shard(attend, batched, sinks_H)
        if gate_BTHK is not None:
            o_BTHK = o_BTHK * jax.nn.sigmoid(gate_BTHK)
        y_BTD = project(o_BTHK.reshape(B, T, -1), read(self.w_out_ND, dtype))
        return y_BTD if self.out_bias_D is None else y_BTD + read(self.out_bias_D, dtype), state, None

    def init_state(self, batch: int, max_length: int, dtype) -> KeyValueCache:
        slots = max_length if self.config.reach is None else min(max_length, self.config.reach)
        shape = (batch, slots, self.config.key_heads, self.config.head_width)
        return KeyValueCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def _normalised(self, q_BTHK, k_BTGK):
        if self.q_norm is None or self.k_norm is None:
            return q_BTHK, k_BTGK
        if self.config.qk_norm_over == "head":
            return self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        flat = (*q_BTHK.shape[:2], -1)
        q_BTHK = self.q_norm(q_BTHK.reshape(flat)).reshape(q_BTHK.shape)
        return q_BTHK, self.k_norm(k_BTGK.reshape(flat)).reshape(k_BTGK.shape)

    def _turn(self, q_BTHK, k_BTGK, context: Context):
        """Queries and keys, rotated."""
        c = self.config
        turn = {"rotary_dim": c.rotary_dim, "theta": c.rope_theta, "layout": c.rope_layout, "scaling": c.rope_scaling}
        q_BTHK = rope(q_BTHK, context.positions_BT, **turn)
        k_BTGK = rope(k_BTGK, context.positions_BT, **turn)
        if not c.rms_after_rope:
            return q_BTHK, k_BTGK
        return rms_norm(q_BTHK, eps=c.rms_after_rope_eps), rms_norm(k_BTGK, eps=c.rms_after_rope_eps)

    @property
    def defers(self) -> bool:
        """Whether its cache may be written later than it is read."""
        return self.config.reach is None

    def _attend(self, batched, sinks_H, *, deferred: bool = False):
        q_BTHK, k_BTGK, v_BTGK, temperature_BT, cache, segment_ids_BT, cached_B = batched
        c = self.config
        options = {
            "scale": c.scale, "window": c.window, "chunk": c.chunk, "softcap": c.softcap, "sinks_H": sinks_H,
            "temperature_BT": temperature_BT, "implementation": c.implementation,
        }  # fmt: skip
        if cache is None:
            return attention(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT=segment_ids_BT, **options), None
        where = caches.whole if c.reach is None else caches.ring
        slots = where(segment_ids_BT, cached_B, q_BTHK.shape[1], cache.k_BSGK.shape[1])
        if deferred:
            k_BSGK, new_k = caches.overlaid(cache.k_BSGK, k_BTGK, slots)
            v_BSGK, new_v = caches.overlaid(cache.v_BSGK, v_BTGK, slots)
            k_BSGK, v_BSGK = k_BSGK.astype(q_BTHK.dtype), v_BSGK.astype(q_BTHK.dtype)
            written: Any = (new_k, new_v)
            return attention(q_BTHK, k_BSGK, v_BSGK, **slots.mask, **options), KeyValueCache(*written)
        new = KeyValueCache(
            caches.write(cache.k_BSGK, k_BTGK, slots),
            caches.write(cache.v_BSGK, v_BTGK, slots),
        )
        k_BSGK, v_BSGK = (x.astype(q_BTHK.dtype) for x in (new if c.reach is None else cache))
        if c.reach is not None:
            real_BT11 = (slots.query.segment_BT > 0)[..., None, None]
            k_BTGK, v_BTGK = jnp.where(real_BT11, k_BTGK, 0), jnp.where(real_BT11, v_BTGK, 0)
            k_BSGK, v_BSGK = jnp.concatenate([k_BSGK, k_BTGK], axis=1), jnp.concatenate([v_BSGK, v_BTGK], axis=1)
        return attention(q_BTHK, k_BSGK, v_BSGK, **slots.mask, **options), new
