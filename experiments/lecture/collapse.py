"""Claim: sparsely routed experts collapse without balancing, and balancing prevents it, by a loss, a bias or by construction.

The task: eight clusters of inputs, each with a linear map of its own, y = A_c z for x = mean + centre_c + z. An expert is
just wide enough for one map. The common mean is what makes it collapse (hidden states of real networks have one): at first
it decides every token's route alike, the experts so chosen learn, their weights grow, and the others never see a token.

    python -m experiments.lecture.collapse [--steps N] [--json]     about five minutes on two cores

Expected (benchmarks/results/cpu/collapse.json, 1,000 steps): without balancing every router leaves four to seven of
eight experts unused, at 1.2 to 4.3 times the error of what keeps them all in use. The Switch and sequence losses,
DeepSeek's expert, device and communication losses together, V-MoE's importance loss (with its load loss or without),
both biases and what balances by construction keep every expert in use. The device and communication losses alone level
four devices, not the experts on one: they leave two unused. Shazeer's importance loss, of the weights of what was
chosen, and the load loss level what is used, but have no gradient left for an expert that nobody has visited for long:
one to three stay dead, and the two together don't recover them all.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import cli
from experiments.benchmark import circumstances
from research.layers.context import Context
from research.layers.moe import (
    BASERouter,
    ExpertChoiceRouter,
    MoEConfig,
    NoisyTopKRouter,
    SinkhornRouter,
    TopKRouter,
)
from research.ops import balancing

EXPERTS, DEVICES, WIDTH, ROWS, LENGTH = 8, 4, 16, 8, 32
_PLAIN = functools.partial(
    MoEConfig, experts=EXPERTS, per_token=2, hidden=WIDTH, shared_hidden=0, balance_loss=0.0, z_loss=0.0
)
# By router, each with a control that nothing balances.
_SUM, _DEVICES = TopKRouter(renormalise=False), TopKRouter(top_groups=2)
_LEARNED, _FIXED = NoisyTopKRouter(), NoisyTopKRouter(sigma=1 / EXPERTS, score="softmax")
RUNS = {
    "softmax": {
        "none": _PLAIN(),
        "switch loss": _PLAIN(balance_loss=0.1),
        "sequence loss": _PLAIN(sequence_loss=0.1),
        "device loss": _PLAIN(device_loss=0.1, groups=DEVICES),
    },
    "softmax, two devices of four": {
        "none": _PLAIN(groups=DEVICES, router=_DEVICES),
        "communication loss": _PLAIN(communication_loss=0.1, groups=DEVICES, router=_DEVICES),
        "expert, device and communication losses": _PLAIN(
            balance_loss=0.1, device_loss=0.1, communication_loss=0.1, groups=DEVICES, router=_DEVICES
        ),
    },
    "softmax, not renormalised": {
        "none": _PLAIN(router=_SUM),
        "importance loss of weights": _PLAIN(importance_loss=1.0, router=_SUM),
        "importance loss of probabilities": _PLAIN(importance_loss=0.3, importance_of="probabilities", router=_SUM),
        "expert choice": _PLAIN(router=ExpertChoiceRouter(scope="batch")),
    },
    "learned noise (Shazeer)": {
        "none": _PLAIN(router=_LEARNED),
        "load loss": _PLAIN(load_loss=2.0, router=_LEARNED),
        "importance and load losses": _PLAIN(importance_loss=2.0, load_loss=2.0, router=_LEARNED),
        "importance loss of probabilities, load loss": _PLAIN(
            importance_loss=1.0, importance_of="probabilities", load_loss=1.0, router=_LEARNED
        ),
    },
    "fixed noise (V-MoE)": {
        "none": _PLAIN(router=_FIXED),
        "load loss": _PLAIN(load_loss=0.1, router=_FIXED),
        "importance loss of probabilities, load loss": _PLAIN(
            importance_loss=1.0, importance_of="probabilities", load_loss=1.0, router=_FIXED
        ),
    },
    "sigmoid": {
        "none": _PLAIN(router=TopKRouter("sigmoid")),
        "loss-free bias": _PLAIN(router=TopKRouter("sigmoid"), bias_rate=0.02),
        "quantile bias": _PLAIN(router=TopKRouter("sigmoid"), quantile_bias=True),
    },
    "sigmoid, not renormalised": {
        "none": _PLAIN(router=TopKRouter("sigmoid", renormalise=False)),
        "sinkhorn": _PLAIN(router=SinkhornRouter("sigmoid", scope="batch")),
    },
    "sigmoid, one expert": {
        "none": _PLAIN(per_token=1, router=TopKRouter("sigmoid", renormalise=False)),
        "base": _PLAIN(per_token=1, router=BASERouter(epsilon=0.2, scope="batch")),
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m experiments.lecture.collapse", description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each run (1000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options: argparse.Namespace = parser.parse_args(argv)
    results = {
        router: {name: run(config, options.steps) for name, config in balancers.items()}
        for router, balancers in RUNS.items()
    }
    if options.json:
        about = circumstances(f"python -m experiments.lecture.collapse --json --steps {options.steps}")
        print(json.dumps({**about, "steps": options.steps, "results": results}, indent=2))
        return 0
    rows = [("router", "balanced by", "error", "MaxVio", "of devices", "dead")]
    rows += [
        (
            router if name == "none" else "",
            name,
            f"{r['error']:.3f}",
            f"{r['max_violation']:.2f}",
            f"{r['device_violation']:.2f}",
            f"{r['dead_experts']}/{EXPERTS}",
        )
        for router, balancers in results.items()
        for name, r in balancers.items()
    ]
    print(
        "error: squared, as a share of guessing zero; MaxVio: the busiest expert (or device of two) over its share, minus 1\n"
    )
    print(cli.table(rows))
    return 0


def run(config: MoEConfig, steps: int, seed: int = 0) -> dict[str, float]:
    """Trains one layer on the task; its error and its load over the last tenth of the steps."""
    layer_key, task_key, step_key = jax.random.split(jax.random.key(seed), 3)
    layer = config.build(WIDTH, depth=1, rngs=nnx.Rngs(params=layer_key), param_dtype=jnp.float32)
    graphdef, params, variables = nnx.split(layer, nnx.Param, ...)
    optimizer = optax.adam(optax.linear_schedule(1e-2, 1e-3, steps))
    task = _task(task_key)

    def loss(params, variables, key):
        data_key, route_key = jax.random.split(key)
        x_BTD, y_BTD = _draw(task, data_key)
        context = Context(jnp.zeros((ROWS, LENGTH), jnp.int32), None, None, None, route_key, deterministic=False)
        out_BTD, _, statistics = nnx.merge(graphdef, params, variables)(x_BTD, None, context)
        error = jnp.mean(jnp.square(out_BTD - y_BTD)) / jnp.mean(jnp.square(y_BTD))
        return error + sum(config.losses(statistics).values()), (error, statistics)

    def step(carry, key):
        params, variables, opt_state = carry
        grads, (error, statistics) = jax.grad(loss, has_aux=True)(params, variables, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        layer = nnx.merge(graphdef, params, variables)
        if config.bias_rate:
            layer.bias_E.set_value(balancing.update_bias(layer.bias_E[...], statistics.counts_E, config.bias_rate))
        if config.quantile_bias:
            layer.bias_E.set_value(balancing.quantile_bias_from_margins(statistics.margins_EQ, config.per_token))
        return (params, nnx.split(layer, nnx.Param, ...)[2], opt_state), (error, statistics.counts_E)

    train = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[1])
    keys = jax.random.split(step_key, steps)
    error_L, counts_LE = jax.device_get(train((params, variables, optimizer.init(params)), keys))
    last = max(1, steps // 10)
    load_E = np.sum(counts_LE[-last:], axis=0)
    load_G = load_E.reshape(DEVICES, -1).sum(1)
    return {
        "error": float(np.mean(error_L[-last:])),
        "max_violation": float(load_E.max() / load_E.mean() - 1),
        "device_violation": float(load_G.max() / load_G.mean() - 1),
        "dead_experts": int(np.sum(load_E < 0.01 * load_E.mean())),
    }


def _task(key):
    mean_key, centre_key, map_key = jax.random.split(key, 3)
    mean_D = 4.0 * jax.random.normal(mean_key, (WIDTH,))
    centre_CD = jax.random.normal(centre_key, (EXPERTS, WIDTH))
    return mean_D, centre_CD, jax.random.normal(map_key, (EXPERTS, WIDTH, WIDTH)) * WIDTH**-0.5


def _draw(task, key):
    mean_D, centre_CD, map_CDD = task
    cluster_key, noise_key = jax.random.split(key)
    cluster_BT = jax.random.randint(cluster_key, (ROWS, LENGTH), 0, EXPERTS)
    z_BTD = 0.5 * jax.random.normal(noise_key, (ROWS, LENGTH, WIDTH))
    # (z A_c) for every cluster, then each token's own: eight small products instead of a matrix a token.
    every_BTCD = jnp.einsum("btd,cde->btce", z_BTD, map_CDD)
    y_BTD = jnp.take_along_axis(every_BTCD, cluster_BT[..., None, None], axis=2)[:, :, 0]
    return mean_D + centre_CD[cluster_BT] + z_BTD, y_BTD


if __name__ == "__main__":
    sys.exit(cli.call(main))
