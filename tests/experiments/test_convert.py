"""From a Hugging Face directory to a run that other programs open, and back."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import configs
from experiments import cli, convert, train
from research.layers.mlp import MLPConfig
from research.training.runs import load_for_inference
from tests.interop.checkpoints import golden, stored_in, write_checkpoint


@pytest.fixture(scope="module")
def g():
    return golden("qwen3")


def test_there_and_back(g, tmp_path, capsys):
    source, run, back = tmp_path / "hub", tmp_path / "run", tmp_path / "back"
    write_checkpoint(source, g.hub, g.tensors)
    words = {"<end>": 0} | {word: i for i, word in enumerate(("in", "the", "beginning", "was", "a", "word"), 1)}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    library.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": "{{ messages }}"}))
    assert cli.call(convert.main, [str(source), str(run)]) == 0
    trained = load_for_inference(run)
    assert trained.tokenizer.start_id == 0 and trained.tokenizer.vocab_size == 7
    assert not list(tmp_path.glob("*.unfinished"))
    assert cli.call(convert.main, ["--to-huggingface", str(run), str(back)]) == 0
    again = stored_in(back)
    assert set(again) == set(g.tensors)
    for name, values in g.tensors.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)
    assert json.loads((back / "config.json").read_text()) == g.hub
    assert json.loads((back / "tokenizer.json").read_text()) == json.loads((source / "tokenizer.json").read_text())
    assert (back / "tokenizer_config.json").read_text() == (source / "tokenizer_config.json").read_text()
    # What is there is never overwritten.
    assert cli.call(convert.main, [str(source), str(run)]) == 2
    assert "it must be an empty directory or not exist yet" in capsys.readouterr().err


def test_bad_input_is_a_sentence(g, tmp_path, capsys):
    assert cli.call(convert.main, [str(tmp_path / "nowhere"), str(tmp_path / "run")]) == 2
    assert "holds no config.json: it must be a Hugging Face model's directory" in capsys.readouterr().err
    write_checkpoint(tmp_path / "hub", {**g.hub, "novelty": 1}, g.tensors)
    assert cli.call(convert.main, [str(tmp_path / "hub"), str(tmp_path / "run")]) == 2
    assert "nothing here reads novelty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]
    assert cli.call(convert.main, ["--to-huggingface", str(tmp_path / "hub"), str(tmp_path / "out")]) == 2


PRESET = '''"""The published model's dimensions, and texts for its tokenizer."""
import json
from pathlib import Path
from research.data.pipeline import DataConfig, TextFiles, TokenizerJson
from research.models.families import model_config
from research.training.config import ExperimentConfig
from research.training.optimizers import OptimizerConfig

HERE = Path(__file__).parent
CONFIG = ExperimentConfig(
    model_config(json.loads((HERE / "hub" / "config.json").read_text())),
    DataConfig(TextFiles((f"{HERE}/*.txt",)), TokenizerJson(f"{HERE}/hub/tokenizer.json"), 16, 8, held_out_bytes=0),
    OptimizerConfig(),
)
'''


@pytest.mark.slow
def test_a_published_model_becomes_a_mixture_of_experts(g, tmp_path, capsys, monkeypatch):
    source, dense, experts = tmp_path / "hub", tmp_path / "dense", tmp_path / "experts"
    write_checkpoint(source, g.hub, g.tensors)
    words = {word: i for i, word in enumerate(("<end>", "in", "the", "beginning", "was", "a", "word"))}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    assert cli.call(convert.main, [str(source), str(dense)]) == 0
    name = next(b.name for b in load_for_inference(dense).config.model.branches if isinstance(b.mixer, MLPConfig))
    assert cli.call(convert.main, ["--upcycle", name, "--copies", "2", str(dense), str(experts)]) == 0
    told = re.search(r"data of its tokenizer and:\n  (model.*)\n", capsys.readouterr().out)[1].split()
    assert told[:2] == [f"model.branches.{name}.mixer=MoEConfig", f"model.branches.{name}.mixer.experts=2"]
    tokens_BT = jnp.asarray(g.documents[0][None])
    models = [load_for_inference(run).model for run in (dense, experts)]
    one, many = (jax.jit(lambda model: model(tokens_BT).logits_BTV)(model) for model in models)
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(cli, "keep_compiled", lambda folder: None)
    # It has seen no data of ours, and no optimizer.
    words = ["tiny", "--workdir", str(experts)]
    assert cli.call(train.main, words) == 2
    assert f"choose another --workdir, with train.start_from={experts}" in capsys.readouterr().err
    both = ["--upcycle", name, "--to-huggingface", str(dense), str(tmp_path / "none")]
    assert cli.call(convert.main, both) == 2
    assert "--to-huggingface and --upcycle are two conversions" in capsys.readouterr().err
    # With a configuration and texts it trains on from there.
    (tmp_path / "published.py").write_text(PRESET)
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(" ".join(["in the beginning was a word"] * (40 + number)))
    monkeypatch.setattr(configs, "__path__", [*configs.__path__, str(tmp_path)])
    run = tmp_path / "run"
    assert cli.call(train.main, ["published", *told, "train.steps=2", "--workdir", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"starting from {experts}" in said
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert (
        cli.call(
            train.main, ["published", f"train.start_from={dense}", "train.steps=1", "--workdir", str(tmp_path / "same")]
        )
        == 0
    )
    first = [
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for folder in (run, tmp_path / "same")
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-4)


@pytest.mark.slow
def test_a_dense_run_trains_on_as_a_mixture_of_experts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "keep_compiled", lambda folder: None)
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text("\n".join(f"line {n} of text {number}" for n in range(80)))
    mlp = "model.branches.experts.mixer"
    words = [
        "tiny", f"{mlp}=MLPConfig", f"{mlp}.hidden=32", "model.pattern=experts,", "data.source=TextFiles",
        f"data.source.paths={tmp_path}/*.txt", "data.held_out_bytes=8000", "train.progress_seconds=0",
    ]  # fmt: skip
    dense, experts = str(tmp_path / "dense"), str(tmp_path / "experts")
    assert cli.call(train.main, [*words, "train.steps=3", "--workdir", dense]) == 0
    options = ["--upcycle", "experts", "--copies", "4", "--active", "2", "--granularity", "2"]
    assert cli.call(convert.main, [*options, dense, experts]) == 0
    more = re.search(r"  (model.*) --workdir", capsys.readouterr().out)[1].split()
    kept = [word for word in words if not word.startswith(mlp)]
    assert cli.call(train.main, [*kept, *more, "train.steps=2", "--workdir", experts]) == 0
    assert "resuming from step 0" in capsys.readouterr().out
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("dense", "experts")
    ]
    # The data begins again, and the model where the dense one had come to.
    assert len(losses[1]) == 2 and losses[1][0] < losses[0][0]
    assert load_for_inference(experts).config.model.branches[2].mixer.experts == 8
    assert cli.call(convert.main, ["--upcycle", "nothing", dense, str(tmp_path / "none")]) == 2
    assert "names must name MLPs, got 'nothing'" in capsys.readouterr().err
