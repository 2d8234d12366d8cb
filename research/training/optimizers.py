"""Optimizers and learning-rate schedules, all optax's."""

import dataclasses
import fnmatch
import functools
from typing import Literal

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) on the matrices of layers with AdamW on the rest.

    Attributes:
      name: which of the two.
      learning_rate: at its peak; for Muon that of the matrices.
      adam_learning_rate: with Muon, the peak for everything that is no layer matrix (embedding, head, norms, rates).
      warmup_steps: linear from 0.
      decay_fraction: the last part of training, in which the rate falls linearly to 0; 1 decays from the warm-up on.
      weight_decay: decoupled, on the matrices of layers only.
      b1, b2, eps: Adam's.
      clip_norm: largest global norm of a gradient; none leaves it alone.
      trainable: patterns of parameter paths (``stages.1.branches.0.*`` is the first branch of the second stage's unit,
        ``*.mixer.w_*_E*`` the matrices of experts; see ``parameter_path``); everything else is frozen: neither updated nor
        decayed, without optimizer state. None given trains all.
      frozen: patterns of parameters to freeze, of those.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-3
    adam_learning_rate: float = 3e-3
    warmup_steps: int = 50
    decay_fraction: float = 0.5
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    trainable: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def __post_init__(self):
        if self.learning_rate <= 0 or self.adam_learning_rate <= 0:
            raise ValueError(f"learning rates must be positive, got {self.learning_rate} and {self.adam_learning_rate}")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction must be from 0 to 1, got {self.decay_fraction}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {self.warmup_steps}")


def schedule(config: OptimizerConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """Warm up, stay, decay to 0 over the last ``decay_fraction`` of ``steps`` (the WSD schedule of MiniCPM, 2404.06395)."""
    peak = config.learning_rate if peak is None else peak
    warmup = min(config.warmup_steps, steps)
    decay = min(int(steps * config.decay_fraction), steps - warmup)
    parts = [
        optax.linear_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, 0.0, decay) if decay else optax.constant_schedule(peak),
    ]
    return optax.join_schedules(parts, [warmup, steps - decay])


def is_layer_matrix(path, leaf) -> bool:
    """Whether a parameter is a layer's weight matrix: their names begin with ``w_``; convolution taps are none."""
    name = parameter_name(path)
    return name.startswith("w_") and not name.startswith("w_conv")


def parameter_name(path) -> str:
    """The attribute that holds a parameter, from its path in a state tree."""
    keys = [getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", None))) for entry in path]
    return next(str(key) for key in reversed(keys) if isinstance(key, str) and key != "value")


def parameter_path(path) -> str:
    """``stages.0.branches.1.mixer.w_in_EDF``, from a path in a state tree."""
    keys = [getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", None))) for entry in path]
    return ".".join(str(key) for key in keys if key != "value")


def trains(config: OptimizerConfig, path) -> bool:
    """Whether the optimizer's patterns leave the variable at ``path`` (in a state tree) to train."""
    name = parameter_path(path)
    chosen = not config.trainable or any(fnmatch.fnmatchcase(name, pattern) for pattern in config.trainable)
    return chosen and not any(fnmatch.fnmatchcase(name, pattern) for pattern in config.frozen)


def _labels(config: OptimizerConfig, params):
    """'trained' or 'frozen' for every parameter."""
    paths = [parameter_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in (*config.trainable, *config.frozen):
        if not fnmatch.filter(paths, pattern):
            raise ValueError(f"optimizer patterns must match a parameter, {pattern!r} matches none, as in {paths[0]}")

    def label(path, _):
        return "trained" if trains(config, path) else "frozen"

    labels = jax.tree_util.tree_map_with_path(label, params)
    if "trained" not in jax.tree.leaves(labels):
        raise ValueError(f"optimizer patterns must leave a parameter to train, frozen={config.frozen} leaves none")
    return labels


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer for ``steps`` steps; its updates are to be added to the parameters.

    Raises (when its state is made):
      ValueError: a pattern of ``trainable`` or ``frozen`` that matches no parameter, or patterns that leave none to train.
    """
    optimizer = _whole_optimizer(config, steps)
    if not config.trainable and not config.frozen:
        return optimizer
    labels = functools.partial(_labels, config)
    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def _whole_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm is not None else optax.identity()
    rate = schedule(config, steps)

    def matrices(params):
        return jax.tree_util.tree_map_with_path(is_layer_matrix, params)

    if config.name == "adamw":
        adamw = optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=matrices)
        return optax.chain(clip, adamw)

    def dimensions(params):
        # The last two axes are the matrix; repeats and experts before them are batches of matrices.
        def of(path, leaf):
            if not is_layer_matrix(path, leaf):
                return None
            return optax.contrib.MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)

        return jax.tree_util.tree_map_with_path(of, params)

    muon = optax.contrib.muon(
        rate,
        weight_decay=config.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_learning_rate=schedule(config, steps, config.adam_learning_rate),
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=0.2,
    )
    return optax.chain(clip, muon)
