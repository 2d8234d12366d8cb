"""The feed-forward layer."""

import dataclasses

from flax import nnx

from research.layers.context import Context, without_padding
from research.layers.moe.config import Activation
from research.layers.parameters import normal, project, read
from research.sharding.mesh import P


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """SwiGLU: ``(silu(x W_gate) · x W_up) W_down`` (Shazeer 2020, arXiv 2002.05202, eq. 6), or another ``activation``: those
    without a gate have one matrix in (Nemotron: relu2)."""

    hidden: int = 512
    activation: Activation = Activation()

    def __post_init__(self):
        if self.hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {self.hidden}")

    def flops(self, width: int, context: float) -> float:
        return 2.0 * (self.activation.matrices + 1) * width * self.hidden

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype) -> "MLP":
        return MLP(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)


class MLP(nnx.Module):
    def __init__(self, config: MLPConfig, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        D, F = width, config.hidden
        self.config = config
        # Gate and up side by side: one product reads x once.
        self.w_in_DF = normal(rngs, (D, config.activation.matrices * F), param_dtype, P("fsdp", None), fan_in=D)
        self.w_out_FD = normal(rngs, (F, D), param_dtype, P(None, "fsdp"), fan_in=F, gain=depth**-0.5)

    def __call__(self, x_BTD, state=None, context: Context | None = None):
        x_BTD = without_padding(x_BTD, context)
        h_BTF = self.config.activation.function()(project(x_BTD, read(self.w_in_DF, x_BTD.dtype)))
        return project(h_BTF, read(self.w_out_FD, x_BTD.dtype)), state, None

    def init_state(self, batch: int, max_length: int, dtype):
        return None
