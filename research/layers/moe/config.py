"""What a mixture of experts is made of."""

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

from flax import nnx

from research.axes import Array
from research.layers.moe.routers import GShardRouter, NoisyTopKRouter, ReinforceRouter, Router, Scope, TopKRouter
from research.ops import balancing
from research.ops.dispatch import GATED, activation
from research.sharding.expert_parallel import ExchangePlan, devices_within_reach, exchange_plan

if TYPE_CHECKING:
    from research.layers.moe.layer import MoE


@dataclasses.dataclass(frozen=True)
class Activation:
    """``research.ops.dispatch.activation``, which explains the fields. GPT-OSS: swiglu, limit 7, alpha 1.702, shift 1."""

    name: Literal["swiglu", "geglu", "relu2", "relu", "gelu"] = "swiglu"
    limit: float = 0.0
    alpha: float = 1.0
    shift: float = 0.0

    def __post_init__(self):
        self.function()

    @property
    def matrices(self) -> int:
        """Matrices into the hidden width: gate and up, or one."""
        return 2 if self.name in GATED else 1

    def function(self):
        return activation(self.name, limit=self.limit, alpha=self.alpha, shift=self.shift)


@dataclasses.dataclass(frozen=True)
class Dropless:
    """Every assignment is computed, whatever the load. 'sorted' multiplies rows sorted by expert, 'one_hot' is the
    definition, tokens × experts × slots: for tests."""

    form: Literal["sorted", "one_hot"] = "sorted"


@dataclasses.dataclass(frozen=True)
class Capacity:
    """An expert takes ``factor`` times its even share of the assignments and no more; what is dropped passes through the
    residual stream only, so a token's output depends on the tokens beside it.

    Attributes:
      factor: 1 has no slack. Switch: 1.25.
      by: who is served first, by 'position' or 'probability' (``research.ops.dispatch.limit_capacity``).
      scope: experts count the tokens of a row (Switch as published), or of the whole batch.
      form: see `Dropless`.
    """

    factor: float = 1.25
    by: Literal["position", "probability"] = "position"
    scope: Scope = "row"
    form: Literal["sorted", "one_hot"] = "sorted"

    def __post_init__(self):
        if self.factor <= 0:
            raise ValueError(f"factor must be positive, got {self.factor}")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Fine-grained experts with one shared expert (DeepSeekMoE, Dai et al. 2024, arXiv 2401.06066), and the rest of the
    field by its options. Every router goes with every dispatch, balance and expert.

    Attributes:
      experts: how many are routed.
      per_token: experts each token visits; the mean for an ExpertChoiceRouter.
      hidden: width of one expert.
      shared_hidden: width of the shared expert; 0 for none.
      shared_gate: the shared expert's output times a sigmoid of the input (Qwen2-MoE).
      latent: width the routed experts read and write, tokens being projected down before dispatch and up after
        (Nemotron 3); 0 for the model's own. Router and shared expert see the whole token.
      activation: of all experts. biases: whether their matrices have them.
      router: how tokens find experts. router_hidden: width of an MLP (SiLU) that computes the logits; 0 for a matrix.
      router_bias: added to the logits (GPT-OSS).
      dispatch: dropless, or with a capacity.
      groups: equal groups of experts, in order: what ``router.top_groups``, the device and the communication loss count.
        0 follows the mesh: one group for every ``group_devices`` devices along its expert axis, which may be 1 (a
        device), a host's (4 or 8) or a rack's (64, 72). Such a model routes by the mesh it runs on: with fewer devices
        there are fewer groups, and on one device a single one, so that ``top_groups`` limits nothing there. Name the
        number of groups if it must route alike wherever it runs.
      balance_loss: coefficient of N·Σ f·P, which is then its value at perfect balance, per layer.
      balance_normalisation: f sums to 1 ('per_choice') or to per_token ('per_token').
      z_loss: coefficient of mean(logsumexp(logits)²), per layer.
      sequence_loss: of DeepSeek-V3's balance loss within each row (1e-4).
      device_loss, communication_loss: of DeepSeekMoE's and V2's losses over groups (0.05 and 0.02 in V2).
      importance_loss, load_loss: of Shazeer's CV² losses (0.1 each). importance_of: the 'weights' of what tokens choose
        (Shazeer), or the 'probabilities' of all experts (V-MoE), which also reach experts that nobody visits.
      bias_rate: step of the loss-free selection bias (DeepSeek-V3: 1e-3); 0 leaves it at zero. Needs a TopKRouter.
      quantile_bias: the selection bias is set by quantile balancing instead.
      exchange: how tokens reach experts on other devices (``research.sharding.expert_parallel``); 'auto' asks its byte
        model. chunks: in how many parts, so that one part travels while another is computed. slack: room for uneven
        loads in what travels, as a multiple of the even load; beyond it a slower way is taken and nothing is lost.
    """

    experts: int = 16
    per_token: int = 2
    hidden: int = 128
    shared_hidden: int = 128
    shared_gate: bool = False
    latent: int = 0
    activation: Activation = Activation()
    biases: bool = False
    router: Router = TopKRouter()
    router_hidden: int = 0
    router_bias: bool = False
    dispatch: Dropless | Capacity = Dropless()
    groups: int = 1
    group_devices: int = 1
    balance_loss: float = 0.01
    balance_normalisation: Literal["per_choice", "per_token"] = "per_choice"
    z_loss: float = 0.001
    sequence_loss: float = 0.0
    device_loss: float = 0.0
    communication_loss: float = 0.0
    importance_loss: float = 0.0
    load_loss: float = 0.0
    importance_of: Literal["weights", "probabilities"] = "weights"
    bias_rate: float = 0.0
    quantile_bias: bool = False
    exchange: Literal["auto", "all_to_all", "ragged", "padded", "ring"] = "auto"
    chunks: int = 1
    slack: float = 2.0

    def __post_init__(self):
        if not 1 <= self.per_token <= self.experts:
            raise ValueError(f"per_token must be from 1 to the {self.experts} experts, got {self.per_token}")
        if self.shared_gate and not self.shared_hidden:
            raise ValueError("shared_gate needs a shared expert: shared_hidden must be at least 1, got 0")
        if self.groups < 0 or (self.groups and self.experts % self.groups):
            raise ValueError(f"groups must divide the {self.experts} experts (or be 0), got {self.groups}")
        for field in ("hidden", "group_devices", "chunks"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("shared_hidden", "latent", "router_hidden"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must be at least 0, got {getattr(self, field)}")
        if self.slack < 1:
            raise ValueError(f"slack must be at least 1, got {self.slack}")
        self.router.check(self.experts, self.per_token, self.groups)
        if self.selection_bias and not isinstance(self.router, TopKRouter):
            raise ValueError(f"bias_rate and quantile_bias need a TopKRouter, got a {type(self.router).__name__}")
        if self.bias_rate and self.quantile_bias:
            raise ValueError(f"bias_rate must be 0 with quantile_bias, got {self.bias_rate}")
        if self.quantile_bias and self.per_token == self.experts:
            raise ValueError(f"per_token must be below the {self.experts} experts for quantile_bias")
        if self.communication_loss and not getattr(self.router, "top_groups", 0):
            raise ValueError(
                "communication_loss counts visits to top groups: router.top_groups must be at least 1, got 0"
            )
        if self.device_loss and self.groups == 1:
            raise ValueError("device_loss balances groups: groups must be 0 or at least 2, got 1")
        if self.load_loss and not isinstance(self.router, NoisyTopKRouter):
            raise ValueError(f"load_loss needs a NoisyTopKRouter, got a {type(self.router).__name__}")

    def groups_over(self, devices: int) -> int:
        """Groups of experts on a mesh with ``devices`` along its expert axis.

        Raises:
          ValueError: groups that follow the mesh, which can't be cut into whole ones.
        """
        if self.groups:
            return self.groups
        if devices > self.group_devices and devices % self.group_devices:
            raise ValueError(
                f"group_devices must divide the {devices} devices of the mesh's expert axis, got {self.group_devices}"
            )
        return max(1, devices // self.group_devices)

    @property
    def selection_bias(self) -> bool:
        return bool(self.bias_rate) or self.quantile_bias

    def flops(self, width: int, context: float) -> float:
        matrices = self.activation.matrices + 1
        routed = matrices * (self.latent or width) * self.per_token * self.hidden + 2 * width * self.latent
        shared = matrices * width * self.shared_hidden + (width if self.shared_gate else 0)
        router = self.router_hidden * (width + self.experts) if self.router_hidden else width * self.experts
        return 2.0 * (routed + shared + router)

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "MoE":
        from research.layers.moe.layer import MoE

        return MoE(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)

    def devices_reached(self, devices: int, groups: int) -> int | None:
        """On how many of ``devices`` a token's experts may lie at most; None for any."""
        top_groups = getattr(self.router, "top_groups", 0)
        return devices_within_reach(self.experts, devices, groups, min(top_groups, groups)) if top_groups else None

    def exchange_plan(self, width: int, tokens: int, devices: int, *, itemsize: int = 2) -> ExchangePlan:
        """What tokens travelling over ``devices`` of the expert axis cost, with ``tokens`` tokens on each: print it."""
        groups = self.groups_over(devices)
        return exchange_plan(
            tokens // math.gcd(self.chunks, tokens),
            self.latent or width,
            experts=self.experts,
            per_token=self.per_token,
            devices=devices,
            itemsize=itemsize,
            devices_reached=self.devices_reached(devices, groups),
            method=self.exchange,
            slack=self.slack,
        )

    def losses(self, statistics: balancing.RouterStatistics) -> dict[str, Array]:
        """The layer's auxiliary losses, coefficients included, from sums over the whole batch."""
        s = statistics
        first = isinstance(self.router, GShardRouter)
        groups = s.visits_G.shape[-1]
        top_groups = getattr(self.router, "top_groups", 0) or groups
        terms = {
            "balance_loss": lambda: balancing.switch_loss(
                s, normalisation=self.balance_normalisation, first_choice=first
            ),
            "z_loss": lambda: balancing.z_loss(s),
            "sequence_loss": lambda: balancing.sequence_loss(s),
            "device_loss": lambda: balancing.device_loss(s, groups),
            "communication_loss": lambda: balancing.communication_loss(s, min(top_groups, groups)),
            "importance_loss": lambda: balancing.importance_loss(s, of=self.importance_of),
            "load_loss": lambda: balancing.load_loss(s),
        }
        always = ("balance_loss", "z_loss")  # reported even where they are not asked for: what they would be times 0
        losses = {
            name: getattr(self, name) * term() for name, term in terms.items() if getattr(self, name) or name in always
        }
        if isinstance(self.router, ReinforceRouter) and isinstance(s.policy, dict):
            tokens, r = balancing.token_count(s), self.router
            losses["policy_loss"] = (
                r.policy_loss * s.policy["policy"]
                + r.baseline_loss * s.policy["baseline"]
                - r.entropy_bonus * s.policy["entropy"]
            ) / tokens
        return losses
