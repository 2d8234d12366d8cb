"""Claim: what a linear-time layer can remember follows from how its state is written.

Each task needs one ability; each mechanism learns it or cannot. Every model is one layer of the mechanism behind the same
first layer, softmax attention over four tokens (it joins a key with its value), trained on fresh data.

    python -m experiments.lecture.memory [--steps N] [--json] [TASK ...]     about three minutes on two cores

Expected, as accuracies on unseen rows:

- recall: a key is written twice and asked for. Additive states blend both values; the delta rule replaces the first.
- parity: the sign of a running product. Transitions with eigenvalues in [0, 1] cannot keep it; β up to 2 can.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import cli
from research.data import synthetic
from research.layers.attention import AttentionConfig
from research.layers.deltanet import DeltaNetConfig
from research.layers.gated_deltanet import GatedDeltaNetConfig
from research.layers.linear_attention import LinearAttentionConfig
from research.layers.mamba2 import Mamba2Config
from research.models.config import ModelConfig, Residual
from research.models.language_model import LanguageModel
from research.ops.losses import cross_entropy

WIDTH, ROWS = 64, 64
MECHANISMS: dict[str, Any] = {
    "linear attention": LinearAttentionConfig(2, 2, 32, 32, feature_map="identity", normalise=False),
    "mamba2": Mamba2Config(heads=4, head_width=32, state_width=32),
    "deltanet": DeltaNetConfig(2, 32, 32),
    "gated deltanet": GatedDeltaNetConfig(2, 2, 32, 32),
    "gated deltanet, β to 2": GatedDeltaNetConfig(2, 2, 32, 32, negative_eigenvalues=True),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A batch from a seed, its vocabulary, and the mechanisms worth telling apart by it."""

    batch: Callable[..., synthetic.Batch]
    vocabulary: int
    mechanisms: tuple[str, ...]


TASKS = {
    "recall": Task(
        functools.partial(synthetic.associative_recall, length=32, pairs=4, overwrites=4, keys=8, values=8),
        17,
        ("linear attention", "mamba2", "deltanet", "gated deltanet"),
    ),
    "parity": Task(
        functools.partial(synthetic.state_tracking, length=24),
        2,
        ("mamba2", "gated deltanet", "gated deltanet, β to 2"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m experiments.lecture.memory", description=__doc__)
    parser.add_argument("tasks", metavar="TASK", nargs="*", help=f"some of {', '.join(TASKS)}; all by default")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each run (400)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options: argparse.Namespace = parser.parse_args(argv)
    unknown = [name for name in options.tasks if name not in TASKS]
    if unknown:
        parser.error(f"TASK is {unknown[0]!r}: it must be one of {', '.join(TASKS)}")
    results: dict[str, dict[str, float]] = {}
    for task in options.tasks or TASKS:
        for mechanism in TASKS[task].mechanisms:
            accuracy = results.setdefault(task, {})[mechanism] = run(task, mechanism, options.steps)
            if not options.json:
                print(f"{task:10s}{mechanism:26s}{accuracy:6.1%}", flush=True)
    if options.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    return 0


def run(task: str, mechanism: str, steps: int, seed: int = 0) -> float:
    """Trains one model on one task; its accuracy on 1,024 unseen rows, over the targets that count."""
    recipe = TASKS[task]
    config = ModelConfig(
        vocab_size=recipe.vocabulary,
        width=WIDTH,
        branches=(
            Residual("joins", AttentionConfig(heads=2, key_heads=2, head_width=32, window=4)),
            Residual("remembers", MECHANISMS[mechanism]),
        ),
        pattern=("joins", "remembers"),
    )
    model = LanguageModel(config, rngs=nnx.Rngs(params=seed))
    graphdef, params, variables = nnx.split(model, nnx.Param, ...)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, steps)))
    opt_state = optimizer.init(params)

    def logits_and_targets(params, batch):
        model = nnx.merge(graphdef, params, variables)
        return model(batch["inputs_BT"]).logits_BTV, batch["targets_BT"], batch["loss_mask_BT"]

    def loss(params, batch):
        nats, count = cross_entropy(*logits_and_targets(params, batch))
        return nats / count

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        updates, opt_state = optimizer.update(jax.grad(loss)(params, batch), opt_state)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def right(params, batch):
        logits_BTV, targets_BT, mask_BT = logits_and_targets(params, batch)
        return jnp.sum((jnp.argmax(logits_BTV, axis=-1) == targets_BT) & mask_BT) / jnp.sum(mask_BT)

    for number in range(steps):
        params, opt_state = step(params, opt_state, recipe.batch((seed, 0, number), batch=ROWS))
    return float(np.mean([right(params, recipe.batch((seed, 1, number), batch=ROWS)) for number in range(16)]))


if __name__ == "__main__":
    sys.exit(cli.call(main))
