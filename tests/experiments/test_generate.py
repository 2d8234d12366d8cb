"""The program writes what ``generate`` generates, as text, and refuses what it must."""

import contextlib
import io

import pytest

from experiments import cli, generate
from research.data.tokenization import ByteTokenizer
from research.inference import generate as generate_ids
from research.inference.sampling import make_sampling
from research.inference.text import UNKNOWN, Answer
from research.training.runs import load_for_inference
from tests.experiments.tiny import tiny_run


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(cli, "keep_compiled", lambda cache: None)


def run(*arguments):
    """Exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.call(generate.main, [str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
    return code, out.getvalue(), err.getvalue()


def test_it_writes_what_generate_generates():
    directory, prompts = tiny_run(), ["def ", "é"]
    trained = load_for_inference(directory)
    assert trained.step == 20
    ids = [[trained.tokenizer.start_id, *trained.tokenizer.encode(prompt)] for prompt in prompts]
    new = generate_ids(trained.model, ids, 40, 0.7, seed=3, stop=(trained.tokenizer.eos_id,))
    expected = "\n\n".join(prompt + trained.tokenizer.decode(row) for prompt, row in zip(prompts, new, strict=True))
    options = ["--max-new-tokens", 40, "--temperature", 0.7, "--seed", 3]
    code, out, err = run(directory, "--prompt", "def ", "--prompt", "é", *options)
    assert (code, out) == (0, expected + "\n")
    assert err.startswith(f"[{sum(map(len, new))} tokens in ")
    # Stop texts cut each continuation behind their first occurrence, and only there.
    first = trained.tokenizer.decode(new[0])
    stop = first[5:7]
    code, out, _ = run(trained.path, "--prompt", "def ", "--prompt", "é", *options, "--stop", stop)
    assert code == 0 and out.startswith("def " + first[: first.index(stop) + 2] + "\n\né")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "1.5"], "error: top_p must be None, or more than 0 and at most 1, got 1.5\n"),
        (["--temperature", "-1"], "error: temperature must be a number of at least 0, got -1.0\n"),
        (["--max-new-tokens", "0"], "error: max_new_tokens must be at least 1, got 0\n"),
        (["--top-k", "many"], "argument --top-k: invalid int value: 'many'"),
    ],
)
def test_bad_numbers_are_named(arguments, message):
    code, out, err = run(tiny_run(), "--prompt", "x", *arguments)
    assert code == 2 and message in err and not out


def test_no_run_no_text(tmp_path):
    code, out, err = run(tmp_path / "none", "--prompt", "x")
    assert (code, out) == (2, "")
    must_be = "it must be the work directory of a training run, or a Hugging Face model's directory\n"
    assert err == f"error: {tmp_path / 'none'} does not exist: {must_be}"
    code, _, err = run(tmp_path)
    assert (code, err) == (2, f"error: {tmp_path} holds no checkpoint: {must_be}")


def test_help_is_for_a_person():
    code, out, _ = run("--help")
    assert code == 0 and "examples:" in out and "exit codes:" in out


def test_text_waits_for_whole_characters_and_ends_behind_the_stop_text():
    row = Answer(ByteTokenizer(), ["ab", "é!"])
    assert [row.push([byte]) for byte in "aé".encode()] == ["a", "", "é"]
    assert row.push([*b"?", 300, 258, *"é".encode()]) == f"?{UNKNOWN}é" and not row.ended
    assert row.push(b"! and more") == "!" and row.ended
    assert row.push(b"more") == row.finish() == ""
    row = Answer(ByteTokenizer())
    assert row.push([0xC3]) == "" and row.finish() == UNKNOWN


def test_later_continuations_wait_for_the_earlier_ones(capsys):
    with generate.Page(["A", "B", "C"]) as page:
        page.write(1, "b", False)
        page.write(2, "c", True)
        page.write(0, "a", False)
        assert capsys.readouterr().out == "Aa"
        page.write(0, "a", True)
        assert capsys.readouterr().out == "a\n\nBb"
        page.write(1, "b", True)
        assert capsys.readouterr().out == "b\n\nCc"
    assert capsys.readouterr().out == "\n"


def test_a_model_does_not_steer_the_terminal():
    assert generate.visible("a\tb\n\x1b[2J\x07\x9bé") == "a\tb\n␛[2J␇\N{REPLACEMENT CHARACTER}é"


def test_speed_leaves_compilation_out():
    assert generate.speed([0, 1, 9, 17, 25], [5.0, 10.0, 20.0, 21.0, 22.0]) == (
        "[25 tokens in 22.0 s, 8 tokens/s once compiled]"
    )
    assert generate.speed([0, 1, 9], [5.0, 10.0, 20.0]) == "[9 tokens in 20.0 s]"


def test_the_default_sampling_is_valid():
    options = generate._parser().parse_args(["run"])
    make_sampling(options.temperature, options.top_k, options.top_p, options.min_p)
