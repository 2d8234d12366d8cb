"""From a Hugging Face directory to a run that other programs open, and back."""

import json

import numpy as np
import pytest
import tokenizers

from experiments import cli, convert
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
