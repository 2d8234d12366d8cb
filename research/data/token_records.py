"""Documents that were tokenised before: ArrayRecord files with the ids of one document a record.

A record is the little-endian ids of a document without BOS and EOS (the loader adds them). Beside each file lies an
index (``FILE.index.npz``: the length of each record, and a hash) so that a run starts without reading the corpus.
:func:`write_token_records` writes both; a file from elsewhere, without an index, is read through once at each start.
"""

import dataclasses
import functools
import hashlib
import pathlib
import zipfile
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from grain.sources import ArrayRecordDataSource

from research.config import ConfigError
from research.data.packing import TokenStreams
from research.data.sources import expand_paths
from research.data.split import corpus_hash
from research.data.tokenization import Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenArrayRecords:
    """ArrayRecord files of token ids, one document a record; ``paths`` are files or globs. Named ``file:record``."""

    paths: tuple[str, ...] = ()
    dtype: Literal["uint16", "uint32"] = "uint16"

    def open(self) -> "TokenDocuments":
        """Raises FileNotFoundError (nothing at a path) or ConfigError (no records, not records of this dtype)."""
        return TokenDocuments(expand_paths(self.paths, "TokenArrayRecords"), np.dtype(self.dtype).newbyteorder("<"))


class TokenDocuments:
    """Token ids of documents, read from the disk when asked for."""

    def __init__(self, files: Sequence[tuple[str, pathlib.Path]], dtype: np.dtype):
        self._files, self._dtype = list(files), dtype
        indices = [_load_index(path, dtype) for _, path in self._files]
        self._digests = [digest for _, digest in indices]
        self.lengths_N = np.concatenate([lengths for lengths, _ in indices])
        if not self.lengths_N.any():
            raise ConfigError("data.source (TokenArrayRecords) holds no tokens: its files must hold a document each")
        self.names = [
            f"{name}:{i}" for (name, _), (lengths, _) in zip(files, indices, strict=True) for i in range(len(lengths))
        ]

    @functools.cached_property
    def _source(self) -> ArrayRecordDataSource:
        return ArrayRecordDataSource([str(path) for _, path in self._files])

    def __getstate__(self):  # open files don't travel to a worker: it opens its own
        return {name: value for name, value in self.__dict__.items() if name != "_source"}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.frombuffer(self._source[index], self._dtype)

    def hash(self) -> str:
        return corpus_hash([name for name, _ in self._files], self._digests)


class RecordStreams(TokenStreams):
    """The streams of chosen records: START t₁ … tₙ EOS."""

    def __init__(self, documents: TokenDocuments, chosen: Sequence[int], tokenizer: Tokenizer):
        self._documents, self._chosen = documents, np.asarray(chosen, np.int64)
        self._start, self._eos, self._vocab_size = tokenizer.start_id, tokenizer.eos_id, tokenizer.vocab_size
        super().__init__(documents.lengths_N[self._chosen] + (self._eos is not None), self._stream)

    def _stream(self, document: int, start: int, stop: int) -> np.ndarray:
        record = int(self._chosen[document])
        ids = self._documents[record]
        if len(ids) and int(ids.max()) >= self._vocab_size:
            raise ConfigError(
                f"{self._documents.names[record]} holds token id {ids.max()}: data.tokenizer has {self._vocab_size} ids, "
                f"so it is not the one this data was tokenised with"
            )
        end = [] if self._eos is None else [self._eos]
        return np.concatenate([[self._start], ids, end])[start:stop]


def write_token_records(path: str | pathlib.Path, documents: Iterable, *, dtype: str = "uint16") -> int:
    """Writes documents (sequences of ids, without BOS and EOS) to an ArrayRecord file and its index.

    ``write_token_records(path, tokenizer.encode_batch(texts))`` is the usual call; many files of some 100 MB make a
    corpus. Returns the number of documents.

    Raises:
      ValueError: an id that ``dtype`` can't hold.
    """
    path, little = pathlib.Path(path), np.dtype(dtype).newbyteorder("<")
    digest, lengths = hashlib.sha256(), []
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    try:
        for number, document in enumerate(documents):
            ids = np.asarray(document, np.int64)
            if len(ids) and not 0 <= ids.min() <= ids.max() <= np.iinfo(little).max:
                raise ValueError(f"document {number} holds ids {ids.min()} … {ids.max()}: {dtype} can't hold them all")
            record = ids.astype(little).tobytes()
            writer.write(record)
            digest.update(hashlib.sha256(record).digest())
            lengths.append(len(ids))
    finally:
        writer.close()
    _save_index(path, np.asarray(lengths, np.int64), digest.digest(), little)
    return len(lengths)


def _index_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".index.npz")


def _save_index(path: pathlib.Path, lengths_N: np.ndarray, digest: bytes, dtype: np.dtype) -> None:
    digest_bytes = np.frombuffer(digest, np.uint8)
    np.savez(_index_path(path), lengths=lengths_N, digest=digest_bytes, seal=_seal(path), dtype=dtype.name)


def _seal(path: pathlib.Path) -> str:
    """What ties an index to its file without reading it: the size, and the end, where ArrayRecord keeps its footer."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - (1 << 17)))
        return f"{size}-{hashlib.sha256(file.read()).hexdigest()}"


def _load_index(path: pathlib.Path, dtype: np.dtype) -> tuple[np.ndarray, bytes]:
    """Length in tokens of each record, and the hash of the file's records."""
    index = _index_path(path)
    if not index.is_file():
        return _scan(path, dtype)
    try:
        with open(index, "rb") as file, np.load(file) as held:
            lengths, digest = held["lengths"], held["digest"].tobytes()
            seal, written = str(held["seal"]), str(held["dtype"])
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{index} must be an index that write_token_records wrote: {error}; delete it") from error
    if seal != _seal(path):
        raise ConfigError(f"{index} was written for another {path.name}: it must be written with it; delete it")
    if written != dtype.name:
        raise ConfigError(f"{path} holds {written} ids: data.source.dtype must say so, not {dtype.name!r}")
    return lengths, digest


def _scan(path: pathlib.Path, dtype: np.dtype) -> tuple[np.ndarray, bytes]:
    digest, lengths = hashlib.sha256(), []
    try:
        source = ArrayRecordDataSource([str(path)])
        for record in map(source.__getitem__, range(len(source))):  # pyright: ignore[reportArgumentType]
            lengths.append(len(record) / dtype.itemsize)
            digest.update(hashlib.sha256(record).digest())
    except (ValueError, RuntimeError, IndexError) as error:
        raise ConfigError(f"{path} must be an ArrayRecord file: {error}") from error
    if any(length % 1 for length in lengths):
        raise ConfigError(f"{path} must hold {dtype.name} ids: some record is not a whole number of them")
    return np.asarray(lengths, np.int64), digest.digest()
