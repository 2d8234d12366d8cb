"""What an experiment is made of: the model, its data, its optimizer, how long it trains, and on which mesh."""

import dataclasses

from research.data.pipeline import DataConfig
from research.models.config import ModelConfig
from research.sharding.mesh import MeshConfig
from research.training.optimizers import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what to write down on the way.

    Attributes:
      steps: optimizer steps of the whole run, those before a resume included.
      micro_batches: parts a batch is computed in, one after the other, to save memory; the step is the same.
      seed: of the initial parameters and of anything drawn at random while training.
      checkpoint_every: steps between checkpoints; the last step, and a signal, always save.
      keep_checkpoints: how many of the newest checkpoints to keep.
      evaluate_every: steps between held-out evaluations; 0 evaluates at the end only.
      evaluate_batches: batches of such an evaluation on the way; 0 is the whole held-out set, as at the end.
      start_from: work directory, or one checkpoint, of a trained model whose parameters a new run begins with; what that lacks
        (the indexers of sparse attention) begins as ever. Says nothing to a run that resumes.
      log_every: steps between TensorBoard events, and between expert loads in metrics.jsonl (which has every step).
      progress_seconds: seconds between lines on the terminal.
    """

    steps: int = 1000
    micro_batches: int = 1
    seed: int = 0
    checkpoint_every: int = 200
    keep_checkpoints: int = 3
    evaluate_every: int = 0
    evaluate_batches: int = 8
    start_from: str | None = None
    log_every: int = 10
    progress_seconds: float = 5.0

    def __post_init__(self):
        for field in ("steps", "micro_batches", "checkpoint_every", "keep_checkpoints", "log_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        for field in ("seed", "evaluate_every", "evaluate_batches", "progress_seconds"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative, got {getattr(self, field)}")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """One training run, whole: a preset in ``configs/`` is one of these, and a checkpoint carries it."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
