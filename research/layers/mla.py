"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, §2.1): keys and values of all heads in one small latent."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx

from research.axes import Array, Float
from research.layers import caches
from research.layers.context import Context, without_padding
from research.layers.norms import RMSNormConfig
from research.layers.parameters import normal, project, read
from research.ops.attention import attention
from research.ops.attention.dispatch import check_implementation
from research.ops.rope import RopeLayout, RopeScaling, YarnScaling, rope
from research.sharding.mesh import P, per_shard


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """``heads`` query heads of ``nope_width`` + ``rope_width`` channels, of which the last turn with the position.

    Attributes:
      value_width: of one value head.
      latent: width of what all keys and values are made from; it is cached, beside one rotated key for all heads.
      query_latent: width of what the queries are made from; None makes them from the input.
      rope_theta, rope_layout, rope_scaling: as in ``research.ops.rope``; DeepSeek's turns pairs. A theta
        of None turns nothing (Kimi Linear).
      norm_eps: of the norms on both latents (1e-6 in DeepSeek's whatever the model's).
      scale: of the scores; None is (nope_width + rope_width)^-1/2, times YaRN's own where it has one.
      form: 'absorbed' attends to the latents themselves (one key head of latent + rope_width channels; decoding),
        'unabsorbed' makes keys and values of every head from them (prefill). They are equal; None takes the cheaper.
      implementation: as in ``research.ops.attention``.
    """

    heads: int = 8
    nope_width: int = 64
    rope_width: int = 32
    value_width: int = 64
    latent: int = 128
    query_latent: int | None = None
    rope_theta: float | None = 10_000.0
    rope_layout: RopeLayout = "pairs"
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    scale: float | None = None
    form: Literal["absorbed", "unabsorbed"] | None = None
    implementation: str | None = None

    def __post_init__(self):
        check_implementation(self.implementation)
        for name in ("heads", "nope_width", "value_width", "latent"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rope_width < 0 or self.rope_width % 2:
            raise ValueError(f"rope_width must be even and not negative, got {self.rope_width}")
        if self.query_latent is not None and self.query_latent < 1:
            raise ValueError(f"query_latent must be None or at least 1, got {self.query_latent}")

    @property
    def score_scale(self) -> float:
        if self.scale is not None:
            return self.scale
        stretch = self.rope_scaling.score_scale if isinstance(self.rope_scaling, YarnScaling) else 1.0
        return (self.nope_width + self.rope_width) ** -0.5 * stretch

    @property
    def projection_weights(self) -> tuple[int, int]:
        """How many, per unit of the model's width, and those between the latents: (per width, fixed)."""
        query, key = self.heads * (self.nope_width + self.rope_width), self.latent + self.rope_width
        spread = self.latent * self.heads * (self.nope_width + self.value_width)
        if self.query_latent is None:
            return query + key + self.heads * self.value_width, spread
        return self.query_latent + key + self.heads * self.value_width, spread + self.query_latent * query

    def flops(self, width: int, context: float) -> float:
        """Of the unabsorbed form."""
        per_width, fixed = self.projection_weights
        scores = self.heads * (self.nope_width + self.rope_width + self.value_width)
        return 2 * (width * per_width + fixed + scores * context)

    def absorbs(self, length: int) -> bool:
        """Whether ``length`` new tokens read a cache more cheaply in the absorbed form: it spends more on each score, the
        other on making keys and values."""
        if self.form is not None:
            return self.form == "absorbed"
        saved = 2 * self.latent - self.nope_width - self.value_width
        return saved * length < self.latent * (self.nope_width + self.value_width)

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "MLA":
        return MLA(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)


class LatentCache(NamedTuple):
    """Of each token so far its normalised latent and, behind it, the rotated key that all heads share."""

    latent_BSK: Float[Array, "B S K"]


class MLA(nnx.Module):
    def __init__(self, config: MLAConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        c, D, H = config, width, config.heads
        self.config = config
        norm = RMSNormConfig(eps=c.norm_eps, centred=False)
        queries, R = H * (c.nope_width + c.rope_width), c.query_latent
        if R is None:
            self.w_query_down_DR = self.query_norm = None
        else:
            self.w_query_down_DR = normal(rngs, (D, R), param_dtype, P("fsdp", None), fan_in=D)
            self.query_norm = norm.build(R, param_dtype=param_dtype)
        self.w_query_RN = normal(rngs, (R or D, queries), param_dtype, P("fsdp", None), fan_in=R or D)
        self.w_down_DK = normal(rngs, (D, c.latent + c.rope_width), param_dtype, P("fsdp", None), fan_in=D)
        self.latent_norm = norm.build(c.latent, param_dtype=param_dtype)
        # Heads first, and last what a decoded token contracts over: a product a head without moving either.
        keys, values = (H, c.latent, c.nope_width), (H, c.value_width, c.latent)
        self.w_key_HKN = normal(rngs, keys, param_dtype, P(None, "fsdp", None), fan_in=c.latent)
        self.w_value_HVK = normal(rngs, values, param_dtype, P(None, None, "fsdp"), fan_in=c.latent)
        out = H * c.value_width
        self.w_out_ND = normal(rngs, (out, D), param_dtype, P(None, "fsdp"), fan_in=out, gain=depth**-0.5)

    def __call__(self, x_BTD, state: LatentCache | None, context: Context) -> tuple[Any, Any, Any]:
        x_BTD = without_padding(x_BTD, context)
        q_BTHK, _ = self.queries(x_BTD, context)
        batched = (q_BTHK, self.latents(x_BTD, context), state, context.segment_ids_BT, context.cached_B)
        o_BTHV, state = per_shard(self._attend, batched, self.spreading(x_BTD.dtype))
        return self.output(o_BTHV), state, None

    def init_state(self, batch: int, max_length: int, dtype) -> Any:
        return LatentCache(jnp.zeros((batch, max_length, self.config.latent + self.config.rope_width), dtype))

    def queries(self, x_BTD, context: Context):
        """Queries [nope | rope] of every head, and what they are made from: the normalised latent, or the input."""
        c, dtype = self.config, x_BTD.dtype
        latent_BTR = x_BTD
        if self.w_query_down_DR is not None and self.query_norm is not None:
            latent_BTR = self.query_norm(project(x_BTD, read(self.w_query_down_DR, dtype)))
        q_BTN = project(latent_BTR, read(self.w_query_RN, dtype))
        q_BTHK = q_BTN.reshape(*x_BTD.shape[:2], c.heads, c.nope_width + c.rope_width)
        nope_BTHK, rope_BTHK = jnp.split(q_BTHK, [c.nope_width], axis=-1)
        return jnp.concatenate([nope_BTHK, self._turned(rope_BTHK, context)], axis=-1), latent_BTR

    def latents(self, x_BTD, context: Context):
        """What is cached of each token: [normalised latent | rotated key]."""
        down_BTK = project(x_BTD, read(self.w_down_DK, x_BTD.dtype))
        latent_BTK, key_BTK = jnp.split(down_BTK, [self.config.latent], axis=-1)
        return jnp.concatenate(
            [self.latent_norm(latent_BTK), self._turned(key_BTK[:, :, None], context)[:, :, 0]], axis=-1
        )

    def spreading(self, dtype) -> tuple[Array, Array]:
        """What makes keys and values of every head from latents: (W_UK, W_UV)."""
        return read(self.w_key_HKN, dtype), read(self.w_value_HVK, dtype)

    def output(self, o_BTHV):
        return project(o_BTHV.reshape(*o_BTHV.shape[:2], -1), read(self.w_out_ND, o_BTHV.dtype))

    def _turned(self, x_BTHK, context: Context):
        c = self.config
        if c.rope_theta is None:
            return x_BTHK
        turn = {"theta": c.rope_theta, "layout": c.rope_layout, "scaling": c.rope_scaling}
        return rope(x_BTHK, context.positions_BT, **turn)

    def _attend(self, batched, weights):
        w_key_HKN, w_value_HVK = weights
        q_BTHK, latent_BTK, cache, segment_ids_BT, cached_B = batched
        c = self.config
        options = {"scale": c.score_scale, "implementation": c.implementation}
        if cache is None:
            mask, absorbed = {"segment_ids_BT": segment_ids_BT}, c.form == "absorbed"
            latent_BSK = latent_BTK
        else:
            slots = caches.whole(segment_ids_BT, cached_B, q_BTHK.shape[1], cache.latent_BSK.shape[1])
            cache = LatentCache(caches.write(cache.latent_BSK, latent_BTK, slots))
            mask, absorbed = slots.mask, c.absorbs(q_BTHK.shape[1])
            latent_BSK = cache.latent_BSK.astype(q_BTHK.dtype)
        if absorbed:
            q_BTHK = absorb(q_BTHK, w_key_HKN)
            # The rotated key is read with the values and dropped after: to take the latents alone would copy the cache.
            key_BS1K = latent_BSK[:, :, None]
            o_BTHK = attention(q_BTHK, key_BS1K, key_BS1K, **mask, **options)
            return read_out(o_BTHK[..., : c.latent], w_value_HVK), cache
        return attention(q_BTHK, *spread(latent_BSK, w_key_HKN, w_value_HVK), **mask, **options), cache


def spread(latent_BSK, w_key_HKN, w_value_HVK):
    """Keys [nope | rope] and values of every head, made from what is cached: the unabsorbed form."""
    latent_BSK, key_BSK = jnp.split(latent_BSK, [w_key_HKN.shape[1]], axis=-1)
    nope_BSHN = jnp.einsum("BSK,HKN->BSHN", latent_BSK, w_key_HKN)
    key_BSHK = jnp.broadcast_to(key_BSK[:, :, None], (*nope_BSHN.shape[:3], key_BSK.shape[-1]))
    return jnp.concatenate([nope_BSHN, key_BSHK], axis=-1), jnp.einsum("BSK,HVK->BSHV", latent_BSK, w_value_HVK)


def absorb(q_BTHK, w_key_HKN):
    """Queries that meet latents as they are cached: W_UKᵀ q beside the rotated channels (§2.1.2, "absorbed into W^Q")."""
    nope_BTHN, rope_BTHK = jnp.split(q_BTHK, [w_key_HKN.shape[-1]], axis=-1)
    return jnp.concatenate([jnp.einsum("BTHN,HKN->BTHK", nope_BTHN, w_key_HKN), rope_BTHK], axis=-1)


def read_out(o_BTHK, w_value_HVK):
    """Values of every head from a mean of latents: W_UV after attention instead of before."""
    return jnp.einsum("BTHK,HVK->BTHV", o_BTHK, w_value_HVK)
