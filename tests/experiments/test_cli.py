"""What a person meets at the command line: help, presets, overrides, and a sentence for every mistake."""

import json
import os
import subprocess
import sys
from types import ModuleType

import jax
import pytest

from configs.tiny import CONFIG
from experiments import __main__ as scanroute
from experiments import benchmark, cli, train
from research.config import ConfigError, override
from research.training.runs import write_config


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setattr(cli, "keep_compiled", lambda cache: None)


def _run(capsys, main, *argv):
    code = cli.call(main, list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_help_is_for_a_person_and_lists_the_configurations(capsys):
    code, out, _ = _run(capsys, train.main, "--help")
    assert code == 0
    assert "tiny The demo's architecture at the size of a thumbnail" in " ".join(out.split())
    assert "exit codes: 0 done" in out


def test_help_of_a_configuration_lists_fields_with_types_and_values(capsys):
    code, out, _ = _run(capsys, train.main, "tiny", "--help", "train.steps=7")
    assert code == 0 and "python -m experiments.train tiny" in out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("  ") and line.split()}
    assert lines["train.steps"] == ["7", "int"]
    assert lines["optimizer.clip_norm"] == ["1.0", "float", "or", "none"]
    assert lines["model.branches.experts.mixer.per_token"] == ["2", "int"]


def _bad(words, says):
    return pytest.param(words, says, id=words[-1] if words else "nothing")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        _bad([], "which configuration? There are"),
        _bad(["tinny"], "there is no configuration 'tinny': did you mean tiny?"),
        _bad(["tiny", "optimizer.learning_rate=NaN"], "optimizer.learning_rate must be"),
        _bad(["tiny", "model.branches.deltanet.mixer.implementation=fast"], "implementation must be None or one of"),
        _bad(["tiny", "model.branches.attention.mixer.implementation=fast"], "implementation must be None or one of"),
        _bad(["tiny", "model.branches.deltanet.mixer.chunk_size=3"], "chunk_size must be a power of two, got 3"),
        _bad(["tiny", "data.source.paths=x"], "paths is not a field of PythonStandardLibrary, which has none"),
        _bad(["tiny", "train.stepz=3"], "train.stepz is not a field of TrainConfig; did you mean steps?"),
        _bad(["tiny", "train.steps=many"], "train.steps must be int, got 'many'"),
        _bad(["tiny", "train.steps=0"], "steps must be at least 1, got 0"),
        _bad(["tiny", "steps"], "must read field.sub=value, got 'steps'"),
        _bad(["tiny", "--worker=3"], "unrecognized arguments: --worker=3"),
        _bad(["tiny", "data.source=TextFiles"], "data.source.paths is empty"),
        _bad(["tiny", "data.source=TextFiles", "data.source.paths=/nowhere/x.txt"], "'/nowhere/x.txt' does not exist"),
        _bad(["tiny", "data.source=TextFiles", "data.source.paths=EMPTY"], "holds no text"),
        _bad(["tiny", "data.sequence_length=1"], "data.sequence_length is 1: it must be at least 2"),
        _bad(["tiny", "data.batch_size=12"], "data.batch_size is 12 (train.micro_batches is 1): the batch must be div"),
        _bad(["tiny", "model.branches.experts.mixer.per_token=9"], "per_token must be from 1 to the 4 experts, got 9"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, tmp_path, words, says):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    words = [word.replace("EMPTY", str(empty)) for word in words]
    try:
        code, out, err = _run(capsys, train.main, *words, "--workdir", str(tmp_path / "run"))
    except SystemExit as exit:
        code, (out, err) = exit.code, capsys.readouterr()
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in out + err
    assert not (tmp_path / "run" / "config.json").exists()


def test_another_model_in_the_work_directory_is_refused(capsys, tmp_path):
    write_config(tmp_path, override(CONFIG, "model.width=16"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, _, err = _run(capsys, train.main, "tiny", "--workdir", str(tmp_path))
    assert code == 2 and "holds another model (model.width was 16, now 32)" in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_overrides_may_be_valid_only_together():
    mixer = "model.branches.experts.mixer"
    config = cli.load_config("tiny", [f"{mixer}.per_token=8", f"{mixer}.experts=8", "train.steps=3"])
    assert config.model.branches[2].mixer.per_token == 8 and config.train.steps == 3
    with pytest.raises(ConfigError, match="per_token must be from 1 to the 2 experts, got 8"):
        cli.load_config("tiny", [f"{mixer}.per_token=8", f"{mixer}.experts=2"])


def test_what_fails_unforeseen_is_a_traceback_and_exit_code_1(capsys):
    def fail(argv):
        raise RuntimeError("unforeseen")

    code, _, err = _run(capsys, fail)
    assert code == 1 and "Traceback" in err and "unforeseen" in err


def test_scanroute_lists_and_starts_the_programs(capsys):
    code, out, _ = _run(capsys, scanroute.main)
    assert code == 0 and "train" in out and "benchmark" in out and "\n  cli" not in out
    code, _, err = _run(capsys, scanroute.main, "trian")
    assert code == 2 and "there is no program 'trian'" in err
    code, _, err = _run(capsys, scanroute.main, "train", "tinny")
    assert code == 2 and "did you mean tiny?" in err


@pytest.fixture
def speed(monkeypatch):
    module = ModuleType("experiments.benchmarks.speed")
    module.run = lambda quick: {"quick": quick, "parts": {"a": 1.23456789, "b": [1.0, 2.0]}, "cases": [{"n": 3}]}
    monkeypatch.setitem(sys.modules, "experiments.benchmarks.speed", module)
    monkeypatch.setattr(cli, "modules_of", lambda package: {"speed": "How fast."})


def test_benchmark_says_where_it_measured(capsys, speed):
    code, out, _ = _run(capsys, benchmark.main, "speed", "--json", "--quick")
    result = json.loads(out)
    assert code == 0 and result["quick"] is True and result["parts"]["a"] == 1.23456789
    assert result["command"] == "python -m experiments.benchmark speed --quick"
    assert result["jax"] == jax.__version__ and result["cores"] >= 1 and result["device"].startswith("8 x ")
    assert {"date", "python", "jaxlib"} <= result.keys()
    code, out, _ = _run(capsys, benchmark.main, "speed")
    rows = dict(line.split(None, 1) for line in out.splitlines())
    assert rows["parts.a"] == "1.235" and rows["parts.b"] == "1, 2" and rows["cases.0.n"] == "3"


def test_an_unknown_benchmark_lists_those_there_are(capsys, speed):
    code, _, err = _run(capsys, benchmark.main, "sped")
    assert code == 2 and "there is no benchmark 'sped': did you mean speed? There are speed." in err


def test_it_starts_anywhere(tmp_path):
    """From another directory, with the package on the path: presets are found through it."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(cli.__file__)))
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "train", "tinny"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "There are" in done.stderr and "tiny" in done.stderr
