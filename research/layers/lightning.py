"""Lightning attention as MiniMax-01 builds it (arXiv 2501.08313; Qin et al. 2024, arXiv 2401.04658)."""

import dataclasses

import jax
from flax import nnx

from research.layers.context import Context, without_padding
from research.layers.norms import RMSNormConfig
from research.layers.parameters import normal, project, read
from research.layers.place import Place, Placed
from research.layers.recurrence import (
    RecurrentState,
    at_least_one,
    attend,
    check_form,
    empty_state,
    heads,
    next_state,
)
from research.ops.decays import lightning_log_decay
from research.sharding.mesh import P, declare


class LightningDecay(nnx.Variable):
    """A layer's fixed log-decays, one a head: a constant that differs by layer, never trained."""


@dataclasses.dataclass(frozen=True)
class LightningConfig(Placed):
    """``heads`` heads of width ``head_width``; ``implementation`` and ``chunk_size`` as in ``linear_attention``."""

    heads: int = 4
    head_width: int = 64
    norm_eps: float = 1e-6
    implementation: str | None = None
    chunk_size: int | None = None

    def __post_init__(self):
        at_least_one(self, "heads", "head_width")
        check_form(self)

    def flops(self, width: int, context: float) -> float:
        inner = self.heads * self.head_width
        return 2.0 * (5 * width * inner + 2 * self.head_width * inner)  # the state is written and read

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype, place: Place) -> "Lightning":
        return Lightning(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype, place=place)


class Lightning(nnx.Module):
    """silu on q, k and v; no RoPE, no scale; decays fixed by head and layer (``lightning_log_decay``); an RMS norm over all
    heads at once; a sigmoid gate of the input. MiniMax's residual branch takes the normed input as its skip."""

    def __init__(self, config: LightningConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype, place: Place):
        D, N = width, config.heads * config.head_width
        self.config = config
        self.w_qkv_DN = normal(rngs, (D, 3 * N), param_dtype, P("fsdp", None), fan_in=D)
        self.w_gate_DN = normal(rngs, (D, N), param_dtype, P("fsdp", None), fan_in=D)
        log_decay_H = lightning_log_decay(config.heads, place.layer, place.layers)
        self.log_decay_H = LightningDecay(log_decay_H, out_sharding=declare(P(None)))
        self.norm = RMSNormConfig(eps=config.norm_eps, centred=False).build(N, param_dtype=param_dtype)
        self.w_out_ND = normal(rngs, (N, D), param_dtype, P(None, "fsdp"), fan_in=N, gain=depth**-0.5)

    def __call__(self, x_BTD, state: RecurrentState | None, context: Context):
        B, T, _ = x_BTD.shape
        c, dtype = self.config, x_BTD.dtype
        x_BTD = without_padding(x_BTD, context)
        qkv_BTN = jax.nn.silu(project(x_BTD, read(self.w_qkv_DN, dtype)))
        q_BTHK, k_BTHK, v_BTHV = heads(qkv_BTN, *((c.heads, c.head_width),) * 3)
        o_BTHV, memory = attend(q_BTHK, k_BTHK, v_BTHV, state, context, c, log_decay=read(self.log_decay_H))
        gate_BTN = jax.nn.sigmoid(project(x_BTD, read(self.w_gate_DN, dtype)))
        o_BTN = self.norm(o_BTHV.reshape(B, T, -1)) * gate_BTN
        return project(o_BTN, read(self.w_out_ND, dtype)), next_state(state, None, memory), None

    def init_state(self, batch: int, max_length: int, dtype) -> RecurrentState:
        c = self.config
        return empty_state(batch, dtype, memory=(c.heads, c.head_width, c.head_width))
