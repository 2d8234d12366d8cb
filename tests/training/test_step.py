"""One training step: the same on any mesh and in any number of micro-batches, compiled once, donating, never syncing."""

import contextlib
import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.sharding.mesh import MeshConfig, P, batch_sharding, check_batch, make_mesh
from research.training.optimizers import OptimizerConfig, make_optimizer, schedule
from research.training.state import create_state
from research.training.step import make_eval_step, make_train_step, split_rows
from tests.models.small import CONFIG, packed_batch

B, T = 8, 10
MODEL = dataclasses.replace(CONFIG, pattern=("linear", "moe"), repeats=2)


@dataclasses.dataclass
class Ran:
    step: object
    first: object
    state: object
    metrics: list
    before: list


def run(mesh=(1, 1), micro_batches=1, steps=3) -> Ran:
    mesh = mesh and make_mesh(MeshConfig(*mesh), jax.devices()[: math.prod(mesh)])
    # A large eps: Adam's sign of a gradient that is zero but for rounding would differ from form to form.
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1, eps=1e-2), 10)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        graphdef, state = create_state(MODEL, optimizer, seed=0)
        before = jax.tree.map(np.array, state.params)  # a view would keep the buffer from being donated
        on_device = jax.device_put(
            packed_batch(B, T, CONFIG.vocab_size), batch_sharding(mesh) if mesh else jax.devices()[0]
        )
        step = make_train_step(graphdef, optimizer, micro_batches=micro_batches)
        first, metrics = state, []
        for index in range(steps):
            with jax.transfer_guard("disallow") if index else contextlib.nullcontext():
                state, values = step(state, on_device)
            metrics.append(values)
        evaluated = make_eval_step(graphdef)(state.params, state.variables, on_device)
    return Ran(step, first, state, [jax.device_get(m) for m in metrics] + [jax.device_get(evaluated)], before)


@pytest.fixture(scope="module")
def reference():
    return run()


def test_one_compilation_and_donated_buffers(reference):
    assert reference.step._cache_size() == 1
    kept = [path for path, leaf in jax.tree.leaves_with_path(reference.first) if not leaf.is_deleted()]
    assert not kept
    assert int(reference.state.step) == 3


def test_a_step_learns_and_moves_what_it_should(reference):
    assert reference.metrics[2]["loss"] < reference.metrics[0]["loss"]
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), reference.before, jax.tree.map(np.asarray, reference.state.params)
    )
    assert min(jax.tree.leaves(moved)) > 0
    # Three sign steps of 1e-3: the bias is an odd multiple or zero where the load was even.
    for bias in jax.tree.leaves(reference.state.variables):
        thousandths = np.asarray(bias) * 1e3
        np.testing.assert_allclose(thousandths, np.round(thousandths), atol=1e-4)
        assert 0 < np.abs(thousandths).max() <= 3.001


def test_metrics_say_what_the_router_did(reference):
    metrics = reference.metrics[0]
    assert metrics["tokens"] == packed_batch(B, T, CONFIG.vocab_size)["loss_mask_BT"].sum()
    chex.assert_shape(metrics["load_LE"], (2, 4))
    np.testing.assert_allclose(metrics["load_LE"].sum(-1), 1, rtol=1e-6)
    assert metrics["balance_loss"] >= 0.02 * 0.99  # two layers, 1 each at perfect balance, coefficient 0.01
    nats, count = reference.metrics[-1]
    assert count == metrics["tokens"]
    assert 0 < nats / count < metrics["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "micro_batches"),
    [(None, 4), ((2, 2), 2), ((2, 1, 4), 1)],
    ids=["no mesh, micro-batches", "mesh, micro-batches", "experts over four devices"],
)
def test_micro_batches_and_meshes_change_nothing(reference, mesh, micro_batches):
    other = run(mesh, micro_batches)
    for ours, theirs in zip(other.metrics, reference.metrics, strict=True):
        chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_equal(
        *(list(map(np.asarray, jax.tree.leaves(ran.state.variables))) for ran in (other, reference))
    )
    if mesh:
        w_in = other.state.params["stages"][0]["branches"][1]["mixer"]["w_in_EDF"]
        assert jax.typeof(w_in[...]).sharding.spec == P(None, "expert", ("fsdp", "tensor"), None)
        assert w_in[...].addressable_shards[0].data.shape[1] == 4 // [*mesh, 1][2]


def test_split_rows_keeps_every_row():
    x = jnp.arange(12).reshape(6, 2)
    parts = split_rows(x, 3)
    chex.assert_shape(parts, (3, 2, 2))
    np.testing.assert_array_equal(np.sort(parts.reshape(-1)), np.arange(12))


def test_meshes_refuse_what_does_not_divide():
    with pytest.raises(ValueError, match=r"must multiply to the number of devices, 8; got data=3, fsdp=2"):
        make_mesh(MeshConfig(3, 2))
    mesh = make_mesh(MeshConfig(4, 2))
    check_batch(16, mesh)
    with pytest.raises(ValueError, match=r"divisible by the 8 shards of the mesh, got 12"):
        check_batch(12, mesh)


def test_schedule_warms_up_stays_and_decays():
    rate = schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=10, decay_fraction=0.5), 100)
    values = [float(rate(step)) for step in (0, 5, 10, 49, 75, 100)]
    np.testing.assert_allclose(values, [0, 1, 2, 2, 1, 0], atol=1e-6)
