"""Text in and out of a model whose log-probabilities are known: what is read before, what is scored, where answers end."""

import json

import numpy as np
import pytest
import tokenizers

from configs.tiny import CONFIG
from research.config import ConfigError
from research.data.tokenization import ByteTokenizer, HuggingFaceTokenizer
from research.inference import text
from research.inference.choices import Question, multiple_choice, read_questions
from research.inference.scoring import Scores
from research.training.runs import Trained
from tests.inference.test_generation import random_model

WORDS = ["<s>", "</s>", "a", "b", "ab", " ", "c"]


@pytest.fixture(scope="module")
def model():
    return random_model()


def library(special: bool) -> str:
    """A tokenizer.json that begins a text with <s>, or adds nothing."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(WORDS)}, [("a", "b")]))
    made.decoder = tokenizers.decoders.Fuse()
    made.add_special_tokens(["<s>", "</s>"])
    if special:
        made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return made.to_str()


def published(model, special=True, config=None, path="nowhere", **texts) -> Trained:
    tokenizer = HuggingFaceTokenizer(library(special), 0 if special else None, 1, None)
    about = {"config": config or {}, "texts": texts}
    return Trained(model, tokenizer, CONFIG, 0, "", path, about)


@pytest.fixture
def known(monkeypatch):
    """Every token has log-probability −id; the rows that were asked for are kept."""
    asked = []

    def score(model, rows, given=1, *, top=0, batch_size=8, progress=None):
        given = [given] * len(rows) if isinstance(given, int) else given
        asked.extend((list(row), first) for row, first in zip(rows, given, strict=True))
        ids = [np.array(row[first:], int) for row, first in asked[-len(rows) :]]
        return [Scores(-1.0 * i, i < 3, np.zeros((len(i), 0), int), np.zeros((len(i), 0))) for i in ids]

    monkeypatch.setattr(text, "score", score)
    return asked


def test_what_is_read_before(model):
    here = Trained(model, ByteTokenizer(), CONFIG, 3, "hash", "run")
    assert text.prompt_ids(here, b"\xffa") == [257, 255, 97]
    assert text.prompt_ids(published(model), "ab") == [0, 4]
    assert text.prompt_ids(published(model), "<s>ab") == [0, 4], "a conversation begins with BOS already"
    assert text.prompt_ids(published(model, special=False), "ab") == [4]
    assert text.prompt_ids(published(model, special=False), "") == [1], "the GPT-2 convention"


def test_a_conversation_is_the_templates(model):
    template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}{{ 'b' if add_generation_prompt }}"
    told = json.dumps({"bos_token": "<s>"})
    trained = published(model, **{"chat_template.jinja": template, "tokenizer_config.json": told})
    messages = [{"role": "system", "content": "c"}, {"role": "user", "content": "ab"}]
    assert text.chat_text(trained, messages) == "<s>c<s>abb"
    assert text.chat_ids(trained, messages) == [0, 6, 0, 4, 3]
    for without in (published(model), Trained(model, ByteTokenizer(), CONFIG, 3, "hash", "run")):
        with pytest.raises(ValueError, match=r"^the model has no chat template: it must come from a Hugging Face"):
            text.chat_ids(without, messages)


def test_what_ends_an_answer(model):
    assert text.stop_ids(Trained(model, ByteTokenizer(), CONFIG, 3, "hash", "run")) == ()  # 258 is beyond the model
    assert text.stop_ids(published(model)) == (1,)
    generation = json.dumps({"eos_token_id": [5, 300, 2]})
    assert text.stop_ids(published(model, config={"eos_token_id": 6}, **{"generation_config.json": generation})) == (
        1, 2, 5, 6,
    )  # fmt: skip


def test_continuations_are_cut_as_the_harness_cuts_them(model, known):
    short = {"max_position_embeddings": 4}
    pairs = [("a", "b"), ("c ", "a"), ("", "ab"), ("cccccc", "ab"), ("a", "cccccc")]
    scored = text.score_continuations(published(model, config=short), pairs)
    # "a" + "b" is one token: of the whole, what lies past the context's tokens is scored.
    assert known[0] == ([0, 4], 2) and scored[0].ids == []
    assert known[1] == ([0, 6, 5, 2], 2), "spaces at the end of a context belong to the continuation"
    assert known[2] == ([0, 4], 1)
    assert known[3] == ([6, 6, 6, 6, 4], 4), "a context too long for the model loses its beginning"
    assert known[4] == ([2, 6, 6, 6, 6, 6, 6], 1), "what is scored is never cut"
    assert [part.scores.total for part in scored[1:4]] == [-7.0, -4.0, -4.0]
    text.score_continuations(published(model, special=False), [("", "ab")])
    assert known[-1] == ([1, 4], 1)


def test_long_texts_are_scored_in_pieces(model, known):
    trained = published(model, config={"max_position_embeddings": 4})
    (long, short) = text.score_texts(trained, ["cacbcacb", ""], overlap=1)
    assert short == [] and [len(part.ids) for part in long] == [4, 3, 1]
    assert sum((part.ids for part in long), []) == [6, 2, 6, 3, 6, 2, 6, 3]  # noqa: RUF017
    assert known[0] == ([0, 6, 2, 6, 3], 1) and known[1] == ([6, 3, 6, 2, 6], 2)


def test_accuracies_by_hand(model, known):
    """−id a token: a 2, b 3, c 6, a space 5; the delimiter's 5 is in every choice, and not in its length."""
    questions = [
        Question("c", ("a", "cc"), 0),  # −7, −17; a character −7, −8.5
        Question("c", ("b", "aaaa"), 1),  # −8, −13; a character −8, −3.25
        Question("c", ("aa", "a"), 0, delimiter=""),  # −4, −2; a character −2 each: the first of equals
    ]
    result = multiple_choice(published(model), questions)
    assert (result["acc"], result["acc_norm"], result["acc_bytes"]) == pytest.approx((1 / 3, 1.0, 1.0))
    assert result["acc_stderr"] == pytest.approx(1 / 3) and result["questions"] == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2, is not JSON"),
        ('{"context": "x"}', "line 2, must be an object with context, choices and answer, got"),
        ('{"context": "x", "choices": ["a"], "answer": 0}', "line 2, must hold at least two choices"),
        ('{"context": "x", "choices": ["a", ""], "answer": 0}', "line 2, must hold at least two choices"),
        ('{"context": "x", "choices": ["a", "b"], "answer": "a"}', "must hold as answer the index of a choice, 0 to 1"),
        ('{"context": 1, "choices": ["a", "b"], "answer": 1}', "line 2, must hold texts as context and delimiter"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, message):
    file = tmp_path / "questions.jsonl"
    good = {"context": "x", "choices": ["a", "b"], "answer": 1, "source": "ignored"}
    file.write_text(json.dumps(good) + "\n")
    assert read_questions(file) == [Question("x", ("a", "b"), 1)]
    file.write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(ConfigError, match=message):
        read_questions(file)


def test_a_file_without_questions(tmp_path):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="empty holds no question"):
        read_questions(tmp_path / "empty")
    with pytest.raises(ConfigError, match="must be a file of questions"):
        read_questions(tmp_path / "nowhere")


def test_answers_end_before_their_stop_texts(model, monkeypatch):
    blocks = [[[2], [4]], [[6, 3, 2], [2, 2, 2]], [[6, 6, 6], []]]
    monkeypatch.setattr(text, "stream", lambda model, prompts, most, stop, **sampling: iter(blocks))
    assert text.continue_texts(published(model), [[0], [0]], ["ba", "?"]) == ["ac", "abaaa"[: "abaaa".index("ba")]]
