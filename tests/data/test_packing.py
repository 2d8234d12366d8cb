import itertools

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data.packing import InMemoryStreams, Rows
from research.data.tokenization import ByteTokenizer

TOKENIZER = ByteTokenizer()


def streams_of(lengths):
    rng = np.random.default_rng(sum(lengths))
    documents = [rng.integers(0, 256, length, np.uint8).tobytes() for length in lengths]
    return documents, InMemoryStreams.from_documents(documents, TOKENIZER)


def scored(rows):
    """Every (previous id, target) under the mask, over all rows, as a sorted list."""
    pairs = []
    for i in range(len(rows)):
        row = rows[i]
        mask = row["loss_mask_BT"]
        pairs += zip(row["inputs_BT"][mask].tolist(), row["targets_BT"][mask].tolist(), strict=True)
    return sorted(pairs)


def expected_pairs(documents):
    whole = [[TOKENIZER.bos_id, *document, TOKENIZER.eos_id] for document in documents]
    return sorted(pair for ids in whole for pair in itertools.pairwise(ids))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=12),
    length=st.integers(2, 17),
    overlap_share=st.sampled_from([0, 0.3, 0.9]),
)
def test_every_target_counts_once_and_rows_are_full(lengths, length, overlap_share):
    documents, streams = streams_of(lengths)
    rows = Rows(streams, length, overlap=int(length * overlap_share), fill_id=7)
    assert scored(rows) == expected_pairs(documents)
    for i in range(len(rows)):
        row = rows[i]
        ids, positions = row["segment_ids_BT"], row["positions_BT"]
        full = np.count_nonzero(ids)
        assert full == length or i == len(rows) - 1
        assert full > 0 and (ids[full:] == 0).all() and (row["inputs_BT"][full:] == 7).all()
        assert not row["loss_mask_BT"][full:].any() and not positions[full:].any()
        steps = np.diff(ids[:full])
        assert ids[0] == 1 and set(steps) <= {0, 1}
        starts = np.flatnonzero(np.r_[1, steps])
        np.testing.assert_array_equal(positions[:full], np.arange(full) - np.repeat(starts, np.diff([*starts, full])))
        same = steps == 0  # within a segment the target is the next input
        np.testing.assert_array_equal(row["targets_BT"][: full - 1][same], row["inputs_BT"][1:full][same])


def test_rows_are_what_grain_concatenates_then_splits():
    """Whole pieces pass, short ones are concatenated and split: Grain's own packing of the same pieces, in one order."""
    length = 16
    _, streams = streams_of([40, 3, 16, 90, 7, 31, 12, 15, 1])
    rows = Rows(streams, length, seed=3)
    pieces = []
    for document, start, end, begin in zip(
        rows._document, rows._start, rows._ends, np.r_[0, rows._ends[:-1]], strict=True
    ):
        ids = streams.read(int(document), int(start), int(start + end - begin + 1)).astype(np.int32)
        pieces.append({"inputs": ids[:-1], "targets": ids[1:]})
    packed = grain.experimental.ConcatThenSplitIterDataset(
        grain.MapDataset.source(pieces).to_iter_dataset(), length_struct={"inputs": length, "targets": length}
    )
    by_grain = list(packed)
    assert len(by_grain) == len(rows)
    for i, expected in enumerate(by_grain):
        row = rows[i]
        np.testing.assert_array_equal(row["inputs_BT"], expected["inputs"])
        np.testing.assert_array_equal(row["targets_BT"], expected["targets"])
        np.testing.assert_array_equal(row["segment_ids_BT"], expected["inputs_segment_ids"])
        np.testing.assert_array_equal(row["positions_BT"], expected["inputs_positions"])


def test_long_documents_are_rows_of_one_segment():
    _, streams = streams_of([160])
    rows = Rows(streams, 16)
    assert len(rows) == 11 and all(rows[i]["segment_ids_BT"].tolist() == [1] * 16 for i in range(10))


def test_overlap_gives_later_pieces_context():
    documents, streams = streams_of([50])
    rows = Rows(streams, 20, overlap=5)
    row = rows[1]
    assert row["inputs_BT"].tolist() == list(documents[0][14:34])
    assert row["loss_mask_BT"].tolist() == [False] * 5 + [True] * 15


@pytest.mark.parametrize("overlap", [-1, 8])
def test_overlap_that_leaves_nothing_to_predict(overlap):
    with pytest.raises(ValueError, match=f"overlap is {overlap}: it must be"):
        Rows(streams_of([3])[1], 8, overlap=overlap)


def test_row_out_of_range():
    rows = Rows(streams_of([3])[1], 8)
    with pytest.raises(IndexError):
        rows[1]
