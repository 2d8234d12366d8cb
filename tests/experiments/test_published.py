"""The programs on a published model: its Hugging Face directory, and the run that convert makes of it."""

import json
import math

import pytest

from experiments import cli, convert, evaluate, generate, score
from research.inference import generate as generate_ids
from research.interop.opening import is_published, open_model
from tests.interop.checkpoints import golden, write_checkpoint
from tests.interop.tokenizer import WORDS, write_tokenizer


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(cli, "keep_compiled", lambda cache: None)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    g = golden("qwen3")
    directory = write_checkpoint(tmp_path_factory.mktemp("published") / "hub", g.hub, g.tensors)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def run(hub):
    directory = hub.parent / "run"
    assert cli.call(convert.main, [str(hub), str(directory)]) == 0
    return directory


def call(program, capsys, *words):
    """Exit code, standard output and standard error."""
    capsys.readouterr()
    code = cli.call(program.main, [str(word) for word in words])
    return code, *capsys.readouterr()


def test_the_files_beside_a_model_travel_both_ways(hub, run, capsys):
    back = hub.parent / "back"
    assert call(convert, capsys, "--to-huggingface", run, back)[0] == 0
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (back / name).read_text() == (hub / name).read_text()
    assert json.loads((back / "tokenizer.json").read_text()) == json.loads((hub / "tokenizer.json").read_text())
    assert [is_published(path) for path in (hub, back, run, hub.parent)] == [True, True, False, False]
    # The tokenizer's own round trip, through the library both times.
    first, second = (open_model(path, say=lambda line: None).tokenizer for path in (hub, back))
    assert first.to_json() == second.to_json()
    text = "in the beginning was a word"
    assert first.encode(text).tolist() == second.encode(text).tolist() == [1, 2, 3, 4, 5, 6]
    assert second.decode(second.encode(text)) == text


def test_what_it_cannot_do_it_says(hub, run, capsys):
    for directory in (hub, run):
        code, _, err = call(evaluate, capsys, directory)
        assert code == 2 and "which holds no text out here: name the text with --files" in err
    code, _, err = call(evaluate, capsys, hub, "--task", "associative_recall")
    assert code == 2 and err.endswith("has 129 ids, which must be at most the 61 that the model knows\n")
    (hub.parent / "odd").mkdir(exist_ok=True)
    (hub.parent / "odd" / "config.json").write_text(json.dumps({"model_type": "parrot"}))
    code, _, err = call(generate, capsys, hub.parent / "odd", "--prompt", "x")
    assert code == 2 and err.splitlines()[-1].startswith(f"error: {hub.parent / 'odd'} holds no safetensors files")


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        (generate, ["--prompt", "a", "--chat", "b"], "--prompt and --chat are two ways to ask"),
        (generate, ["--system", "a"], "--system is the first message of a conversation"),
        (generate, ["--json"], "--json is for --logprobs"),
        (evaluate, ["--files", "a", "--task", "b"], "--files, --choices and --task are three evaluations"),
        (evaluate, ["--choices", "/nowhere"], "/nowhere must be a file of questions"),
        (evaluate, ["--task", "a", "b"], "--task takes a name and then option=value words, got 'b'"),
        (evaluate, ["--rows", "0"], "--rows must be at least 1, got 0"),
        (score, [], "what to score must be given with --text or with --file"),
        (score, ["--file", "a", "--given", "b"], "--given is the context of a --text"),
        (score, ["--file", "/nowhere"], "--file must be a file to read"),
    ],
)
def test_bad_words_are_named_before_a_model_is_read(program, words, message, capsys):
    code, out, err = call(program, capsys, "/no/model", *words)
    assert (code, out) == (2, "") and err.startswith(f"error: {message}")


def test_a_conversation_has_turns():
    turns = generate.conversation(["q", "a", "r"], "s")
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"),
    ]  # fmt: skip
    with pytest.raises(cli.ConfigError, match="an odd number of them, got 2"):
        generate.conversation(["q", "a"], None)


@pytest.mark.parametrize("program", [evaluate, score])
def test_help_is_for_a_person(program, capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    assert {"examples:", "exit codes:"} <= set(
        capsys.readouterr().out.replace("exit codes: ", "exit codes:\n").split("\n")
    )


@pytest.mark.slow
def test_it_writes_the_same_from_either_directory(hub, run, capsys):
    trained = open_model(hub, say=lambda line: None)
    options = ["--temperature", 0, "--max-new-tokens", 6, "--logprobs", 2, "--json"]
    code, asked, err = call(generate, capsys, hub, "--prompt", "in the", *options)
    assert code == 0, err
    assert call(generate, capsys, run, "--prompt", "in the", *options)[1] == asked
    (answer,) = json.loads(asked)
    ids = [token["id"] for token in answer["tokens"]]
    assert [ids] == generate_ids(trained.model, [[1, 2]], 6, stop=(0, 7))
    assert all(token["top"][0]["id"] == token["id"] for token in answer["tokens"])
    # A conversation is the template's: <user> was <model>
    code, out, err = call(generate, capsys, hub, "--chat", "was", *options)
    assert code == 0, err
    (answer,) = json.loads(out)
    assert [[t["id"] for t in answer["tokens"]]] == generate_ids(trained.model, [[7, 4, 8]], 6, stop=(0, 7))
    code, out, err = call(generate, capsys, hub, "--prompt", "in the", *options[:-1])
    assert code == 0 and "token" in out and "likeliest" in out


@pytest.mark.slow
def test_it_scores_the_same_in_every_program(hub, run, capsys, tmp_path):
    code, out, err = call(score, capsys, hub, "--given", "in the", "--text", " beginning was", "--top", 3, "--json")
    assert code == 0, err
    part = json.loads(out)
    assert [token["text"] for token in part["tokens"]] == ["beginning", "was"]
    code, out, _ = call(score, capsys, run, "--text", "in the beginning was", "--json")
    whole = json.loads(out)
    # The whole text follows the start token, which a context of text does not.
    assert code == 0 and len(whole["tokens"]) == 4 and whole["bytes"] == 20
    assert whole["logprob"] == pytest.approx(-whole["bits_per_byte"] * 20 * math.log(2))
    assert call(score, capsys, run, "--text", "in the", "--top", 1)[1].startswith("token ")
    # The likelier of two words by score is the choice that evaluate makes.
    likelier = max(WORDS[1:7], key=lambda w: one(score, capsys, hub, w))
    other = next(word for word in WORDS[1:7] if word != likelier)
    line = {"context": "in the", "choices": [other, likelier], "answer": 1}
    (tmp_path / "choices.jsonl").write_text(json.dumps(line))
    code, out, err = call(evaluate, capsys, hub, "--choices", tmp_path / "choices.jsonl", "--json")
    assert code == 0 and json.loads(out)["acc"] == 1.0, err
    (tmp_path / "text.txt").write_text("in the beginning was a word")
    code, out, err = call(evaluate, capsys, run, "--files", tmp_path / "text.txt", "--json")
    assert code == 0 and json.loads(out)["tokens"] == 7, err
    code, out, err = call(evaluate, capsys, hub, "--task", "state_tracking", "length=24", "group=Z5", "--rows", 8)
    assert code == 0 and "accuracy" in out, err


def one(program, capsys, directory, word):
    code, out, _ = call(program, capsys, directory, "--given", "in the", "--text", f" {word}", "--json")
    assert code == 0
    return json.loads(out)["logprob"]
