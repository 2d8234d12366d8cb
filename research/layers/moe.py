"""A mixture of experts: router, dropless dispatch, grouped SwiGLU experts, a shared expert, and their balance."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from research.axes import Array
from research.layers.context import Context
from research.layers.mlp import MLP, MLPConfig
from research.layers.parameters import normal, project, read
from research.ops import balancing
from research.ops.dispatch import expert_mlp, group, swiglu
from research.ops.routing import top_k
from research.sharding.mesh import P, declare, per_shard


class RouterBias(nnx.Variable):
    """Added to the scores for the selection only; no gradient reaches it and only the training step writes it."""


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Fine-grained experts with one shared expert (DeepSeekMoE, Dai et al. 2024, arXiv 2401.06066).

    Attributes:
      experts: how many are routed.
      per_token: experts each token visits.
      hidden: width of one expert.
      shared_hidden: width of the shared expert; 0 for none.
      shared_gate: the shared expert's output times a sigmoid of the input (Qwen2-MoE).
      score, renormalise, scale: as in ``research.ops.routing.top_k``.
      balance_loss: coefficient of N·Σ f·P, which is then its value at perfect balance, per layer.
      balance_normalisation: f sums to 1 ('per_choice') or to per_token ('per_token').
      z_loss: coefficient of mean(logsumexp(logits)²), per layer.
      bias_rate: step of the loss-free selection bias (DeepSeek-V3); 0 leaves it at zero.
    """

    experts: int = 16
    per_token: int = 2
    hidden: int = 128
    shared_hidden: int = 128
    shared_gate: bool = False
    score: Literal["softmax", "softmax_after", "sigmoid"] = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    balance_loss: float = 0.01
    balance_normalisation: Literal["per_choice", "per_token"] = "per_choice"
    z_loss: float = 0.001
    bias_rate: float = 0.0

    def __post_init__(self):
        if not 1 <= self.per_token <= self.experts:
            raise ValueError(f"per_token must be from 1 to the {self.experts} experts, got {self.per_token}")
        if self.shared_gate and not self.shared_hidden:
            raise ValueError("shared_gate needs a shared expert: shared_hidden must be at least 1, got 0")

    def flops(self, width: int, context: float) -> float:
        hidden = self.per_token * self.hidden + self.shared_hidden
        return 2 * width * (self.experts + 3 * hidden + (1 if self.shared_gate else 0))

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "MoE":
        return MoE(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)

    def losses(self, statistics: balancing.RouterStatistics) -> dict[str, Array]:
        """The layer's auxiliary losses, coefficients included, from sums over the whole batch."""
        balance = balancing.switch_loss(statistics, normalisation=self.balance_normalisation)
        return {"balance_loss": self.balance_loss * balance, "z_loss": self.z_loss * balancing.z_loss(statistics)}


class MoE(nnx.Module):
    """Auxiliary: ``RouterStatistics``, sums over the whole batch."""

    def __init__(self, config: MoEConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        c, D, E, F = config, width, config.experts, config.hidden
        gain = depth**-0.5
        self.config = config
        self.w_router_DE = normal(rngs, (D, E), jnp.float32, P("fsdp", None), fan_in=D)
        self.bias_E = RouterBias(jnp.zeros(E, jnp.float32), out_sharding=declare(P(None)))
        self.w_in_EDF = normal(rngs, (E, D, 2 * F), param_dtype, P(None, "fsdp", None), fan_in=D)
        self.w_out_EFD = normal(rngs, (E, F, D), param_dtype, P(None, None, "fsdp"), fan_in=F, gain=gain)
        shared = MLPConfig(c.shared_hidden) if c.shared_hidden else None
        self.shared: MLP | None = shared and shared.build(D, depth=depth, rngs=rngs, param_dtype=param_dtype)
        self.w_shared_gate_D1 = normal(rngs, (D, 1), param_dtype, P("fsdp", None), fan_in=D) if c.shared_gate else None

    def __call__(self, x_BTD, state, context: Context):
        dtype = x_BTD.dtype
        weights = (
            read(self.w_router_DE), read(self.bias_E), read(self.w_in_EDF, dtype), read(self.w_out_EFD, dtype)
        )  # fmt: skip
        y_BTD, statistics = per_shard(self._route, (x_BTD, context.segment_ids_BT), weights, summed=True)
        if self.shared is not None:
            shared_BTD, _, _ = self.shared(x_BTD)
            if self.w_shared_gate_D1 is not None:
                shared_BTD = shared_BTD * jax.nn.sigmoid(project(x_BTD, read(self.w_shared_gate_D1, dtype)))
            y_BTD = y_BTD + shared_BTD
        return y_BTD, state, statistics

    def _route(self, batched, weights):
        x_BTD, segment_ids_BT = batched
        w_router_DE, bias_E, w_in_EDF, w_out_EFD = weights
        c, D = self.config, x_BTD.shape[-1]
        x_TD = x_BTD.reshape(-1, D)
        mask_T = None if segment_ids_BT is None else segment_ids_BT.reshape(-1) > 0
        logits_TE = x_TD.astype(w_router_DE.dtype) @ w_router_DE
        assignment = top_k(
            logits_TE, c.per_token, score=c.score, renormalise=c.renormalise, scale=c.scale,
            bias_E=bias_E if c.bias_rate else None, mask_T=mask_T,
        )  # fmt: skip
        y_TD = expert_mlp(x_TD, w_in_EDF, w_out_EFD, group(assignment), activation=swiglu)
        return y_TD.reshape(x_BTD.shape), balancing.router_statistics(assignment, mask_T)

    def init_state(self, batch: int, max_length: int, dtype):
        return None
