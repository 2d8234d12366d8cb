"""Freezing by parameter path: what is frozen doesn't move, and has no optimizer state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from research.training.optimizers import OptimizerConfig, make_optimizer, parameter_path
from tests.models.small import small_model


def stepped(**fields):
    """Paths of the parameters that one step moved, of all; and the bytes of optimizer state."""
    params = nnx.state(small_model(), nnx.Param)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0, **fields), 10)
    state = optimizer.init(params)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(optimizer.update)(gradients, state, params)
    moved = optax.apply_updates(params, updates)
    pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(moved), strict=True)
    paths = {parameter_path(path): bool(np.any(before != after)) for (path, before), after in pairs}
    return {path for path, has in paths.items() if has}, set(paths), sum(x.size for x in jax.tree.leaves(state))


def test_everything_trains_where_nothing_is_said():
    moved, every, _ = stepped()
    assert moved == every


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_only_what_is_trainable_moves(name):
    _, every, everything = stepped(name=name)
    moved, _, size = stepped(name=name, trainable=("stages.0.branches.2.*",))
    assert moved == {path for path in every if path.startswith("stages.0.branches.2.")} != set()
    assert size < everything / 3
    experts = ("*.mixer.w_in_EDF", "*.mixer.w_out_EFD", "*.w_router_DE")
    moved, _, _ = stepped(name=name, frozen=experts)
    assert moved == {path for path in every if not path.endswith(("w_in_EDF", "w_out_EFD", "w_router_DE"))} != every


def test_patterns_must_match():
    with pytest.raises(ValueError, match=r"'\*.attention' matches none, as in "):
        stepped(trainable=("*.attention",))
    with pytest.raises(ValueError, match="must leave a parameter to train"):
        stepped(frozen=("*",))
