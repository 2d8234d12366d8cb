"""Mamba-2 (SSD; Dao & Gu 2024, arXiv 2405.21060): one decay a token and head, keys and queries shared by a group of heads."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from research.layers.context import Context, without_padding
from research.layers.parameters import constant, dt_bias, log_rate, normal, project, read
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
from research.ops.mamba2_step import mamba2_step, skip_gate_norm
from research.sharding.mesh import P, per_shard


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """``heads`` heads of width ``head_width`` (together twice the model's width in the paper), each group of which shares one
    B (key) and one C (query) of ``state_width``.

    Attributes:
      groups: of heads that share B and C.
      norm_groups: groups of channels that the gated norm normalises apart; None is ``groups``.
      dt_limits: smallest and largest step size; None leaves them alone, as the authors' default.
      taps: of the short convolution over x, B and C.
      bias, conv_bias: on the projections in and out, and on the convolution.
      implementation, chunk_size: as in ``linear_attention``.
    """

    heads: int = 8
    head_width: int = 64
    groups: int = 1
    state_width: int = 128
    norm_groups: int | None = None
    dt_limits: tuple[float, float] | None = None
    taps: int = 4
    bias: bool = False
    conv_bias: bool = True
    norm_eps: float = 1e-5
    implementation: str | None = None
    chunk_size: int | None = None

    def __post_init__(self):
        at_least_one(self, "heads", "head_width", "groups", "state_width", "taps", "groups_of_norm")
        check_form(self)
        if self.heads % self.groups:
            raise ValueError(f"heads must be a multiple of groups, got {self.heads} over {self.groups}")
        if self.inner % self.groups_of_norm:
            raise ValueError(
                f"norm_groups must divide the {self.inner} channels of all heads, got {self.groups_of_norm}"
            )
        if self.dt_limits is not None and not 0 <= self.dt_limits[0] <= self.dt_limits[1]:
            raise ValueError(f"dt_limits must be a smallest and a largest step size from 0 up, got {self.dt_limits}")

    @property
    def inner(self) -> int:
        return self.heads * self.head_width

    @property
    def groups_of_norm(self) -> int:
        return self.groups if self.norm_groups is None else self.norm_groups

    def flops(self, width: int, context: float) -> float:
        projections = width * (3 * self.inner + 2 * self.groups * self.state_width + self.heads)
        return 2.0 * (projections + 2 * self.inner * self.state_width)  # the state is written and read

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "Mamba2":
        return Mamba2(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)


class Mamba2(nnx.Module):
    """``linear_attention`` with q = C, k = B, v = x·dt and g = −rate·dt; the skip reads x after the convolution; the gate comes
    before the norm."""

    def __init__(self, config: Mamba2Config, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        c, D, H, N = config, width, config.heads, config.inner
        self.config = config
        self.channels = N + 2 * c.groups * c.state_width
        # [gate | x, B, C | dt].
        self.w_in_DN = normal(rngs, (D, N + self.channels + H), param_dtype, P("fsdp", None), fan_in=D)
        self.w_conv_WN = normal(rngs, (c.taps, self.channels), param_dtype, P(None, None), fan_in=c.taps)
        self.conv_bias_N = constant(jnp.zeros(self.channels), param_dtype, P(None)) if c.conv_bias else None
        self.bias_N = constant(jnp.zeros(N + self.channels + H), param_dtype, P(None)) if c.bias else None
        self.out_bias_D = constant(jnp.zeros(D), param_dtype, P(None)) if c.bias else None
        self.log_rate_H = log_rate(rngs, (H,))
        self.dt_bias_H = dt_bias(rngs, (H,))
        self.skip_H = constant(jnp.ones(H), jnp.float32, P(None))
        self.norm_N = constant(jnp.ones(N), param_dtype, P(None))
        self.w_out_ND = normal(rngs, (N, D), param_dtype, P(None, "fsdp"), fan_in=N, gain=depth**-0.5)

    def __call__(self, x_BTD, state: RecurrentState | None, context: Context):
        T, c, dtype = x_BTD.shape[1], self.config, x_BTD.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        x_BTD = without_padding(x_BTD, context)
        in_BTN = project(x_BTD, read(self.w_in_DN, dtype))
        if self.bias_N is not None:
            in_BTN = in_BTN + read(self.bias_N, dtype)
        gate_BTN, xBC_BTN, dt_BTH = jnp.split(in_BTN, [c.inner, c.inner + self.channels], axis=-1)
        if state is not None and T == 1 and context.segment_ids_BT is None:
            y_BTN, state = self._one(xBC_BTN, gate_BTN, dt_BTH, state)
            return self._out(y_BTN, context), state, None
        dt_BTH = step_size(dt_BTH.astype(wide), read(self.dt_bias_H, wide), c.dt_limits)
        log_decay_BTH = -jnp.exp(read(self.log_rate_H, wide)) * dt_BTH
        xBC_BTN, tail_BWN = convolve(xBC_BTN, self.w_conv_WN, state, context, self.conv_bias_N)
        keys = (c.groups, c.state_width)
        x_BTHV, B_BTGK, C_BTGK = heads(xBC_BTN, (c.heads, c.head_width), keys, keys)
        x_BTHV = x_BTHV.astype(wide)
        y_BTHV, memory = attend(C_BTGK, B_BTGK, x_BTHV * dt_BTH[..., None], state, context, c, log_decay=log_decay_BTH)
        scales = read(self.skip_H, wide), read(self.norm_N, wide)
        norm = {"norm_groups": c.groups_of_norm, "eps": c.norm_eps}
        y_BTN = skip_gate_norm(y_BTHV, x_BTHV, gate_BTN, *scales, **norm).astype(dtype)
        return self._out(y_BTN, context), next_state(state, tail_BWN, memory), None

    def _one(self, xBC_BTN, gate_BTN, dt_BTH, state: RecurrentState):
        """One token between the projections, on each device's own rows."""
        c, dtype = self.config, xBC_BTN.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        shared = (
            read(self.w_conv_WN, dtype), None if self.conv_bias_N is None else read(self.conv_bias_N, dtype),
            *(read(x, wide) for x in (self.log_rate_H, self.dt_bias_H, self.skip_H, self.norm_N)),
        )  # fmt: skip

        def run(batched, shared):
            tokens, state = batched
            options = {"dt_limits": c.dt_limits, "norm_groups": c.groups_of_norm, "eps": c.norm_eps}
            y_BN, *state = mamba2_step(*(x[:, 0] for x in tokens), *state, *shared, **options)
            return y_BN[:, None], RecurrentState(*state)

        return per_shard(run, ((xBC_BTN, gate_BTN, dt_BTH), state), shared)

    def _out(self, y_BTN, context: Context):
        y_BTD = project(y_BTN, read(self.w_out_ND, y_BTN.dtype))
        if self.out_bias_D is None:
            return y_BTD
        return without_padding(y_BTD + read(self.out_bias_D, y_BTN.dtype), context)

    def init_state(self, batch: int, max_length: int, dtype) -> RecurrentState:
        c = self.config
        memory = (c.heads, c.state_width, c.head_width)
        return empty_state(batch, dtype, memory=memory, tail=(c.taps - 1, self.channels))
