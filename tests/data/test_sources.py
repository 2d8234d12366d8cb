import json

import pytest

from research import config as configs
from research.data.pipeline import DataConfig
from research.data.sources import JsonLines, PythonStandardLibrary, TextFiles
from research.data.split import corpus_hash, split


@pytest.fixture(scope="module")
def library():
    return PythonStandardLibrary().open()


def test_standard_library_is_source_text_only(library):
    assert {"os.py", "json/decoder.py"} <= set(library.names)
    assert list(library.names) == sorted(set(library.names))
    for word in ("site-packages", "dist-packages", "__pycache__"):
        assert not any(word in name.split("/") for name in library.names)
    total = sum(len(library[i].decode()) for i in range(len(library)))
    assert total > 5_000_000


def test_standard_library_held_out_set(library):
    train, held_out = split(library.names, lambda i: len(library[i]), 1_000_000)
    assert sorted(train + held_out) == list(range(len(library)))
    assert 900_000 <= sum(len(library[i]) for i in held_out) <= 1_000_000
    assert len(held_out) >= 10


def test_two_openings_have_one_hash(library):
    assert PythonStandardLibrary().open().hash() == library.hash()


def test_split_depends_on_names_and_sizes_only():
    sizes = {f"file{i}": 1 + i % 7 for i in range(200)}
    names = list(sizes)
    chosen = {names[i] for i in split(names, lambda i: sizes[names[i]], 100)[1]}
    names.reverse()
    train, held_out = split(names, lambda i: sizes[names[i]], 100)
    assert {names[i] for i in held_out} == chosen and not set(train) & set(held_out)
    assert 90 <= sum(sizes[name] for name in chosen) <= 100


def test_split_passes_over_documents_that_would_be_the_set():
    sizes = [90, *[5] * 50]
    assert 0 not in split([f"d{i}" for i in range(51)], sizes.__getitem__, 100)[1]


@pytest.mark.parametrize(("held_out_bytes", "words"), [(10, "quarter"), (10_000, "lower it, or set it to 0")])
def test_split_that_cannot_be_made(held_out_bytes, words):
    with pytest.raises(configs.ConfigError, match=words):
        split(["a", "b"], lambda i: 100, held_out_bytes)


def test_no_held_out_set():
    assert split(["a", "b"], lambda i: 100, 0) == ([0, 1], [])


def test_corpus_hash_is_of_names_and_contents():
    same = corpus_hash(["a", "b"], [b"1", b"2"])
    assert same == corpus_hash(["b", "a"], [b"2", b"1"])
    assert len({same, corpus_hash(["a", "c"], [b"1", b"2"]), corpus_hash(["a", "b"], [b"2", b"1"])}) == 3


def test_text_files_are_named_apart_from_where_they_lie(tmp_path, monkeypatch):
    for place in ("here", "there/deep"):
        folder = tmp_path / place / "books"
        (folder / "sub").mkdir(parents=True)
        (folder / "b.txt").write_text("second")
        (folder / "sub" / "a.txt").write_text("naïve", "utf-8")
        (folder / "empty.txt").write_text("")
        (folder / "other.md").write_text("no")
    opened = [TextFiles((str(tmp_path / place / "books" / "**" / "*.txt"),)).open() for place in ("here", "there/deep")]
    for documents in opened:
        assert documents.names == ("books/b.txt", "books/sub/a.txt")
        assert [documents[0], documents[1]] == [b"second", "naïve".encode()]
    assert opened[0].hash() == opened[1].hash()
    monkeypatch.chdir(tmp_path / "here" / "books")
    assert TextFiles(("*.txt", "b.txt")).open().names == ("b.txt",)  # found twice, read once


def test_encodings(tmp_path):
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    path = (str(tmp_path / "latin.txt"),)
    with pytest.raises(configs.ConfigError, match=r"latin\.txt is not utf-8 text .* set data\.source\.encoding"):
        TextFiles(path).open()
    with pytest.raises(configs.ConfigError, match=r"data\.source\.encoding is 'klingon'"):
        TextFiles(path, encoding="klingon").open()
    assert TextFiles(path, encoding="latin-1").open()[0] == "naïve".encode()
    assert TextFiles(path, encoding="binary").open()[0] == "naïve".encode("latin-1")


def test_json_lines(tmp_path):
    lines = [{"text": "one"}, {"text": ""}, {"text": "z\ud800", "other": 1}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    documents = JsonLines((str(tmp_path / "*.jsonl"),)).open()
    assert documents.names[0].endswith("/a.jsonl:1") and documents.names[1].endswith("/a.jsonl:5")
    assert documents[0] == b"one" and documents[1].startswith(b"z")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{oops", "line 2, must be one JSON object"),
        ('{"body": "x"}', "got fields body"),
        ('{"text": 3}', "got int 3"),
        ("[1]", "got list"),
    ],
)
def test_json_lines_that_are_not(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(configs.ConfigError, match=words):
        JsonLines((str(tmp_path / "a.jsonl"),)).open()


@pytest.mark.parametrize("kind", [TextFiles, JsonLines])
def test_nothing_to_read(tmp_path, kind):
    with pytest.raises(configs.ConfigError, match=f"paths is empty: {kind.__name__} needs"):
        kind().open()
    with pytest.raises(FileNotFoundError, match=r"'.*gone' does not exist; it must be a file or a glob"):
        kind((str(tmp_path / "gone"),)).open()
    with pytest.raises(FileNotFoundError, match="matches no file"):
        kind((str(tmp_path / "*.txt"),)).open()
    with pytest.raises(FileNotFoundError, match="is a directory"):
        kind((str(tmp_path),)).open()
    (tmp_path / "empty").write_text("")
    with pytest.raises(configs.ConfigError, match="holds no text"):
        kind((str(tmp_path / "empty"),)).open()


def test_two_files_with_one_name(tmp_path):
    for place in ("x/books", "y/books"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.txt").write_text(place)
    with pytest.raises(configs.ConfigError, match=r"two documents named 'books/a\.txt'"):
        TextFiles(tuple(str(tmp_path / place / "*.txt") for place in ("x/books", "y/books"))).open()


@pytest.mark.parametrize(
    ("field", "value", "least"),
    [("sequence_length", 1, 2), ("batch_size", 0, 1), ("held_out_bytes", -1, 0), ("workers", -1, 0), ("seed", -1, 0)],
)
def test_config_out_of_range(field, value, least):
    with pytest.raises(configs.ConfigError, match=rf"data\.{field} is {value}: it must be at least {least}"):
        DataConfig(**{field: value})


def test_config_travels_as_json_and_takes_overrides():
    config = configs.override(DataConfig(), "source=JsonLines")
    config = configs.override(config, "source.paths=a.jsonl,b/*.jsonl")
    config = configs.override(config, "tokenizer=BytePairEncoding")
    config = configs.override(config, "tokenizer.vocab_size=512")
    assert config.source == JsonLines(("a.jsonl", "b/*.jsonl")) and config.tokenizer.vocab_size == 512
    assert configs.from_json(DataConfig, configs.to_json(config)) == config
