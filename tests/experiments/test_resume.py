"""Real processes, really killed: what continues is bitwise what would have been.

One run is left alone. The other is stopped by SIGTERM, killed by SIGKILL in the middle of a step, killed again in the
middle of a save, and has its newest checkpoint damaged; then both are compared: parameters, optimizer, router state,
key, data position, and the loss of every step.
"""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from research.training.checkpoints import checkpoint_paths, load_part
from research.training.metrics import read_lines
from research.training.runs import load_for_inference

STEPS, EVERY = 36, 12


class Program:
    """``python -m experiments.train`` of a tiny model on a few text files."""

    def __init__(self, folder):
        self.folder = folder
        texts = folder / "texts"
        texts.mkdir()
        rng = np.random.default_rng(0)
        for i in range(24):
            (texts / f"{i}.txt").write_text(" ".join(rng.choice(["to", "be", "or", "not"], 1000)))
        self.words = [
            *("data.source=TextFiles", f"data.source.paths={texts}/*.txt", "data.held_out_bytes=15000"),
            *("data.sequence_length=64", "model.pattern=experts", "data.batch_size=16"),
            *(f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.log_every=5"),
            *(f"train.evaluate_every={EVERY}", "train.evaluate_batches=1", "train.progress_seconds=0"),
        ]
        # Compiled once for all processes, and quickly: what is compared is the same program with itself.
        self.env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }

    def start(self, name):
        command = [sys.executable, "-m", "experiments.train", "tiny", *self.words, "--workdir", str(self.folder / name)]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def steps_done(self, name):
        records = list(read_lines(self.folder / name / "metrics.jsonl"))
        return records[-1]["step"] if records else 0


def _wait(process, condition):
    """Polls until ``condition()``; fails with what the process said if it ends before."""
    end = time.monotonic() + 240
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"never came to it:\n{process.communicate()[0]}")
        time.sleep(0.001)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both runs, and what the processes of the second one said."""
    program = Program(tmp_path_factory.mktemp("runs"))
    folder = program.folder / "parts" / "checkpoints"
    whole = program.start("whole")
    out, _ = whole.communicate(timeout=240)
    assert whole.returncode == 0, out
    said = [out]

    # SIGTERM between two checkpoints.
    process = program.start("parts")
    _wait(process, lambda: program.steps_done("parts") >= 3)
    process.send_signal(signal.SIGTERM)
    said.append(process.communicate(timeout=60)[0])
    assert process.returncode == 128 + signal.SIGTERM, said[-1]
    stopped = int(checkpoint_paths(folder)[-1].name)
    assert 3 <= stopped < EVERY, "the steps are too fast for this test"

    # SIGKILL between two others.
    process = program.start("parts")
    _wait(process, lambda: program.steps_done("parts") >= EVERY + 3)
    process.kill()
    said.append(process.communicate()[0])
    assert EVERY < program.steps_done("parts") < 2 * EVERY
    assert [path.name for path in checkpoint_paths(folder)] == [str(stopped), str(EVERY)]

    # SIGKILL in the middle of a save.
    process = program.start("parts")
    unfinished = folder / f"{2 * EVERY}.orbax-checkpoint-tmp"
    _wait(process, unfinished.exists)
    process.kill()
    said.append(process.communicate()[0])
    assert unfinished.exists() and not (folder / str(2 * EVERY)).exists()

    # And a flipped bit in the newest checkpoint.
    arrays = max((folder / str(EVERY)).rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(arrays.read_bytes())
    content[len(content) // 2] ^= 1
    arrays.write_bytes(content)
    process = program.start("parts")
    said.append(process.communicate(timeout=240)[0])
    assert process.returncode == 0, said[-1]
    return program.folder / "whole", program.folder / "parts", said, stopped


def _bits(leaf):
    return jax.random.key_data(leaf) if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _saved(workdir):
    """Every array of the last checkpoint as bytes, by path, and the data position."""
    path = checkpoint_paths(workdir / "checkpoints")[-1]
    assert path.name == str(STEPS)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = ocp.metadata(str(path), checkpointable_name="state").metadata
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), shapes)
    leaves = jax.tree_util.tree_flatten_with_path(load_part(path, target))[0]
    arrays = {jax.tree_util.keystr(key): np.asarray(_bits(leaf)).tobytes() for key, leaf in leaves}
    return arrays, json.loads((path / "data" / "process_0-of-1.json").read_text())


def test_everything_continues_bitwise(runs):
    whole, parts, _, _ = runs
    arrays, place = _saved(whole)
    for part in ("params", "opt_state", "variables", "key", "step"):
        assert any(f"'{part}'" in name for name in arrays)
    assert any("bias_E" in name and any(value) for name, value in arrays.items()), "the router has a state"
    resumed, resumed_place = _saved(parts)
    assert resumed.keys() == arrays.keys()
    assert [name for name in arrays if arrays[name] != resumed[name]] == []
    assert resumed_place == place


def test_every_step_has_its_line_once_and_the_same_loss(runs):
    whole, parts, _, _ = runs
    losses = [[(r["step"], r["loss"], r["grad_norm"]) for r in read_lines(d / "metrics.jsonl")] for d in (whole, parts)]
    assert [step for step, _, _ in losses[0]] == list(range(1, STEPS + 1))
    assert losses[0] == losses[1]
    held_out = [list(read_lines(workdir / "evaluations.jsonl")) for workdir in (whole, parts)]
    assert [record["step"] for record in held_out[0]] == [EVERY, 2 * EVERY, STEPS]
    assert held_out[0] == held_out[1]
    assert (whole / "result.json").read_bytes() == (parts / "result.json").read_bytes()


def test_what_is_said(runs):
    _, parts, (first, terminated, killed, killed_in_save, last), stopped = runs
    assert "held out" in first.lower() and "xz -9" in first and f"train.steps={2 * STEPS}" in first
    assert "SIGTERM: finishing this step, then saving" in terminated
    assert (
        f"Saved at step {stopped}. Resume with:\n  python -m experiments.train tiny data.source=TextFiles" in terminated
    )
    assert f"resuming from step {stopped}\n" in killed
    assert f"resuming from step {EVERY}\n" in killed_in_save
    aside = parts / "checkpoints" / f"{EVERY}.damaged"
    assert f"checkpoint {EVERY} is damaged" in last and str(aside) in last and aside.is_dir()
    assert f"resuming from step {stopped}\n" in last
    assert not any(
        "Traceback" in text or "WARNING" in text for text in (first, terminated, killed, killed_in_save, last)
    )


def test_the_model_is_there_for_others_on_any_number_of_devices(runs):
    """One device trained it; here are eight, and no configuration in hand."""
    whole, _, _, _ = runs
    alone = load_for_inference(whole)
    assert alone.step == STEPS and alone.config.model.pattern == ("experts",)
    assert alone.tokenizer.decode(alone.tokenizer.encode("to be")) == "to be"
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "fsdp"))):
        spread = load_for_inference(whole)
    pairs = list(zip(jax.tree.leaves(alone.model), jax.tree.leaves(spread.model), strict=True))
    assert pairs and all(np.array_equal(a, b) for a, b in pairs)
    assert any(len(b.sharding.device_set) == 8 and not b.is_fully_replicated for _, b in pairs)
