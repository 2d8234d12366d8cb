"""The training loop: start or resume, step, write down, save, stop when asked, evaluate at the end."""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from research.config import ConfigError, to_dict
from research.data.baselines import measure_baselines
from research.data.pipeline import Corpus, build_loader, open_corpus
from research.data.tokenization import tokenizer_from_json
from research.layers.moe import MoEConfig
from research.sharding.mesh import BATCH, batch_sharding, check_batch, make_mesh
from research.training.checkpoints import CHECKPOINTS_FOLDER, Checkpoints, checkpoint_paths, read_about, read_tokenizer
from research.training.config import ExperimentConfig
from research.training.evaluation import HeldOut, byte_lengths, evaluate
from research.training.interrupts import Interrupts
from research.training.metrics import Recorder, count, duration, read_lines, round_to, run_files, say_now
from research.training.optimizers import make_optimizer, schedule, trains
from research.training.runs import CACHE_FOLDER, check_changes, claim, placed, read_config, take_over, write_config
from research.training.state import TrainState, create_state
from research.training.step import make_eval_step, make_train_step

RESULT_FILE = "result.json"


class TrainingFailed(RuntimeError):
    """Training cannot go on; its message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: the step it is at, the signal that stopped it (None if it is done), and its result."""

    step: int
    signal: int | None
    result: dict[str, Any] | None


def train(
    config: ExperimentConfig,
    workdir: str | Path,
    *,
    say: Callable[[str], None] = say_now,
    interrupts: Interrupts | None = None,
) -> Outcome:
    """Trains in ``workdir`` up to ``config.train.steps``, from its newest checkpoint if it holds one.

    Raises:
      ConfigError: the configuration, data or work directory cannot be used; nothing has been overwritten.
      TrainingFailed: the loss or the gradient is not finite.
    """
    if jax.process_index():
        say = _say_nothing
    mesh = _mesh(config)
    with claim(workdir) as path, jax.set_mesh(mesh):
        run = _open(config, path, mesh, say)
        steps = config.train.steps
        recorder = Recorder(
            path,
            steps=steps,
            resume_step=run.step,
            log_every=config.train.log_every,
            progress_seconds=config.train.progress_seconds,
            say=say,
            active=jax.process_index() == 0,
        )
        with contextlib.closing(recorder):
            try:
                signal = run.steps(recorder, interrupts)
            finally:
                run.checkpoints.wait()
                recorder.sync()
            result = None
            if signal is None:
                result = run.finish(recorder, interrupts)
                signal = interrupts.received if interrupts is not None and result is None else None
            _draw(path, say)
        return Outcome(run.step, signal, result)


@dataclasses.dataclass
class _Run:
    """A run that is open: what stays, and where it is."""

    config: ExperimentConfig
    path: Path
    mesh: jax.sharding.Mesh
    say: Callable[[str], None]
    corpus: Corpus
    iterator: Iterator[dict[str, np.ndarray]]
    checkpoints: Checkpoints
    optimizer: Any
    graphdef: Any  # nnx.GraphDef
    state: TrainState
    step: int
    saved_step: int | None

    def __post_init__(self):
        self._bytes_of_id = byte_lengths(self.corpus.tokenizer)
        self._eval_step = make_eval_step(self.graphdef)
        self._pending: tuple | None = None

    def steps(self, recorder: Recorder, interrupts: Interrupts | None) -> int | None:
        """Steps until the last one or a signal; saved either way. Returns the signal."""
        options = self.config.train
        trained = functools.partial(trains, self.config.optimizer)
        train_step = make_train_step(
            self.graphdef, self.optimizer, micro_batches=options.micro_batches, trained=trained
        )
        rates = np.asarray(schedule(self.config.optimizer, options.steps)(np.arange(options.steps)))
        rates = np.broadcast_to(rates, options.steps)  # a constant schedule returns one number for all
        first = self.step
        while self.step < options.steps:
            if self._evaluation_due(recorder):
                self._settle(recorder)
                self._evaluate_on_the_way(recorder, interrupts)
                if signal := self._signal(interrupts):
                    self._save(recorder)
                    return signal
            began = time.monotonic()
            batch = next(self.iterator)
            waited = time.monotonic() - began
            on_device = self._put(batch)
            if self.step == first:
                self.say("compiling the training step ...")
            with jax.transfer_guard("disallow"):
                self.state, metrics = train_step(self.state, on_device)
            if self.step == first:
                self.say(f"compiled in {duration(time.monotonic() - began)}")
                recorder.throughput = type(recorder.throughput)()
                if interrupts is not None:
                    interrupts.nothing_to_save = False
            # The step before this one: the device is at work on this one while its numbers are fetched and written.
            self._settle(recorder)
            self._pending = (self.step + 1, metrics, batch, float(rates[self.step]), waited)
            self.step += 1
            signal = self._signal(interrupts)
            if signal or self.step == options.steps or self.step % options.checkpoint_every == 0:
                self._save(recorder)
            if signal:
                return signal
        return None

    def finish(self, recorder: Recorder, interrupts: Interrupts | None) -> dict[str, Any] | None:
        """Evaluates the whole held-out set and writes result.json; None where a signal came in between."""
        result_file = self.path / RESULT_FILE
        with contextlib.suppress(OSError, ValueError):
            result = json.loads(result_file.read_bytes())
            if result.get("step") == self.step:
                return result
        result = {"step": self.step, "parameters": _size(self.state.params), "corpus_hash": self.corpus.hash}
        if self.corpus.held_out_bytes:
            self.say(f"evaluating on {len(self.corpus.held_out_names)} held-out documents ...")
            held_out = self._evaluate(0, interrupts, self._evaluation_progress())
            if held_out is None:
                return None
            recorder.evaluation({"step": self.step, **held_out._asdict()})
            result["held_out"] = {**held_out._asdict(), "documents": len(self.corpus.held_out_names)}
            result["baselines"] = dataclasses.asdict(measure_baselines(self.corpus.held_out_documents))
        if jax.process_index() == 0:
            unfinished = result_file.with_suffix(".tmp")
            unfinished.write_text(json.dumps(result, indent=2) + "\n")
            unfinished.replace(result_file)
        return result

    def _settle(self, recorder: Recorder) -> None:
        """Fetches and records the numbers of the step that is pending, if one is."""
        if self._pending is None:
            return
        (step, metrics, batch, rate, waited), self._pending = self._pending, None
        values = jax.device_get(metrics)
        load_LE = values.pop("load_LE", None)
        numbers = {name: float(value) for name, value in values.items()}
        loss, tokens = numbers.pop("loss"), numbers.pop("tokens")
        record = {"step": step, "loss": loss}
        counted = batch["targets_BT"][batch["loss_mask_BT"]]
        if size := int(self._bytes_of_id[counted].sum()):
            record["bits_per_byte"] = round_to(loss / math.log(2) * counted.size / size, 6)
        record |= {"tokens": int(tokens), "tokens_per_second": round_to(recorder.throughput.step(tokens), 6)}
        record |= {"learning_rate": round_to(rate, 6)}
        record |= {name: round_to(value, 6) for name, value in numbers.items()}
        record["data_wait_seconds"] = round(waited, 6)
        recorder.step(record, load_LE)
        for name, value in (("loss", loss), ("grad_norm", numbers.get("grad_norm", 0.0))):
            if not math.isfinite(value):
                raise TrainingFailed(f"the {name} is {value} at step {step}: training has diverged and stops unsaved")

    def _save(self, recorder: Recorder) -> None:
        """Begins a checkpoint of the current step; its line of metrics is on the disk before."""
        self._settle(recorder)
        if self.saved_step == self.step:
            return
        recorder.sync()
        about = {"step": self.step, "config": to_dict(self.config), "corpus_hash": self.corpus.hash}
        tokenizer = self.corpus.tokenizer.to_json()
        self.checkpoints.save(self.step, vars(self.state), self.iterator, about=about, tokenizer=tokenizer)
        self.saved_step = self.step

    def _signal(self, interrupts: Interrupts | None) -> int | None:
        """The signal to stop for, the same in every process."""
        received = interrupts.received if interrupts is not None else None
        if jax.process_count() == 1:
            return received
        if self.step % self.config.train.log_every:
            return None
        return int(np.max(multihost_utils.process_allgather(np.int32(received or 0)))) or None

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows as its share of a batch over the whole mesh."""
        sharding = batch_sharding(self.mesh)
        if jax.process_count() == 1:
            return jax.device_put(batch, sharding)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

    def _evaluation_due(self, recorder: Recorder) -> bool:
        every = self.config.train.evaluate_every
        due = every > 0 and self.step > 0 and self.step % every == 0 and self.corpus.held_out_bytes > 0
        return due and self.step not in recorder.evaluated

    def _evaluate_on_the_way(self, recorder: Recorder, interrupts: Interrupts | None) -> None:
        began = time.monotonic()
        held_out = self._evaluate(self.config.train.evaluate_batches, interrupts)
        if held_out is not None:
            recorder.evaluation({"step": self.step, **held_out._asdict()})
            what = "" if held_out.whole else f" (the first {count(float(held_out.bytes))}B of it)"
            self.say(f"step {self.step}  held out{what}: {held_out.bits_per_byte:.4f} bits/byte")
        recorder.throughput.pause(time.monotonic() - began)

    def _evaluate(
        self, batches: int, interrupts: Interrupts | None, progress=lambda done, total: None
    ) -> HeldOut | None:
        return evaluate(
            self._eval_step,
            self.state.params,
            self.state.variables,
            self.corpus,
            self._put,
            batches=batches,
            stop=lambda: jax.process_count() == 1 and self._signal(interrupts) is not None,
            progress=progress,
        )

    def _evaluation_progress(self) -> Callable[[int, int], None]:
        last = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= self.config.train.progress_seconds:
                last = time.monotonic()
                self.say(f"evaluated {done}/{total} batches")

        return show


def _open(config: ExperimentConfig, path: Path, mesh: jax.sharding.Mesh, say: Callable[[str], None]) -> _Run:
    """Everything checked and loaded; the work directory is written to only once nothing more can be refused."""
    checkpoints = Checkpoints(path, keep=config.train.keep_checkpoints, say=say)
    newest = checkpoints.newest()
    about = {} if newest is None else read_about(newest)
    if about and not about["corpus_hash"]:
        raise ConfigError(
            f"{path} holds a converted model without an optimizer: choose another --workdir, with train.start_from={path}"
        )
    began_with = read_config(path)
    # A start that never came to a step leaves its configuration behind, and nothing that could be lost.
    if began_with is not None and (checkpoint_paths(path / CHECKPOINTS_FOLDER) or any(read_lines(run_files(path)[0]))):
        check_changes(path, began_with, to_dict(config))
    changed = check_changes(path, about["config"], to_dict(config)) if about else []
    known_tokenizer = None if newest is None else tokenizer_from_json(read_tokenizer(newest))
    try:
        corpus = open_corpus(config.data, tokenizer=known_tokenizer, cache=path / CACHE_FOLDER)
    except FileNotFoundError as error:
        raise ConfigError(str(error)) from error
    if about and about["corpus_hash"] != corpus.hash:
        raise ConfigError(
            f"the data has changed since {path} was trained on it: the corpus hash was {about['corpus_hash'][:12]}..., "
            f"now {corpus.hash[:12]}...; bring the data back, or choose another --workdir"
        )
    if corpus.tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}: it must be at least the tokenizer's "
            f"{corpus.tokenizer.vocab_size}"
        )
    say(f"data: {count(float(corpus.tokens))} tokens to train on, {count(float(corpus.held_out_bytes))}B held out")
    iterator = iter(build_loader(corpus))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    if newest is None:
        graphdef, state = create_state(config.model, optimizer, config.train.seed)
        if config.train.start_from is not None:
            state = take_over(config.train.start_from, graphdef, state, corpus.tokenizer, say)
        step = 0
    else:
        graphdef, abstract = _abstract_state(config, optimizer)
        state = TrainState(**checkpoints.restore(newest, abstract, iterator))
        step = int(newest.name)
        say(f"resuming from step {step}{': ' + '; '.join(changed) if changed else ''}")
    say(f"model: {count(float(_size(state.params)))} parameters on {_devices(mesh)}")
    for line in exchange_plans(config, mesh):
        say(line)
    if jax.process_index() == 0:
        write_config(path, config)
    saved_step = None if newest is None else step
    return _Run(
        config, path, mesh, say, corpus, iterator, checkpoints, optimizer, graphdef, state, step, saved_step
    )  # fmt: skip


def _abstract_state(config: ExperimentConfig, optimizer) -> tuple[Any, dict[str, Any]]:
    """The graph definition, and the fields of the state as shapes with shardings; computes nothing."""
    made = []

    def make():
        graphdef, state = create_state(config.model, optimizer, config.train.seed)
        made.append(graphdef)
        return vars(state)

    shapes = jax.eval_shape(make)
    return made[0], placed(shapes)


def _mesh(config: ExperimentConfig) -> jax.sharding.Mesh:
    try:
        mesh = make_mesh(config.mesh)
    except ValueError as error:
        raise ConfigError(f"mesh: {error}") from error
    rows, parts = config.data.batch_size, config.train.micro_batches
    if rows % parts:
        raise ConfigError(f"data.batch_size is {rows}: it must be divisible by train.micro_batches, {parts}")
    try:
        check_batch(rows // parts, mesh)
    except ValueError as error:
        raise ConfigError(f"data.batch_size is {rows} (train.micro_batches is {parts}): {error}") from error
    try:
        exchange_plans(config, mesh)
    except ValueError as error:
        raise ConfigError(f"mesh: {error}") from error
    return mesh


def exchange_plans(config: ExperimentConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> list[str]:
    """How tokens will reach experts on other devices and what each way would send, a line a kind of layer."""
    rows = config.data.batch_size // config.train.micro_batches // math.prod(mesh.shape[axis] for axis in BATCH)
    sizes = {"tokens": rows * config.data.sequence_length, "devices": mesh.shape["expert"]}
    itemsize = config.model.compute_dtype.itemsize
    return [
        f"{branch.name}: {branch.mixer.exchange_plan(config.model.width, **sizes, itemsize=itemsize)}"
        for branch in config.model.branches
        if isinstance(branch.mixer, MoEConfig) and sizes["devices"] > 1
    ]


def _devices(mesh: jax.sharding.Mesh) -> str:
    device = jax.devices()[0]
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return f"{mesh.size} {device.platform} device{'s' * (mesh.size > 1)} ({axes})"


def _draw(path: Path, say: Callable[[str], None]) -> None:
    if jax.process_index() == 0:
        from research.training import plots  # Matplotlib takes a second to import, and the first step need not wait

        try:
            plots.draw(path)
        except Exception as error:  # a picture is not worth a run
            say(f"the pictures could not be drawn: {error}")


def _size(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _say_nothing(line: str) -> None:
    del line
