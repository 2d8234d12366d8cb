import dataclasses
import pickle

import numpy as np
import pytest

from research.config import ConfigError
from research.data.pipeline import DataConfig, build_held_out, build_loader, open_corpus
from research.data.sources import TextFiles
from research.data.token_records import TokenArrayRecords, write_token_records
from research.data.tokenization import BytePairEncoding, ByteTokenizer

TEXTS = {f"d{i:02}": (f"document {i} says " + "very " * (i * 7 % 23)).encode() for i in range(40)}


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "texts.array_record"
    assert write_token_records(path, ByteTokenizer().encode_batch(list(TEXTS.values()))) == 40
    return path


def test_tokens_come_back(records):
    documents = TokenArrayRecords((str(records),)).open()
    assert len(documents) == 40 and documents.names[17].endswith("/texts.array_record:17")
    for i, text in enumerate(TEXTS.values()):
        assert documents[i].dtype == np.uint16 and bytes(documents[i].tolist()) == text
    assert documents.lengths_N.tolist() == [len(text) for text in TEXTS.values()]
    assert bytes(pickle.loads(pickle.dumps(documents))[3].tolist()) == TEXTS["d03"]


def test_a_file_without_index_is_read_through(records):
    with_index = TokenArrayRecords((str(records),)).open()
    records.with_name(records.name + ".index.npz").unlink()
    without = TokenArrayRecords((str(records),)).open()
    assert with_index.hash() == without.hash() and with_index.lengths_N.tolist() == without.lengths_N.tolist()


def test_same_batches_as_from_the_text(records, tmp_path):
    """One document's ids reach the same places whether they were made before or at the start."""
    for name, text in TEXTS.items():
        (tmp_path / f"{name}.txt").write_bytes(text)
    common = DataConfig(sequence_length=16, batch_size=4, held_out_bytes=0)
    of_text = open_corpus(dataclasses.replace(common, source=TextFiles((str(tmp_path / "*.txt"),))))
    of_records = open_corpus(dataclasses.replace(common, source=TokenArrayRecords((str(records),))))
    streams = zip(iter(build_loader(of_text)), iter(build_loader(of_records)), range(20), strict=False)
    for expected, batch, _ in streams:
        np.testing.assert_equal(batch, expected)


def test_held_out_bytes_of_records(records):
    corpus = open_corpus(DataConfig(TokenArrayRecords((str(records),)), held_out_bytes=400, sequence_length=16))
    assert 300 <= corpus.held_out_bytes <= 400 and set(corpus.held_out_documents) <= set(TEXTS.values())
    scored = sum(int(batch["loss_mask_BT"].sum()) for batch in build_held_out(corpus))
    assert scored == corpus.held_out_bytes + len(corpus.held_out_names)


def test_ids_of_another_tokenizer(tmp_path):
    path = tmp_path / "a.array_record"
    write_token_records(path, [[300, 1], [5]])
    corpus = open_corpus(DataConfig(TokenArrayRecords((str(path),)), sequence_length=2, held_out_bytes=0))
    with pytest.raises(ConfigError, match=r"a\.array_record:0 holds token id 300: data\.tokenizer has 259 ids"):
        corpus.train.read(0, 0, 2)


def test_what_cannot_be_read_or_written(tmp_path, records):
    with pytest.raises(ValueError, match=r"document 1 holds ids 1 … 70000: uint16 can't hold them all"):
        write_token_records(tmp_path / "b.array_record", [[1], [1, 70_000]])
    assert not (tmp_path / "b.array_record.index.npz").exists()
    (tmp_path / "other").write_bytes(b"not records")
    with pytest.raises(ConfigError, match="must be an ArrayRecord file"):
        TokenArrayRecords((str(tmp_path / "other"),)).open()
    write_token_records(tmp_path / "none.array_record", [])
    with pytest.raises(ConfigError, match="holds no tokens"):
        TokenArrayRecords((str(tmp_path / "none.array_record"),)).open()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TokenArrayRecords(("gone.array_record",)).open()
    with pytest.raises(ConfigError, match=r"trained on text, and data\.source is tokenised already"):
        open_corpus(DataConfig(TokenArrayRecords((str(records),)), BytePairEncoding()))
    index = records.with_name(records.name + ".index.npz")
    write_token_records(records, [[1]])
    held = index.read_bytes()
    write_token_records(records, ByteTokenizer().encode_batch(list(TEXTS.values())))
    index.write_bytes(held)
    with pytest.raises(ConfigError, match=r"was written for another texts\.array_record"):
        TokenArrayRecords((str(records),)).open()
    index.write_bytes(held[:50])
    with pytest.raises(ConfigError, match="must be an index that write_token_records wrote"):
        TokenArrayRecords((str(records),)).open()


def test_records_of_the_other_width(tmp_path):
    path = tmp_path / "a.array_record"
    write_token_records(path, [[1, 2, 3]], dtype="uint32")
    assert TokenArrayRecords((str(path),), dtype="uint32").open()[0].tolist() == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"holds uint32 ids: data\.source\.dtype must say so, not 'uint16'"):
        TokenArrayRecords((str(path),)).open()
