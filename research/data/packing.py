"""Rows of exactly T tokens out of documents of any length, by random access.

A document is the stream START t₁ … tₙ EOS. Position i of it has stream[i] as input and stream[i+1] as target, so a
document has as many positions as tokens and EOS together, and cutting it anywhere loses none. It is cut into pieces of
at most T positions. Whole pieces (T positions) are rows of their own; the shorter ones, one a document, are
concatenated in a shuffled order and split every T positions. Rows are therefore full, save one.

The plan is made from the lengths alone, which gives what ``grain.experimental.ConcatThenSplitIterDataset`` (a stream)
can't: row i is read without the rows before it. Rows of one long document are then shuffled apart, the position in the
data is one integer, resuming costs nothing, and neither the number of processes nor of workers changes the batches.
"""

from collections.abc import Callable, Sequence

import numpy as np

from research.data.tokenization import Tokenizer


class TokenStreams:
    """Documents as streams of ids: START t₁ … tₙ EOS, each read in any part.

    Attributes:
      positions_N: int64, inputs (or targets) of each document: its tokens and EOS.
    """

    def __init__(self, positions_N: np.ndarray, read: Callable[[int, int, int], np.ndarray]):
        self.positions_N = positions_N
        self._read = read

    def __len__(self) -> int:
        return len(self.positions_N)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Ids ``start … stop − 1`` of the stream of ``document``."""
        return self._read(document, start, stop)


class InMemoryStreams(TokenStreams):
    """Streams of documents tokenised up front, end to end in one array of the smallest sufficient type."""

    def __init__(self, ids: np.ndarray, offsets: np.ndarray):
        self.ids, self.offsets = ids, offsets
        super().__init__(np.diff(offsets) - 1, self._slice)

    @classmethod
    def from_documents(cls, documents: Sequence[bytes], tokenizer: Tokenizer) -> "InMemoryStreams":
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        streams = [
            np.concatenate([[tokenizer.start_id], ids, end]).astype(dtype) for ids in tokenizer.encode_batch(documents)
        ]
        offsets = np.cumsum([0] + [len(stream) for stream in streams], dtype=np.int64)
        return cls(np.concatenate(streams) if streams else np.zeros(0, dtype), offsets)

    def _slice(self, document: int, start: int, stop: int) -> np.ndarray:
        base = self.offsets[document]
        return self.ids[base + start : base + stop]


class Rows:
    """A random-access sequence of packed rows: a Grain data source.

    ``rows[i]`` is a dict whose names carry the axes they have once batched:
      ``inputs_BT``, ``targets_BT``: int32 ids; target t is the id that follows input t in its document.
      ``segment_ids_BT``: int32, pieces of documents, numbered from 1 in each row; 0 is padding (only in the last row).
      ``positions_BT``: int32, restart at 0 with every segment.
      ``loss_mask_BT``: bool, whether the target counts: every target of every document once over all rows, EOS included
        (what ends a document is predicted; what begins one never is).

    Args:
      streams: the documents.
      length: T, positions of a row.
      overlap: positions of a long document that its next piece repeats as context, out of the loss; 0 for training.
      seed: order of the short pieces.
      fill_id: the id at padding.
    """

    def __init__(self, streams: TokenStreams, length: int, *, overlap: int = 0, seed: int = 0, fill_id: int = 0):
        if not 0 <= overlap < length:
            raise ValueError(f"overlap is {overlap}: it must be at least 0 and less than the row length {length}")
        self._streams, self._length, self.fill_id = streams, length, fill_id
        positions_N = np.asarray(streams.positions_N, np.int64)
        step = length - overlap
        pieces_N = np.where(positions_N > 0, 1 + np.maximum(0, -((length - positions_N) // step)), 0)
        document = np.repeat(np.arange(len(positions_N)), pieces_N)
        rank = np.arange(len(document)) - np.repeat(np.cumsum(pieces_N) - pieces_N, pieces_N)
        start = rank * step
        size = np.minimum(length, positions_N[document] - start)
        context = np.where(rank > 0, overlap, 0)
        whole = np.flatnonzero(size == length)
        short = np.random.default_rng(seed).permutation(np.flatnonzero(size < length))
        order = np.concatenate([whole, short])
        self._document, self._start, self._context = document[order], start[order], context[order]
        self._ends = np.cumsum(size[order])
        self._whole = len(whole)

    def __len__(self) -> int:
        total = int(self._ends[-1]) if len(self._ends) else 0
        return -(-total // self._length)

    def __repr__(self) -> str:
        return f"Rows({len(self)} of {self._length})"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        T = self._length
        row = {
            "inputs_BT": np.full(T, self.fill_id, np.int32),
            "targets_BT": np.full(T, self.fill_id, np.int32),
            "segment_ids_BT": np.zeros(T, np.int32),
            "positions_BT": np.zeros(T, np.int32),
            "loss_mask_BT": np.zeros(T, np.bool_),
        }
        # A piece fills the places from the end of the piece before it to its own; a row takes what falls within it.
        first, last = index * T, (index + 1) * T
        piece = index if index < self._whole else int(np.searchsorted(self._ends, first, side="right"))
        filled, segment = 0, 1
        while filled < T and piece < len(self._ends):
            begin = int(self._ends[piece - 1]) if piece else 0
            skipped = first + filled - begin
            count = min(int(self._ends[piece]), last) - (first + filled)
            start = int(self._start[piece]) + skipped
            ids = self._streams.read(int(self._document[piece]), start, start + count + 1)
            here = slice(filled, filled + count)
            row["inputs_BT"][here], row["targets_BT"][here] = ids[:-1], ids[1:]
            row["segment_ids_BT"][here] = segment
            row["positions_BT"][here] = np.arange(count)
            row["loss_mask_BT"][here] = np.arange(skipped, skipped + count) >= self._context[piece]
            filled, segment, piece = filled + count, segment + 1, piece + 1
        return row
