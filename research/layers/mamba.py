"""Mamba (Gu & Dao 2023, arXiv 2312.00752): the selective state-space model, K states a channel."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from research.layers.context import Context, without_padding
from research.layers.parameters import constant, dt_bias, normal, project, read
from research.layers.recurrence import (
    RecurrentState,
    at_least_one,
    convolve,
    empty_state,
    next_state,
    sequence_or_step,
)
from research.ops.norms import rms_norm
from research.ops.selective_scan import check_form, selective_scan, selective_scan_step
from research.sharding.mesh import P


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """``channels`` channels (the paper's are twice the model's width) with ``state_width`` states each.

    Attributes:
      dt_rank: of the projection to the channels' step sizes (the paper's is a sixteenth of the model's width).
      taps: of the short convolution.
      bias, conv_bias: on the projections in and out, and on the convolution.
      select_norm_eps: step sizes (before they are spread over the channels), B and C are divided by their root mean square
        with this epsilon (Falcon Mamba, arXiv 2410.05355); None leaves them.
      implementation, chunk_size: as in ``selective_scan``.
    """

    channels: int = 512
    state_width: int = 16
    dt_rank: int = 16
    taps: int = 4
    bias: bool = False
    conv_bias: bool = True
    select_norm_eps: float | None = None
    implementation: str | None = None
    chunk_size: int | None = None

    def __post_init__(self):
        at_least_one(self, "channels", "state_width", "dt_rank", "taps")
        try:
            check_form(self.implementation, self.chunk_size)
        except NotImplementedError as error:
            raise ValueError(str(error)) from error

    def flops(self, width: int, context: float) -> float:
        N, K, R = self.channels, self.state_width, self.dt_rank
        return 2.0 * (3 * width * N + N * (R + 2 * K) + R * N + 2 * N * K)  # the state is written and read

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "Mamba":
        return Mamba(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)


class Mamba(nnx.Module):
    def __init__(self, config: MambaConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        c, D, N, K, R = config, width, config.channels, config.state_width, config.dt_rank
        self.config = config
        # [x | gate].
        self.w_in_DN = normal(rngs, (D, 2 * N), param_dtype, P("fsdp", None), fan_in=D)
        self.w_conv_WN = normal(rngs, (c.taps, N), param_dtype, P(None, None), fan_in=c.taps)
        self.conv_bias_N = constant(jnp.zeros(N), param_dtype, P(None)) if c.conv_bias else None
        self.bias_N = constant(jnp.zeros(2 * N), param_dtype, P(None)) if c.bias else None
        self.out_bias_D = constant(jnp.zeros(D), param_dtype, P(None)) if c.bias else None
        # [dt | B | C].
        self.w_select_NM = normal(rngs, (N, R + 2 * K), param_dtype, P("fsdp", None), fan_in=N)
        self.w_dt_RN = normal(rngs, (R, N), param_dtype, P(None, "fsdp"), fan_in=R)
        self.dt_bias_N = dt_bias(rngs, (N,))
        # S4D-Real: rates 1 … K in every channel.
        log_rate_NK = jnp.broadcast_to(jnp.log(jnp.arange(1, K + 1, dtype=jnp.float32)), (N, K))
        self.log_rate_NK = constant(log_rate_NK, jnp.float32, P(None, None))
        self.skip_N = constant(jnp.ones(N), jnp.float32, P(None))
        self.w_out_ND = normal(rngs, (N, D), param_dtype, P(None, "fsdp"), fan_in=N, gain=depth**-0.5)

    def __call__(self, x_BTD, state: RecurrentState | None, context: Context):
        c, dtype = self.config, x_BTD.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        x_BTD = without_padding(x_BTD, context)
        in_BTN = project(x_BTD, read(self.w_in_DN, dtype))
        if self.bias_N is not None:
            in_BTN = in_BTN + read(self.bias_N, dtype)
        x_BTN, gate_BTN = jnp.split(in_BTN, 2, axis=-1)
        x_BTN, tail_BWN = convolve(x_BTN, self.w_conv_WN, state, context, self.conv_bias_N)
        select_BTM = project(x_BTN, read(self.w_select_NM, dtype))
        dt_BTR, B_BTK, C_BTK = jnp.split(select_BTM, [c.dt_rank, c.dt_rank + c.state_width], axis=-1)
        if c.select_norm_eps is not None:
            dt_BTR, B_BTK, C_BTK = (rms_norm(x, eps=c.select_norm_eps) for x in (dt_BTR, B_BTK, C_BTK))
        dt_BTN = project(dt_BTR, read(self.w_dt_RN, dtype))
        options = {"dt_softplus": True, "implementation": c.implementation, "chunk_size": c.chunk_size}
        y_BTN, memory = sequence_or_step(
            lambda x, dt, B, C, *, A_NK, **given: selective_scan(x, dt, A_NK, B, C, **given, **options),
            lambda x, dt, B, C, memory, *, A_NK, **given: selective_scan_step(
                x, dt, A_NK, B, C, memory, dt_softplus=True, **given
            ),
            (x_BTN, dt_BTN, B_BTK, C_BTK), state, context,
            shared={
                "A_NK": -jnp.exp(read(self.log_rate_NK, wide)),
                "skip_D": read(self.skip_N, wide),
                "dt_bias_D": read(self.dt_bias_N, wide),
            },
        )  # fmt: skip
        y_BTD = project(y_BTN * jax.nn.silu(gate_BTN), read(self.w_out_ND, dtype))
        if self.out_bias_D is not None:
            y_BTD = without_padding(y_BTD + read(self.out_bias_D, dtype), context)
        return y_BTD, next_state(state, tail_BWN, memory), None

    def init_state(self, batch: int, max_length: int, dtype) -> RecurrentState:
        c = self.config
        return empty_state(batch, dtype, memory=(c.channels, c.state_width), tail=(c.taps - 1, c.channels))
