"""What a language model is made of."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from research.axes import Array
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
from research.layers.moe import MoEConfig, ReinforceRouter
from research.layers.norms import RMSNormConfig
from research.layers.retnet import RetNetConfig
from research.layers.routed_attention import RoutedAttentionConfig
from research.ops import kept
from research.ops.dynamic_chunking import ChunkStatistics, ratio_loss

# Add a mechanism's configuration here, and every preset, command and checkpoint knows it.
TokenMixer = (
    LinearAttentionConfig | RetNetConfig | LightningConfig | MambaConfig | Mamba2Config | GLAConfig
    | DeltaNetConfig | GatedDeltaNetConfig | KDAConfig | AttentionConfig | MLAConfig | DSAConfig
    | RoutedAttentionConfig
)  # fmt: skip
DType = Literal["float32", "bfloat16", "float64"]


@dataclasses.dataclass(frozen=True)
class HNetConfig:
    """A model over chunks that it learns to cut (H-Net, arXiv 2507.07955): layers as in ``ModelConfig``, between the layers
    around it. See ``research.models.hnet``.

    Attributes:
      width: of its layers, at least that around it; None is the same.
      ratio: tokens a chunk that the ratio loss asks for.
      loss: coefficient of the ratio loss.
      capacity: slots for chunks as a share of the tokens, without a cache; tokens past them stay in the last chunk.
      residual_bias: on the projection of what the chunks' outcome is added to, as the authors' code has it.
    """

    branches: tuple["Residual", ...]
    pattern: tuple[str, ...]
    repeats: int = 1
    width: int | None = None
    ratio: float = 6.0
    loss: float = 0.03
    capacity: float = 1.0
    residual_bias: bool = False
    final_norm: RMSNormConfig = RMSNormConfig()

    def __post_init__(self):
        _check_pattern(self)
        if self.ratio <= 1:
            raise ValueError(f"ratio must be more than 1, got {self.ratio}")
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity must be more than 0 and at most 1, got {self.capacity}")
        for branch in self.branches:
            if isinstance(branch.mixer, MoEConfig) and isinstance(branch.mixer.router, ReinforceRouter):
                raise ValueError(
                    f"branches over chunks must not route by REINFORCE, which rewards tokens, got {branch.name}"
                )

    @property
    def layers(self) -> tuple["Residual", ...]:
        return _layers(self)

    def flops(self, width: int, context: float) -> float:
        """With a chunk every ``ratio`` tokens."""
        inner = sum(branch.mixer.flops(self.width or width, context / self.ratio) for branch in self.layers)
        return 2 * 3 * width * width + inner / self.ratio

    def losses(self, statistics: ChunkStatistics) -> dict[str, Array]:
        """The ratio loss, coefficient included, from sums over the whole batch."""
        return {"ratio_loss": self.loss * ratio_loss(statistics, self.ratio)}

    def build(self, width: int, *, depth: int, rngs: nnx.Rngs, param_dtype):
        from research.models.hnet import HNet

        return HNet(self, width, depth=depth, rngs=rngs, param_dtype=param_dtype)


Mixer = TokenMixer | MoEConfig | MLPConfig | HNetConfig


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
class MTPConfig:
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, §2.2): head k predicts the token k places after the next.

    Attributes:
      pattern: names of the model's branches that each head runs.
      depth: how many heads, one after the other.
      shared: one set of parameters for all of them (GLM-5).
      loss: coefficient of the mean of their losses.
    """

    pattern: tuple[str, ...]
    depth: int = 1
    shared: bool = False
    loss: float = 0.3

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")


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
      embedding_scale, logit_scale: factors on what is embedded, and on the logits (Grok-1, MiniCPM).
      dtype: computed in. Routers, states and losses stay in float32.
      param_dtype: parameters are stored in.
      remat: recompute each unit in the backward pass instead of storing its activations; over chunks too.
      remat_keeps: ops whose results are stored all the same, so that they run once: of attention, causal_conv, experts,
        linear_attention.
      unroll: repeats of a stage that are compiled side by side: spares the copies a scan makes of what it saves, for
        compilation that takes as many times longer.
      mtp: heads that predict tokens further ahead; None for none.
    """

    vocab_size: int
    width: int
    branches: tuple[Residual, ...]
    pattern: tuple[str, ...]
    repeats: int = 1
    final_norm: RMSNormConfig = RMSNormConfig()
    tie_embeddings: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    dtype: DType = "float32"
    param_dtype: DType = "float32"
    remat: bool = False
    remat_keeps: tuple[str, ...] = ()
    unroll: int = 1
    mtp: MTPConfig | None = None

    def __post_init__(self):
        _check_pattern(self, () if self.mtp is None else self.mtp.pattern)
        for field in ("vocab_size", "width", "unroll"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if unknown := [name for name in self.remat_keeps if name not in kept.NAMES]:
            raise ValueError(f"remat_keeps names {unknown[0]!r}; what may be kept: {', '.join(kept.NAMES)}")

    @property
    def layers(self) -> tuple[Residual, ...]:
        """Every residual branch in the order it runs."""
        return _layers(self)

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def _check_pattern(config: ModelConfig | HNetConfig, ahead: tuple[str, ...] = ()) -> None:
    names = [branch.name for branch in config.branches]
    if len(set(names)) != len(names):
        raise ValueError(f"branches must have distinct names, got {', '.join(names)}")
    for field, pattern in (("pattern", config.pattern), ("mtp.pattern", ahead)):
        unknown = [name for name in pattern if name not in names]
        if unknown:
            raise ValueError(f"{field} names {unknown[0]!r}, which is no branch: the branches are {', '.join(names)}")
    if config.repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {config.repeats}")
    if not config.pattern:
        raise ValueError("pattern must name at least one branch, got none")


def _layers(config: ModelConfig | HNetConfig) -> tuple[Residual, ...]:
    branches = {branch.name: branch for branch in config.branches}
    return tuple(branches[name] for name in config.pattern * config.repeats)
