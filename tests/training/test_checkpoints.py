"""Checkpoints: bitwise, atomic, verified, refused where they do not fit, on any mesh."""

import asyncio
import dataclasses
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import P

from research.config import ConfigError
from research.training import checkpoints
from research.training.checkpoints import Checkpoints


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    params: Any
    opt_state: Any
    key: Any


class Place:
    """A data iterator, as Orbax sees one: it saves where it is."""

    def __init__(self, at=0):
        self.at = at

    async def save(self, directory):
        text = str(self.at)

        async def write():
            (await directory.await_creation() / "process_0-of-1.json").write_text(text)

        return write()

    async def load(self, directory):
        async def read():
            self.at = int(await asyncio.to_thread((directory / "process_0-of-1.json").read_text))

        return read()


def _state(step=0, width=8):
    params = nnx.State(
        {"w": nnx.Param(jnp.arange(4.0 * width).reshape(4, width)), "b": nnx.Param(jnp.ones(4, "bfloat16"))}
    )
    return State(jnp.int32(step), params, (jnp.zeros(()), {"mu": jnp.full(width, step / 3)}), jax.random.key(step))


def _equal(a, b):
    a, b = (
        jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if x.dtype == jax.random.key(0).dtype else x), t)
        for t in (a, b)
    )
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A work directory with checkpoints 1, 2 and 3, made once; tests copy it."""
    workdir = tmp_path_factory.mktemp("run")
    kept = Checkpoints(workdir, keep=3, say=lambda line: None)
    for step in (1, 2, 3):
        kept.save(step, _state(step), Place(10 * step), about={"config": {"step": step}}, tokenizer='{"é": 1}')
    kept.wait()
    return workdir


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    said = []
    return tmp_path / "run", said


def _restore(workdir, said):
    kept, place = Checkpoints(workdir, say=said.append), Place()
    path = kept.newest()
    return int(path.name), kept.restore(path, checkpoints.abstract(_state()), place), place.at


def test_what_is_saved_comes_back_bitwise(run):
    workdir, said = run
    step, state, place = _restore(workdir, said)
    assert (step, place, said) == (3, 30, [])
    assert _equal(state, _state(3))
    path = workdir / "checkpoints" / "3"
    assert checkpoints.read_about(path) == {"config": {"step": 3}}
    assert checkpoints.read_tokenizer(path) == '{"é": 1}'


def _data_file(path):
    return max(
        (file for file in path.rglob("*") if file.is_file()), key=lambda file: ("/d/" in str(file), file.stat().st_size)
    )


def _flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda path: _flip(_data_file(path)),
    "a truncated array": lambda path: _data_file(path).write_bytes(_data_file(path).read_bytes()[:-7]),
    "a missing array": lambda path: _data_file(path).unlink(),
    "an emptied position": lambda path: (path / "data" / "process_0-of-1.json").write_text(""),
    "a truncated record": lambda path: (path / "_CHECKPOINT_METADATA").write_text("{"),
    "torn checksums": lambda path: (path / "checksums.json").write_text('{"files": '),
    "an empty folder": lambda path: (shutil.rmtree(path), path.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(run, kind):
    workdir, said = run
    DAMAGE[kind](workdir / "checkpoints" / "3")
    step, state, place = _restore(workdir, said)
    assert (step, place) == (2, 20)
    assert _equal(state, _state(2))
    assert len(said) == 1 and "checkpoint 3 is damaged" in said[0] and "/checkpoints/3" in said[0]
    assert (workdir / "checkpoints" / "3.damaged").is_dir(), "set aside, not deleted"
    kept = Checkpoints(workdir, keep=2, say=said.append)
    kept.save(3, _state(3), Place(30), about={})
    kept.wait()
    assert _restore(workdir, said)[0] == 3
    assert sorted(entry.name for entry in (workdir / "checkpoints").iterdir()) == ["2", "3", "3.damaged"]


def test_without_checksums_orbaxs_own_commit_counts(run):
    workdir, said = run
    (workdir / "checkpoints" / "3" / "checksums.json").unlink()
    assert _restore(workdir, said)[0] == 3 and not said


def test_nothing_is_started_over_when_every_checkpoint_is_damaged(run):
    workdir, said = run
    for step in "123":
        _flip(_data_file(workdir / "checkpoints" / step))
    with pytest.raises(ConfigError, match="none is whole"):
        Checkpoints(workdir, say=said.append).newest()
    assert {entry.name for entry in (workdir / "checkpoints").iterdir()} == {"1", "2", "3"}


def test_leftovers_of_a_killed_process_are_no_checkpoints(run):
    workdir, said = run
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
    shutil.copytree(folder / "1", folder / "0.deleting")
    assert _restore(workdir, said)[0] == 3 and not said
    assert {entry.name for entry in folder.iterdir()} == {"1", "2", "3"}


def test_no_checkpoint_yet(tmp_path):
    assert Checkpoints(tmp_path).newest() is None


def test_another_model_is_refused_by_name(run):
    workdir, said = run
    kept = Checkpoints(workdir, say=said.append)
    with pytest.raises(ConfigError, match=r"another model: params.w.value is \[4, 8\] there, \[4, 16\] here"):
        kept.restore(kept.newest(), checkpoints.abstract(_state(width=16)), Place())
    other = dataclasses.replace(_state(), opt_state=({"nu": jnp.zeros(3)},))
    with pytest.raises(ConfigError, match=r"it has no opt_state.0.nu; .* has no place here"):
        kept.restore(kept.newest(), checkpoints.abstract(other), Place())


def test_a_part_alone_on_another_mesh(run):
    workdir, _ = run
    path = workdir / "checkpoints" / "3"
    mesh = jax.make_mesh((8,), ("data",))
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, P(None, "data"))
        part = {"params": {"w": {"value": jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=sharding)}}}
        w = checkpoints.load_part(path, part)["params"]["w"]["value"]
    assert w.sharding.is_equivalent_to(sharding, 2)
    assert np.array_equal(w, np.arange(32.0).reshape(4, 8))
    with pytest.raises(ConfigError, match=r"it has no params\.z"):
        checkpoints.load_part(path, {"params": {"z": jax.ShapeDtypeStruct((1,), jnp.float32)}})


def test_saving_reads_a_state_before_it_is_donated(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    kept = Checkpoints(tmp_path, keep=9)
    x = jnp.zeros(1 << 22)
    for number in range(4):
        kept.save(number, {"x": x}, about={})
        x = step(x)
    kept.wait()
    for number in range(4):
        saved = checkpoints.load_part(
            tmp_path / "checkpoints" / str(number), {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
        )
        assert np.array_equal(saved["x"], np.full(x.shape, number))


class Broken(Place):
    async def save(self, directory):
        async def write():
            raise OSError("the disk is full")

        return write()


def test_a_save_that_failed_is_told_and_leaves_no_checkpoint(run):
    workdir, said = run
    kept = Checkpoints(workdir, say=said.append)
    with pytest.raises(FileExistsError, match="never overwritten"):
        kept.save(3, _state(3), about={})
    kept.save(4, _state(4), Broken(), about={})
    with pytest.raises(OSError, match="the disk is full"):
        kept.wait()
    assert _restore(workdir, said)[0] == 3
