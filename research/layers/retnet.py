"""Multi-scale retention (RetNet; Sun et al. 2023, arXiv 2307.08621, eq. 6–8)."""

import dataclasses

import jax
from flax import nnx

from research.layers.context import Context, without_padding
from research.layers.parameters import normal, project, read
from research.layers.recurrence import (
    RecurrentState,
    at_least_one,
    attend,
    check_form,
    empty_state,
    heads,
    next_state,
)
from research.ops.decays import retention_log_decay
from research.ops.norms import layer_norm
from research.ops.rope import rope
from research.sharding.mesh import P


@dataclasses.dataclass(frozen=True)
class RetNetConfig:
    """``heads`` heads with keys of width ``key_width`` and values of ``value_width`` (the paper's are twice as wide).

    Attributes:
      rope_theta: base of the rotation of q and k.
      implementation, chunk_size: as in ``linear_attention``.
    """

    heads: int = 4
    key_width: int = 64
    value_width: int = 128
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    implementation: str | None = None
    chunk_size: int | None = None

    def __post_init__(self):
        at_least_one(self, "heads", "key_width", "value_width")
        check_form(self)
        if self.key_width % 2:
            raise ValueError(f"key_width must be even to turn with the position, got {self.key_width}")

    def flops(self, width: int, context: float) -> float:
        keys, values = self.heads * self.key_width, self.heads * self.value_width
        recurrence = 2 * self.key_width * values  # write, read
        return 2.0 * (width * (2 * keys + 3 * values) + recurrence)

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "RetNet":
        return RetNet(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)


class RetNet(nnx.Module):
    """As the paper has it: q and k turn with the position (plain RoPE: of xPos the paper keeps the rotation Θ_n = e^{inθ}, and
    γ takes the place of its decay), each head decays by its own γ_h = 1 − 2^(−5−h), and a group norm without parameters, one
    group a head, stands before the swish gate. The paper's three normalisations of the scores scale a token's output by
    one number a head, which the group norm takes out again; of them only K^-1/2 is kept."""

    def __init__(self, config: RetNetConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        D, H, K, V = width, config.heads, config.key_width, config.value_width
        self.config = config
        self.w_qkv_DN = normal(rngs, (D, H * (2 * K + V)), param_dtype, P("fsdp", None), fan_in=D)
        self.w_gate_DN = normal(rngs, (D, H * V), param_dtype, P("fsdp", None), fan_in=D)
        self.w_out_ND = normal(rngs, (H * V, D), param_dtype, P(None, "fsdp"), fan_in=H * V, gain=depth**-0.5)

    def __call__(self, x_BTD, state: RecurrentState | None, context: Context):
        B, T, _ = x_BTD.shape
        c, dtype = self.config, x_BTD.dtype
        x_BTD = without_padding(x_BTD, context)
        keys = (c.heads, c.key_width)
        q_BTHK, k_BTHK, v_BTHV = heads(project(x_BTD, read(self.w_qkv_DN, dtype)), keys, keys, (c.heads, c.value_width))
        q_BTHK, k_BTHK = (rope(x, context.positions_BT, theta=c.rope_theta) for x in (q_BTHK, k_BTHK))
        log_decay_H = retention_log_decay(c.heads)
        o_BTHV, memory = attend(
            q_BTHK, k_BTHK, v_BTHV, state, context, c, log_decay=log_decay_H, scale=c.key_width**-0.5
        )
        gate_BTHV = project(x_BTD, read(self.w_gate_DN, dtype)).reshape(o_BTHV.shape)
        o_BTHV = layer_norm(o_BTHV, eps=c.norm_eps) * jax.nn.silu(gate_BTHV)
        y_BTD = project(o_BTHV.reshape(B, T, -1), read(self.w_out_ND, dtype))
        return y_BTD, next_state(state, None, memory), None

    def init_state(self, batch: int, max_length: int, dtype) -> RecurrentState:
        c = self.config
        return empty_state(batch, dtype, memory=(c.heads, c.key_width, c.value_width))
