"""Attention whose heads are experts: each token queries through the heads it is routed to."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
from flax import nnx

from research.axes import Array
from research.layers import caches
from research.layers.attention import KeyValueCache
from research.layers.context import Context, without_padding
from research.layers.moe import RouterBias, TopKRouter
from research.layers.parameters import normal, project, read
from research.ops import balancing
from research.ops.attention import attention
from research.ops.dispatch import combine, dispatch, from_rows, group, to_rows
from research.ops.rope import rope
from research.sharding.mesh import P, declare, per_shard


@dataclasses.dataclass(frozen=True)
class RoutedAttentionConfig:
    """Mixture of attention heads (Zhang et al. 2022, arXiv 2210.05144): every expert is a group of query heads with its
    own output projection; keys and values are shared, so the cache doesn't grow with experts.

    **Unstable.** Sparsely routed attention is known to diverge where routed MLPs don't: Switch Transformer (Fedus et al.
    2021, appendix A) trained it only in float32 and left it out. Two causes: a token that changes its experts changes
    what it asks of every earlier token at once, and queries and outputs are multiplied, so that an error of either grows
    with the other. Train in float32, keep the z-loss, warm up long, watch ``max_violation`` and the gradient's norm, and
    compare with plain attention of the same active heads before believing a gain.

    Attributes:
      experts, per_token: groups of heads, and how many each token uses.
      heads: query heads of one expert; ``key_heads`` divide ``heads``.
      head_width, rotary_fraction, rope_theta: as in ``AttentionConfig``.
      router, balance_loss, z_loss, bias_rate: as in ``MoEConfig``; weights act on the output.
    """

    experts: int = 8
    per_token: int = 2
    heads: int = 2
    key_heads: int = 2
    head_width: int = 64
    rotary_fraction: float = 0.25
    rope_theta: float = 10_000.0
    router: TopKRouter = TopKRouter()
    balance_loss: float = 0.01
    z_loss: float = 0.001
    bias_rate: float = 0.0

    def __post_init__(self):
        if not 1 <= self.per_token <= self.experts:
            raise ValueError(f"per_token must be from 1 to the {self.experts} experts, got {self.per_token}")
        if self.key_heads < 1 or self.heads % self.key_heads:
            raise ValueError(f"heads must be a multiple of key_heads, got {self.heads} over {self.key_heads}")
        if not 0 <= self.rotary_fraction <= 1 or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_fraction of head_width must be an even number of channels, got {self.rotary_fraction} of "
                f"{self.head_width}"
            )
        unused = {"weight_on": "output", "jitter": 0.0, "top_groups": 0}
        for name, only in unused.items():
            if getattr(self.router, name) != only:
                raise ValueError(f"router.{name} must be {only!r} for heads, got {getattr(self.router, name)!r}")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_width * self.rotary_fraction)

    @property
    def quantile_bias(self) -> bool:
        return False

    def flops(self, width: int, context: float) -> float:
        active = self.per_token * self.heads
        projections = width * (self.experts + self.head_width * (2 * active + 2 * self.key_heads))
        return 2.0 * (projections + 2 * active * self.head_width * context)

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "RoutedAttention":
        return RoutedAttention(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)

    def losses(self, statistics: balancing.RouterStatistics) -> dict[str, Array]:
        """The layer's auxiliary losses, coefficients included, from sums over the whole batch."""
        return {
            "balance_loss": self.balance_loss * balancing.switch_loss(statistics),
            "z_loss": self.z_loss * balancing.z_loss(statistics),
        }


class RoutedAttention(nnx.Module):
    """Auxiliary: ``RouterStatistics``, sums over the whole batch. State: keys and values, as plain attention's."""

    def __init__(self, config: RoutedAttentionConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        D, E, N, G = width, config.experts, config.heads * config.head_width, config.key_heads * config.head_width
        self.config = config
        self.w_router_DE = normal(rngs, (D, E), jnp.float32, P("fsdp", None), fan_in=D)
        self.bias_E = RouterBias(jnp.zeros(E, jnp.float32), out_sharding=declare(P(None)))
        self.w_q_EDN = normal(rngs, (E, D, N), param_dtype, P("expert", "fsdp", "tensor"), fan_in=D)
        self.w_kv_DN = normal(rngs, (D, 2 * G), param_dtype, P("fsdp", None), fan_in=D)
        gain = (depth * config.per_token) ** -0.5
        self.w_out_END = normal(rngs, (E, N, D), param_dtype, P("expert", "tensor", "fsdp"), fan_in=N, gain=gain)

    def __call__(self, x_BTD, state: KeyValueCache | None, context: Context):
        c, dtype = self.config, x_BTD.dtype
        B, T, _ = x_BTD.shape
        if jnp.finfo(dtype).bits < 32:
            warnings.warn(
                f"routed attention computed in {dtype} is known to diverge: train it in float32", stacklevel=2
            )
        x_BTD = without_padding(x_BTD, context)
        kv_BTN = project(x_BTD, read(self.w_kv_DN, dtype))
        k_BTGK, v_BTGK = (n.reshape(B, T, c.key_heads, c.head_width) for n in jnp.split(kv_BTN, 2, axis=-1))
        k_BTGK = rope(k_BTGK, context.positions_BT, rotary_dim=c.rotary_dim, theta=c.rope_theta)
        batched = (x_BTD, k_BTGK, v_BTGK, context.positions_BT, state, context.segment_ids_BT, context.cached_B)
        weights = (
            read(self.w_router_DE), read(self.bias_E), read(self.w_q_EDN, dtype), read(self.w_out_END, dtype)
        )  # fmt: skip
        (y_BTD, state), statistics = per_shard(self._local, batched, weights, summed=True)
        return y_BTD, state, statistics

    def init_state(self, batch: int, max_length: int, dtype) -> KeyValueCache:
        shape = (batch, max_length, self.config.key_heads, self.config.head_width)
        return KeyValueCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def _local(self, batched, weights):
        x_BTD, k_BTGK, v_BTGK, positions_BT, cache, segment_ids_BT, cached_B = batched
        w_router_DE, bias_E, w_q_EDN, w_out_END = weights
        c, (B, T, D) = self.config, x_BTD.shape
        x_AD = x_BTD.reshape(-1, D)
        mask_T = None if segment_ids_BT is None else segment_ids_BT.reshape(-1) > 0
        logits_AE = x_AD.astype(w_router_DE.dtype) @ w_router_DE
        assignment = c.router.choose(logits_AE, c.per_token, bias_E if c.bias_rate else None, mask_T)
        groups = group(assignment)
        # A token's choices stand in order, so each is as good as a run of heads.
        q_AN = from_rows(groups.matmul(dispatch(x_AD, groups), w_q_EDN), groups)
        q_BTHK = q_AN.reshape(B, T, c.per_token, c.key_heads, -1, c.head_width)
        # Head h of every expert reads key head h // (heads / key_heads): bring a key head's readers together.
        q_BTHK = q_BTHK.swapaxes(2, 3).reshape(B, T, -1, c.head_width)
        q_BTHK = rope(q_BTHK, positions_BT, rotary_dim=c.rotary_dim, theta=c.rope_theta)
        if cache is None:
            o_BTHK = attention(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT=segment_ids_BT)
        else:
            slots = caches.whole(segment_ids_BT, cached_B, T, cache.k_BSGK.shape[1])
            pairs = ((cache.k_BSGK, k_BTGK), (cache.v_BSGK, v_BTGK))
            cache = KeyValueCache(*(caches.write(old, new, slots) for old, new in pairs))
            read_back = functools.partial(jax.tree.map, lambda x: x.astype(q_BTHK.dtype))
            o_BTHK = attention(q_BTHK, *read_back(tuple(cache)), **slots.mask)
        o_AN = o_BTHK.reshape(B, T, c.key_heads, c.per_token, -1).swapaxes(2, 3).reshape(B * T * c.per_token, -1)
        y_AD = combine(groups.matmul(to_rows(o_AN, groups), w_out_END), groups)
        return (y_AD.reshape(B, T, D), cache), balancing.router_statistics(assignment, mask_T)
