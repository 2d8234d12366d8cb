import dataclasses
import itertools

import grain
import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from research.config import ConfigError
from research.data import pipeline
from research.data.pipeline import Corpus, DataConfig, build_held_out, build_loader, open_corpus
from research.data.sources import TextFiles
from research.data.tokenization import BytePairEncoding, TokenizerJson, tokenizer_from_json
from tests.data.test_tokenization import huggingface_file


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma\n", "δέλτα", "return", "    "]
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(" ".join(rng.choice(words, 5 + i * 3)), "utf-8")
    source = TextFiles((str(folder / "*.txt"),))
    return DataConfig(source, sequence_length=32, batch_size=8, held_out_bytes=6000, seed=5)


@pytest.fixture(scope="module")
def corpus(config) -> Corpus:
    return open_corpus(config)


def take(dataset, count):
    iterator = iter(dataset)
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def test_batches_have_the_promised_shapes_and_types(corpus):
    (batch,) = take(build_loader(corpus), 1)
    assert {name: (column.shape, column.dtype.name) for name, column in batch.items()} == {
        "inputs_BT": ((8, 32), "int32"),
        "targets_BT": ((8, 32), "int32"),
        "segment_ids_BT": ((8, 32), "int32"),
        "positions_BT": ((8, 32), "int32"),
        "loss_mask_BT": ((8, 32), "bool"),
    }


def test_an_epoch_is_all_training_text_once_and_the_next_in_another_order(corpus):
    one_row = dataclasses.replace(corpus, config=dataclasses.replace(corpus.config, batch_size=1))
    rows = -(-corpus.tokens // 32)
    batches = take(build_loader(one_row), 2 * rows)
    epochs = batches[:rows], batches[rows:]
    for epoch in epochs:
        assert sum(int(batch["loss_mask_BT"].sum()) for batch in epoch) == corpus.tokens
    in_order = [[batch["targets_BT"].tobytes() for batch in epoch] for epoch in epochs]
    assert in_order[0] != in_order[1] and sorted(in_order[0]) == sorted(in_order[1])


def test_held_out_documents_are_never_in_training(corpus):
    offsets = corpus.train.offsets
    held_out = set(corpus.held_out_documents)
    assert held_out
    for i in range(len(corpus.train)):
        ids = corpus.train.ids[offsets[i] + 1 : offsets[i + 1] - 1]
        assert corpus.tokenizer.decode_bytes(ids) not in held_out


def test_the_seed_decides(corpus):
    other = dataclasses.replace(corpus, config=dataclasses.replace(corpus.config, seed=6))
    first, again, different = (take(build_loader(c), 3) for c in (corpus, corpus, other))
    np.testing.assert_equal(again, first)
    assert not np.array_equal(first[0]["inputs_BT"], different[0]["inputs_BT"])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batches_of_one(corpus, count):
    rows = -(-corpus.tokens // 32)
    steps = 2 * rows // 8  # across the end of an epoch, which no number of processes divides
    whole = take(build_loader(corpus), steps)
    parts = [take(build_loader(corpus, process_index=i, process_count=count), steps) for i in range(count)]
    for step, batch in enumerate(whole):
        for name, column in batch.items():
            dealt = np.stack([part[step][name] for part in parts], 1).reshape(column.shape)
            np.testing.assert_array_equal(dealt, column)


def test_output_after_checkpoint(corpus):
    limited = grain.experimental.LimitIterDataset(build_loader(corpus), 12)
    grain.experimental.assert_equal_output_after_checkpoint(limited)


def test_orbax_resumes_in_the_next_epoch(corpus, tmp_path):
    """Through a real checkpoint, far enough for the second epoch, beside an array as in training."""
    skipped = corpus.tokens // 32 // 8 + 3
    iterator = iter(build_loader(corpus))
    for _ in range(skipped):
        next(iterator)
    ocp.save_checkpointables(tmp_path / "checkpoint", {"state": {"w": jax.numpy.ones(3)}, "data": iterator})
    expected = list(itertools.islice(iterator, 5))
    fresh = iter(build_loader(corpus))
    next(fresh)
    ocp.load_checkpointables(tmp_path / "checkpoint", {"data": fresh})
    np.testing.assert_equal(list(itertools.islice(fresh, 5)), expected)
    iterator.close()
    fresh.close()


@pytest.mark.slow
def test_workers_change_nothing(corpus):
    with_workers = dataclasses.replace(corpus, config=dataclasses.replace(corpus.config, workers=2, prefetch=4))
    expected = take(build_loader(corpus), 7)
    iterator = iter(build_loader(with_workers))
    np.testing.assert_equal(list(itertools.islice(iterator, 4)), expected[:4])
    state = iterator.get_state()
    iterator.close()
    resumed = iter(build_loader(with_workers))
    resumed.set_state(state)
    np.testing.assert_equal(list(itertools.islice(resumed, 3)), expected[4:])
    resumed.close()


@pytest.mark.parametrize("overlap", [0, 12])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_held_out_bytes_are_scored_once(config, tokenizer, overlap):
    if tokenizer == "bpe":
        config = dataclasses.replace(config, tokenizer=BytePairEncoding(vocab_size=300))
    corpus = open_corpus(config)
    batches = [
        [build_held_out(corpus, batch_size=6, overlap=overlap, process_index=i, process_count=2)[s] for i in range(2)]
        for s in range(len(build_held_out(corpus, batch_size=6, overlap=overlap)))
    ]
    targets = [ids for pair in batches for b in pair for ids in b["targets_BT"][b["loss_mask_BT"]]]
    assert targets.count(corpus.tokenizer.eos_id) == len(corpus.held_out_names)
    assert sum(len(corpus.tokenizer.decode_bytes([i])) for i in targets) == corpus.held_out_bytes
    for batch in itertools.chain(*batches):
        assert batch["inputs_BT"].shape == (3, 32)
        assert not batch["loss_mask_BT"][batch["segment_ids_BT"] == 0].any()
    assert corpus.held_out_bytes == sum(map(len, corpus.held_out_documents))
    assert 4500 <= corpus.held_out_bytes <= 6000


def test_bpe_is_trained_without_the_held_out_documents(config, monkeypatch):
    seen = []
    train = pipeline.build_tokenizer
    monkeypatch.setattr(
        pipeline, "build_tokenizer", lambda c, documents=(): seen.extend(documents) or train(c, documents)
    )
    corpus = open_corpus(dataclasses.replace(config, tokenizer=BytePairEncoding(vocab_size=300)))
    assert seen and not set(seen) & set(corpus.held_out_documents)


def test_the_cache_is_used_and_mended(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, tokenizer=BytePairEncoding(vocab_size=300))
    first = open_corpus(config, cache=tmp_path / "cache")
    files = sorted((tmp_path / "cache").iterdir())
    assert [file.name.split("-")[0] for file in files] == ["held_out", "tokenizer", "train"]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "build_tokenizer", None)  # a second start builds nothing
        patch.setattr(type(first.tokenizer), "encode", None)
        second = open_corpus(config, cache=tmp_path / "cache")
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    mended = open_corpus(config, cache=tmp_path / "cache")
    for other in (second, mended):
        np.testing.assert_array_equal(other.train.ids, first.train.ids)
        assert other.tokenizer.to_json() == first.tokenizer.to_json()


def test_another_corpus_is_not_read_from_the_cache(config, tmp_path):
    first = open_corpus(config, cache=tmp_path)
    other = open_corpus(dataclasses.replace(config, held_out_bytes=3000), cache=tmp_path)
    assert other.hash == first.hash and other.tokens > first.tokens


def test_the_tokenizer_of_a_checkpoint_is_taken(config):
    tokenizer = open_corpus(dataclasses.replace(config, tokenizer=BytePairEncoding(vocab_size=300))).tokenizer
    corpus = open_corpus(config, tokenizer=tokenizer_from_json(tokenizer.to_json()))
    assert corpus.tokenizer.vocab_size == 300 and int(corpus.train.ids.max()) < 300


def test_batches_that_processes_cannot_share(corpus):
    for build in (build_loader, build_held_out):
        with pytest.raises(ConfigError, match=r"data\.batch_size is 8: it must be a multiple of the 3 processes"):
            build(corpus, process_index=0, process_count=3)


def test_bytes_that_are_no_text_need_a_tokenizer_of_bytes(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\xff\x00" * 50)
    path = huggingface_file(tmp_path)
    config = DataConfig(TextFiles((str(tmp_path / "a.bin"),), encoding="binary"), held_out_bytes=0)
    assert open_corpus(config).tokens == 101
    with pytest.raises(ConfigError, match=r"encodes UTF-8 text only, and .*/a\.bin is not"):
        open_corpus(dataclasses.replace(config, tokenizer=TokenizerJson(path, eos="</s>")))


def test_no_held_out_set_to_evaluate_on(config):
    corpus = open_corpus(dataclasses.replace(config, held_out_bytes=0))
    with pytest.raises(ConfigError, match="there is no held-out set"):
        build_held_out(corpus)
