"""The program prints the number that training printed, scores any text, and says where it cannot."""

import contextlib
import io
import json
import math
import shutil
import statistics

import pytest

from experiments import cli, evaluate
from research.training.metrics import read_lines
from tests.experiments.tiny import tiny_run


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(cli, "keep_compiled", lambda cache: None)


def run(*arguments):
    """Exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.call(evaluate.main, [str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
    return code, out.getvalue(), err.getvalue()


@pytest.mark.slow  # compiles its own program
def test_it_prints_the_number_that_training_printed():
    directory = tiny_run()
    code, out, err = run(directory, "--json")
    assert code == 0, err
    result, trained = json.loads(out), json.loads((directory / "result.json").read_text())
    assert result["bits_per_byte"] == pytest.approx(trained["held_out"]["bits_per_byte"], rel=1e-5)
    assert {name: result[name] for name in ("bytes", "tokens", "documents")} == {
        name: trained["held_out"][name] for name in ("bytes", "tokens", "documents")
    }
    assert result["baselines"] == trained["baselines"] and result["step"] == 20
    assert result["perplexity"] == pytest.approx(math.exp(result["nats_per_token"]))


@pytest.mark.slow  # compiles its own program
def test_files_are_scored_whole(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve ".encode() * 30)
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    code, out, err = run(tiny_run(), "--files", tmp_path / "*.txt", tmp_path / "b.bin", "--json")
    assert code == 0, err
    result = json.loads(out)
    # A token a byte, and one for the end of each document.
    assert (result["bytes"], result["tokens"], result["documents"]) == (466, 468, 2)
    assert result["bits_per_byte"] == pytest.approx(result["nats_per_token"] * 468 / 466 / math.log(2))
    read = evaluate.report(result)
    assert "466 bytes in 2 documents, in bits per byte" in read and "order-0 (byte frequencies)" in read


def test_changed_data_is_not_held_out(tmp_path):
    texts = tiny_run().parent / "texts"
    shutil.copytree(tiny_run(), tmp_path / "run")
    added = texts / "added.py"
    added.write_text("x = 1\n")
    try:
        code, out, err = run(tmp_path / "run")
    finally:
        added.unlink()
    assert (code, out) == (2, "")
    assert err.startswith("error: the data has changed since the model was trained on it") and "--files" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--files", "/nowhere/*.txt"], "error: --files: '/nowhere/*.txt' matches no file"),
        (["--overlap", "64"], "error: --overlap must be less than the 64 positions of a row, got 64\n"),
        (["--overlap", "-1"], "error: --overlap must be at least 0, got -1\n"),
        (["--batch-size", "0"], "error: --batch-size must be at least 1, got 0\n"),
    ],
)
def test_bad_input_is_named(arguments, message):
    code, out, err = run(tiny_run(), *arguments)
    assert (code, out) == (2, "") and err.startswith(message)


def test_the_loader_never_starves_the_step():
    """The share of time that steps wait for their batch, in a run whose steps are a thousand times smaller than most."""
    records = list(read_lines(tiny_run() / "metrics.jsonl"))[3:]
    waited = statistics.median(record["data_wait_seconds"] for record in records)
    took = statistics.median(record["tokens"] / record["tokens_per_second"] for record in records)
    assert waited < 0.1 * took
