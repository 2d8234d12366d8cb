"""The adapter for lm-evaluation-harness: its logic without the harness, and with it where it is installed."""

import json

import pytest

from experiments import cli, harness
from research.inference import text
from research.interop.opening import open_model
from tests.inference.test_text import known, model, published  # noqa: F401 (fixtures)
from tests.interop.checkpoints import golden, write_checkpoint
from tests.interop.tokenizer import write_tokenizer


def test_likelihoods(model, known):  # noqa: F811
    requests = harness.Requests(published(model))
    assert requests.loglikelihood([("c", "a"), ("a", "c"), ("", "ab")]) == [(-2.0, True), (-6.0, False), (-4.0, False)]
    assert requests.loglikelihood_rolling(["cab", ""]) == [-10.0, 0]


def test_writing_until(model, monkeypatch):  # noqa: F811
    asked = []

    def continue_texts(trained, prompts, stops, most, **sampling):
        asked.append((prompts, stops, most, sampling))
        return [str(prompt) for prompt in prompts]

    monkeypatch.setattr(text, "continue_texts", continue_texts)
    requests = harness.Requests(published(model, config={"max_position_embeddings": 12}), batch_size=2)
    greedy = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}
    drawn = {"until": "c", "temperature": 0.7, "top_p": 0.9, "do_sample": True}
    answers = requests.generate_until([("ccc", greedy), ("a", drawn), ("a", greedy), ("cccccccc", greedy)])
    assert answers == ["[0, 6, 6, 6]", "[2]", "[0, 2]", "[6, 6, 6, 6]"]
    assert asked == [
        ([[0, 2], [0, 6, 6, 6]], ("\n",), 8, {}),
        ([[6, 6, 6, 6]], ("\n",), 8, {}),
        ([[2]], ("c",), 256, {"temperature": 0.7, "top_p": 0.9}),
    ]
    with pytest.raises(ValueError, match=r"^generation options must be among temperature, top_k, top_p, min_p, got"):
        requests.generate_until([("a", {"penalty": 2})])


def test_without_the_harness_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert cli.call(harness.main, ["nowhere", "--tasks", "arc_easy"]) == 2
    assert capsys.readouterr().err.endswith("pip install '.[lm_eval]'\n")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_harness_itself(tmp_path, capsys, monkeypatch):
    """Tasks of our own, whose data lies here: accuracy, perplexity and writing, through ``simple_evaluate``."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    g = golden("qwen3")
    directory = write_checkpoint(tmp_path / "hub", g.hub, g.tensors)
    write_tokenizer(directory)
    rows = [{"context": "in the", "choices": ["beginning", "word"], "answer": n % 2} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = "dataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\n" % (
        tmp_path / "rows.jsonl"
    )
    tasks = {
        "own_choice": "output_type: multiple_choice\ndoc_to_text: context\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
        "own_text": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: context\n"
        "metric_list: [{metric: word_perplexity}]\n",
        "own_writing": "output_type: generate_until\ndoc_to_text: context\ndoc_to_target: context\n"
        "generation_kwargs: {until: ['was'], max_gen_toks: 4, do_sample: false}\nmetric_list: [{metric: exact_match}]\n",
    }
    for name, lines in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{common}{lines}")
    words = ["--tasks", ",".join(tasks), "--include-path", str(tmp_path), "--json"]
    assert cli.call(harness.main, [str(directory), *words]) == 0
    out = capsys.readouterr().out
    results = json.loads(out[out.index("{\n") :])["results"]
    requests = harness.Requests(open_model(directory, say=lambda line: None))
    chosen = requests.loglikelihood([("in the", " beginning"), ("in the", " word")])
    assert results["own_choice"]["acc,none"] == 0.5
    assert chosen[0][0] != chosen[1][0]
    (nats,) = requests.loglikelihood_rolling(["in the"])
    assert results["own_text"]["word_perplexity,none"] == pytest.approx(2.718281828459045 ** (-nats / 2), rel=1e-4)
    assert results["own_writing"]["exact_match,none"] == 0.0
    assert cli.call(harness.main, [str(directory), "--tasks", "no_such_task"]) == 2
