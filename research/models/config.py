"""What a language model is made of."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from research.layers.attention import AttentionConfig
from research.layers.deltanet import DeltaNetConfig
from research.layers.dsa import DSAConfig
from research.layers.gated_deltanet import GatedDeltaNetConfig
from research.layers.gla import GLAConfig
from research.layers.kda import KDAConfig
from research.layers.lightning import LightningConfig
from research.layers.linear_attention import LinearAttentionConfig
from research.layers.mamba import MambaConfig
from research.layers.mamba2 import Mamba2Config
from research.layers.mla import MLAConfig
from research.layers.mlp import MLPConfig
from research.layers.moe import MoEConfig
from research.layers.norms import RMSNormConfig
from research.layers.retnet import RetNetConfig

# Add a mechanism's configuration here, and every preset, command and checkpoint knows it.
TokenMixer = (
    LinearAttentionConfig | RetNetConfig | LightningConfig | MambaConfig | Mamba2Config | GLAConfig
    | DeltaNetConfig | GatedDeltaNetConfig | KDAConfig | AttentionConfig | MLAConfig | DSAConfig
)  # fmt: skip
Mixer = TokenMixer | MoEConfig | MLPConfig
DType = Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True)
class Residual:
    """One residual branch: ``skip_scale · skip + branch_scale · post_norm(mixer(pre_norm(x)))``.

    ``skip`` is the branch's input, or that input after ``pre_norm`` (MiniMax).
    """

    name: str
    mixer: Mixer
    pre_norm: RMSNormConfig | None = RMSNormConfig()
    post_norm: RMSNormConfig | None = None
    skip: Literal["input", "normed"] = "input"
    skip_scale: float = 1.0
    branch_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A language model: its layers are ``pattern`` (names of ``branches``), ``repeats`` times over.

    Any list of layers is legal; it is factorised into stages that are compiled once each.

    Attributes:
      vocab_size: tokens the model reads and predicts.
      width: of the residual stream.
      branches: each distinct residual branch, by name.
      pattern: branch names in the order they run.
      repeats: how often the pattern runs.
      final_norm: before the head.
      tie_embeddings: the head reads with the embedding's own matrix.
      dtype: computed in. Routers, states and losses stay in float32.
      param_dtype: parameters are stored in.
      remat: recompute each unit in the backward pass instead of storing its activations.
      unroll: repeats of a stage that are compiled side by side: spares the copies a scan makes of what it saves, for
        compilation that takes as many times longer.
    """

    vocab_size: int
    width: int
    branches: tuple[Residual, ...]
    pattern: tuple[str, ...]
    repeats: int = 1
    final_norm: RMSNormConfig = RMSNormConfig()
    tie_embeddings: bool = False
    dtype: DType = "float32"
    param_dtype: DType = "float32"
    remat: bool = False
    unroll: int = 1

    def __post_init__(self):
        names = [branch.name for branch in self.branches]
        if len(set(names)) != len(names):
            raise ValueError(f"branches must have distinct names, got {', '.join(names)}")
        unknown = [name for name in self.pattern if name not in names]
        if unknown:
            raise ValueError(f"pattern names {unknown[0]!r}, which is no branch: the branches are {', '.join(names)}")
        for field in ("vocab_size", "width", "repeats", "unroll"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not self.pattern:
            raise ValueError("pattern must name at least one branch, got none")

    @property
    def layers(self) -> tuple[Residual, ...]:
        """Every residual branch in the order it runs."""
        branches = {branch.name: branch for branch in self.branches}
        return tuple(branches[name] for name in self.pattern * self.repeats)

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)
