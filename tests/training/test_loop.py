"""The loop with a model that compiles at once (a table of bigrams): what it writes, saves, refuses and says."""

import dataclasses
import functools
import json
import math
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

from configs.tiny import CONFIG
from research.config import ConfigError, from_json
from research.sharding.mesh import AXES
from research.training import loop, plots, runs
from research.training.checkpoints import checkpoint_paths, load_part
from research.training.config import ExperimentConfig
from research.training.interrupts import Interrupts
from research.training.metrics import read_lines
from research.training.state import TrainState


def _toy_state(model, optimizer, seed):
    params = {"table_VV": jax.random.normal(jax.random.key(seed), (model.vocab_size, model.vocab_size))}
    params = jax.tree.map(lambda x: jax.reshard(x, P(None, None)), params)
    key = jax.random.key(seed)
    return None, TrainState(jnp.zeros((), jnp.int32), params, {"bias_E": jnp.zeros(4)}, OPTIMIZER.init(params), key)


def _nats(params, batch):
    batch = jax.tree.map(lambda x: jax.reshard(x, P(None, None)), batch)
    logits_BTV = params["table_VV"].at[batch["inputs_BT"]].get(out_sharding=P())
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, batch["targets_BT"])
    return jnp.sum(nats_BT * batch["loss_mask_BT"]), jnp.sum(batch["loss_mask_BT"])


@functools.partial(jax.jit, donate_argnums=0)
def _toy_step(state, batch):
    def loss(params):
        nats, count = _nats(params, batch)
        return nats / count, count

    (value, count), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), (4,))
    variables = {"bias_E": state.variables["bias_E"] + noise}
    metrics = {"loss": value, "tokens": count, "grad_norm": jnp.ones(()), "load_LE": jnp.full((2, 4), 0.25)}
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, variables, opt_state, state.key), metrics


@jax.jit
def _toy_eval(params, variables, batch):
    return _nats(params, batch)


OPTIMIZER = optax.adam(0.01)
DRAW = plots.draw


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(loop, "create_state", _toy_state)
    monkeypatch.setattr(loop, "make_train_step", lambda *_, **__: _toy_step)
    monkeypatch.setattr(loop, "make_eval_step", lambda graphdef: _toy_eval)
    monkeypatch.setattr(plots, "draw", lambda workdir: (workdir / "loss.png").touch())


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(["to", "be", "or", "not"], 300 + 10 * i)))
    return folder


@pytest.fixture
def config(texts):
    data = dataclasses.replace(
        CONFIG.data, source=runs_source(texts), sequence_length=16, batch_size=16, held_out_bytes=5000, prefetch=2
    )
    train = dataclasses.replace(
        CONFIG.train, steps=12, checkpoint_every=5, log_every=4, evaluate_every=6, evaluate_batches=2
    )
    return dataclasses.replace(CONFIG, data=data, train=train)


def runs_source(texts):
    from research.data.sources import TextFiles

    return TextFiles((str(texts / "*.txt"),))


def _with(config, **fields):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


def _losses(workdir):
    return [(record["step"], record["loss"]) for record in read_lines(workdir / "metrics.jsonl")]


def _final(workdir, config):
    path = checkpoint_paths(workdir / "checkpoints")[-1]
    with jax.set_mesh(jax.make_mesh((8, 1), ("data", "fsdp"))):
        from research.training.optimizers import make_optimizer

        saved = load_part(path, loop._abstract_state(config, make_optimizer(config.optimizer, config.train.steps))[1])
    saved["key"] = jax.random.key_data(saved["key"])
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(saved)] + [
        (path / "data" / "process_0-of-1.json").read_text()
    ]


class StopAt(Interrupts):
    """Interrupts that receive SIGTERM when asked for the n-th time."""

    def __init__(self, asked):
        self.left, self.nothing_to_save = asked, True

    @property
    def received(self):
        self.left -= 1
        return signal.SIGTERM if self.left < 0 else None


def test_a_run_from_end_to_end(config, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw", DRAW)
    said = []
    outcome = loop.train(config, tmp_path / "run", say=said.append)
    workdir = tmp_path / "run"
    records = list(read_lines(workdir / "metrics.jsonl"))
    assert [record["step"] for record in records] == list(range(1, 13)), "every step has its line"
    assert [record["step"] for record in records if "load" in record] == [1, 4, 8, 12]
    first = records[0]
    # A byte a token; ends of documents are scored and have no bytes.
    assert first["bits_per_byte"] == pytest.approx(first["loss"] / math.log(2), rel=0.02)
    assert first["tokens"] == 256 and first["data_wait_seconds"] >= 0 and first["learning_rate"] == 0
    assert records[-1]["loss"] < records[0]["loss"]
    evaluations = list(read_lines(workdir / "evaluations.jsonl"))
    assert [(record["step"], record["whole"]) for record in evaluations] == [(6, False), (12, True)]
    result = json.loads((workdir / "result.json").read_text())
    assert result == outcome.result and outcome.signal is None
    held_out = result["held_out"]
    assert held_out["bits_per_byte"] == held_out["nats"] / math.log(2) / held_out["bytes"]
    assert held_out["tokens"] == held_out["bytes"] + held_out["documents"], "every byte and every end, once"
    assert set(result["baselines"]) == {"xz_whole", "xz_each", "order_0"}
    assert [path.name for path in checkpoint_paths(workdir / "checkpoints")] == ["5", "10", "12"]
    assert from_json(ExperimentConfig, (workdir / "config.json").read_text()) == config
    assert {path.name for path in workdir.glob("*.png")} == {"loss.png", "expert_load.png", "throughput.png"}
    assert any(line.startswith("step 12/12") and "experts" in line for line in said)

    said.clear()
    again = loop.train(config, workdir, say=said.append)
    assert again.result == result and "resuming from step 12" in said[1]
    assert len(list(read_lines(workdir / "metrics.jsonl"))) == 12


@pytest.mark.parametrize("asked", [1, 7, 8])
def test_stopped_by_a_signal_and_resumed_is_as_if_never_stopped(config, tmp_path, asked):
    loop.train(config, tmp_path / "whole", say=lambda line: None)
    said = []
    outcome = loop.train(config, tmp_path / "parts", say=said.append, interrupts=StopAt(asked))
    assert outcome.signal == signal.SIGTERM and outcome.result is None and outcome.step < 12
    assert checkpoint_paths(tmp_path / "parts" / "checkpoints")[-1].name == str(outcome.step)
    assert len(_losses(tmp_path / "parts")) == outcome.step
    assert (tmp_path / "parts" / "loss.png").exists()
    # On another mesh: the table is the same on every device, so even that changes nothing.
    other = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=4, fsdp=2))
    loop.train(other, tmp_path / "parts", say=said.append)
    assert any(line.startswith(f"resuming from step {outcome.step}: mesh.data was -1, now 4") for line in said)
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    assert _final(tmp_path / "parts", config) == _final(tmp_path / "whole", config)
    steps = [
        [record["step"] for record in read_lines(tmp_path / name / "evaluations.jsonl")] for name in ("whole", "parts")
    ]
    assert steps[0] == steps[1]


def test_a_loss_that_is_not_finite_stops_the_run_unsaved(config, tmp_path, monkeypatch):
    def breaks_at_ten(state, batch):
        state, metrics = _toy_step(state, batch)
        calls.append(metrics)
        return state, metrics | ({"loss": np.float32("nan")} if len(calls) == 10 else {})

    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_train_step", lambda *_, **__: breaks_at_ten)
        with pytest.raises(loop.TrainingFailed, match="the loss is nan at step 10"):  # where a checkpoint is due
            loop.train(config, tmp_path, say=lambda line: None)
    assert [path.name for path in checkpoint_paths(tmp_path / "checkpoints")] == ["5"]
    assert loop.train(config, tmp_path, say=lambda line: None).step == 12


def _files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts}


def test_what_a_run_cannot_go_on_with(config, texts, tmp_path):
    workdir = tmp_path / "run"
    loop.train(_with(config, steps=5, evaluate_every=0), workdir, say=lambda line: None)
    before = _files(workdir)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, width=64))
    with pytest.raises(ConfigError, match=r"holds another model \(model.width was 32, now 64\)"):
        loop.train(wider, workdir)
    longer = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=32))
    with pytest.raises(ConfigError, match=r"another experiment \(data.sequence_length was 16, now 32\)"):
        loop.train(longer, workdir)
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in texts.glob("*.txt"):
        (changed / path.name).write_text(path.read_text() + ("!" if path.name == "3.txt" else ""))
    elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, source=runs_source(changed)))
    with pytest.raises(ConfigError, match=r"the data has changed since .* the corpus hash was"):
        loop.train(elsewhere, workdir)
    (workdir / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        loop.train(config, workdir)
    before_config = next(path for path in before if path.name == "config.json")
    before_config.write_bytes(before[before_config])
    assert _files(workdir) == before, "nothing overwritten"

    said = []
    more = dataclasses.replace(_with(config, steps=7, evaluate_every=0), data=config.data)
    assert loop.train(more, workdir, say=said.append).step == 7
    assert any("train.steps was 5, now 7" in line for line in said)


def test_what_no_run_can_start_with(config, tmp_path):
    def refused(config, workdir, match):
        with pytest.raises(ConfigError, match=match):
            loop.train(config, workdir, say=lambda line: None)

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    refused(config, foreign, r"holds thesis.tex but no config.json")
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    refused(config, foreign / "thesis.tex", "is a file")
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=100))
    refused(small, tmp_path / "a", "model.vocab_size is 100: it must be at least the tokenizer's 259")
    odd = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=12))
    refused(odd, tmp_path / "b", r"data.batch_size is 12 .* divisible by the 8 shards")
    refused(_with(config, micro_batches=3), tmp_path / "b", "divisible by train.micro_batches, 3")
    mesh = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=3))
    refused(mesh, tmp_path / "b", "mesh: .* number of devices, 8")
    spread = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, expert=8))
    refused(spread, tmp_path / "b", "mesh: experts must divide over the 8 devices of the mesh's expert axis, got 4")
    none = dataclasses.replace(config, data=dataclasses.replace(config.data, source=runs_source(tmp_path / "nowhere")))
    refused(none, tmp_path / "b", "matches no file")
    with runs.claim(tmp_path / "taken"):
        refused(config, tmp_path / "taken", "another process is training there")
    assert not list((tmp_path / "a").iterdir()) or not (tmp_path / "a" / "config.json").exists()
    refused(none, tmp_path / "a", "matches no file")


def test_what_may_change():
    before = {"model": {"width": 1}, "train": {"steps": 1, "seed": 0}, "data": {"source": {"kind": "A"}, "seed": 1}}
    now = {"model": {"width": 1}, "train": {"steps": 2, "seed": 0}, "data": {"source": {"kind": "B"}, "seed": 1}}
    assert runs.changes(before, now) == {"train.steps": (1, 2), "data.source.kind": ("A", "B")}
    assert len(runs.check_changes(Path("here"), before, now)) == 2
    now["train"]["seed"] = 3
    with pytest.raises(ConfigError, match=r"another experiment \(train.seed was 0, now 3"):
        runs.check_changes(Path("here"), before, now)


def test_a_run_says_how_tokens_reach_their_experts():
    one, four = (jax.sharding.AbstractMesh((1, 1, n, 1, 1), AXES) for n in (1, 4))
    assert loop.exchange_plans(CONFIG, one) == []
    (line,) = loop.exchange_plans(CONFIG, four)
    assert line.startswith("experts: experts exchange tokens by ") and "MiB a device, layer and forward pass" in line
