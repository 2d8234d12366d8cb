"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236): a feature map, and softmax's denominator or a norm."""

import dataclasses
import functools

from flax import nnx

from research.layers.context import Context, without_padding
from research.layers.norms import RMSNorm, RMSNormConfig
from research.layers.parameters import normal, project, read
from research.layers.recurrence import (
    RecurrentState,
    at_least_one,
    attend,
    check_form,
    empty_state,
    heads,
    next_state,
    sequence_or_step,
)
from research.ops.normalised_linear_attention import (
    FeatureMap,
    feature_map,
    normalised_linear_attention,
    normalised_linear_attention_step,
)
from research.sharding.mesh import P


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig:
    """``heads`` value heads of width ``value_width`` over ``key_heads`` key heads of width ``key_width``.

    Attributes:
      feature_map: of q and k: 'identity', 'elu' (elu + 1), 'relu' or 'softmax' over the features.
      normalise: divide by the sum of the weights, as softmax does. Without, an RMS norm over each head takes the place of
        the denominator (Qin et al. 2022, arXiv 2210.10340), and weights may be negative.
      implementation, chunk_size: as in ``linear_attention``.
    """

    heads: int = 4
    key_heads: int = 4
    key_width: int = 64
    value_width: int = 64
    feature_map: FeatureMap = "elu"
    normalise: bool = True
    norm_eps: float = 1e-6
    implementation: str | None = None
    chunk_size: int | None = None

    def __post_init__(self):
        at_least_one(self, "key_width", "value_width")
        check_form(self)
        if self.key_heads < 1 or self.heads < 1 or self.heads % self.key_heads:
            raise ValueError(f"heads must be a multiple of key_heads, got {self.heads} over {self.key_heads}")
        if self.normalise and self.feature_map == "identity":
            raise ValueError("normalise needs a feature_map without negative features, got 'identity'")

    def flops(self, width: int, context: float) -> float:
        keys, values = self.key_heads * self.key_width, self.heads * self.value_width
        columns = values + (self.heads if self.normalise else 0)
        return 2.0 * (width * (2 * keys + 2 * values) + 2 * self.key_width * columns)  # the state is written and read

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "LinearAttention":
        return LinearAttention(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)


class LinearAttention(nnx.Module):
    def __init__(self, config: LinearAttentionConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        c, D = config, width
        keys, values = c.key_heads * c.key_width, c.heads * c.value_width
        self.config = config
        self.w_qkv_DN = normal(rngs, (D, 2 * keys + values), param_dtype, P("fsdp", None), fan_in=D)
        norm = RMSNormConfig(eps=c.norm_eps, centred=False)
        self.norm: RMSNorm | None = None if c.normalise else norm.build(c.value_width, param_dtype=param_dtype)
        self.w_out_ND = normal(rngs, (values, D), param_dtype, P(None, "fsdp"), fan_in=values, gain=depth**-0.5)

    def __call__(self, x_BTD, state: RecurrentState | None, context: Context):
        B, T, _ = x_BTD.shape
        c, dtype = self.config, x_BTD.dtype
        x_BTD = without_padding(x_BTD, context)
        keys = (c.key_heads, c.key_width)
        q_BTGK, k_BTGK, v_BTHV = heads(project(x_BTD, read(self.w_qkv_DN, dtype)), keys, keys, (c.heads, c.value_width))
        if self.norm is None:
            options = {"implementation": c.implementation, "chunk_size": c.chunk_size}
            o_BTHV, memory = sequence_or_step(
                functools.partial(normalised_linear_attention, feature_map=c.feature_map, **options),
                functools.partial(normalised_linear_attention_step, feature_map=c.feature_map),
                (q_BTGK, k_BTGK, v_BTHV), state, context,
            )  # fmt: skip
        else:
            q_BTGK, k_BTGK = (feature_map(x, c.feature_map) for x in (q_BTGK, k_BTGK))
            o_BTHV, memory = attend(q_BTGK, k_BTGK, v_BTHV, state, context, c)
            o_BTHV = self.norm(o_BTHV)
        y_BTD = project(o_BTHV.reshape(B, T, -1), read(self.w_out_ND, dtype))
        return y_BTD, next_state(state, None, memory), None

    def init_state(self, batch: int, max_length: int, dtype) -> RecurrentState:
        c = self.config
        return empty_state(batch, dtype, memory=(c.heads, c.key_width, c.value_width + c.normalise))
