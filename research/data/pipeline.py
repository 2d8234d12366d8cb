"""The data of a run: a corpus opened, split and tokenised, and the Grain pipelines that read it.

    corpus = open_corpus(config.data, cache=workdir / "cache")
    batches = iter(build_loader(corpus))              # endless; its state is saved by Orbax beside the parameters
    for batch in build_held_out(corpus, batch_size=32):   # finite: every held-out byte scored once
        ...

A batch is the dict that :class:`research.data.packing.Rows` describes, its arrays ``[B, T]``.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Sequence

import grain
import jax
import numpy as np
from absl import flags

from research.config import ConfigError, to_dict
from research.data.packing import InMemoryStreams, Rows, TokenStreams
from research.data.sources import Documents, JsonLines, PythonStandardLibrary, TextFiles
from research.data.split import split
from research.data.token_records import RecordStreams, TokenArrayRecords, TokenDocuments
from research.data.tokenization import (
    BytePairEncoding,
    Bytes,
    HuggingFaceTokenizer,
    Tokenizer,
    TokenizerJson,
    build_tokenizer,
    tokenizer_from_json,
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads.

    Attributes:
      source: where documents come from.
      tokenizer: how they become ids.
      sequence_length: T, positions of a row (and targets: a row is cut from T + 1 tokens).
      batch_size: rows of one batch over all processes.
      seed: of the shuffle.
      held_out_bytes: about how much is held out, by whole documents (research.data.split says which); 0 for nothing.
      threads: threads of each process (of each worker, where there are some) that assemble batches ahead.
      prefetch: batches that wait ready.
      workers: processes that assemble batches; 0 leaves it to the threads. Batches are the same with any number.
    """

    source: PythonStandardLibrary | TextFiles | JsonLines | TokenArrayRecords = PythonStandardLibrary()
    tokenizer: Bytes | BytePairEncoding | TokenizerJson = Bytes()
    sequence_length: int = 512
    batch_size: int = 16
    seed: int = 0
    held_out_bytes: int = 1_000_000
    threads: int = 2
    prefetch: int = 16
    workers: int = 0

    def __post_init__(self):
        least = {"sequence_length": 2, "batch_size": 1, "seed": 0, "held_out_bytes": 0, "threads": 1}
        for name, minimum in (least | {"prefetch": 1, "workers": 0}).items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"data.{name} is {getattr(self, name)}: it must be at least {minimum}")
        if self.seed >= 2**32:
            raise ConfigError(f"data.seed is {self.seed}: it must be less than 2**32")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus ready to read.

    Attributes:
      config: what it was opened with.
      hash: SHA-256 over names and contents of all its documents; a checkpoint keeps it.
      tokenizer: goes into the checkpoint through ``to_json()``.
      train, held_out: the two parts as streams of ids.
      held_out_names: names of the held-out documents.
      held_out_bytes: bytes of the held-out documents: what bits per byte divides by.
    """

    config: DataConfig
    hash: str
    tokenizer: Tokenizer
    train: TokenStreams
    held_out: TokenStreams
    held_out_names: tuple[str, ...]
    held_out_documents: tuple[bytes, ...]

    @functools.cached_property
    def held_out_bytes(self) -> int:
        return sum(map(len, self.held_out_documents))

    @property
    def tokens(self) -> int:
        """Positions of one epoch."""
        return int(self.train.positions_N.sum())


def open_corpus(
    config: DataConfig, *, tokenizer: Tokenizer | None = None, cache: str | os.PathLike | None = None
) -> Corpus:
    """Reads, splits and tokenises what ``config`` names.

    Args:
      tokenizer: of a checkpoint; without it ``config.tokenizer`` is built, a BPE on the training documents.
      cache: a directory for the trained BPE and the ids, so that the next start reads them; made if need be.

    Raises:
      ConfigError: data that can't be used; FileNotFoundError: data that is not there. One sentence each.
    """
    documents = config.source.open()
    if isinstance(documents, TokenDocuments):
        return _open_tokenized(config, documents, tokenizer)
    train, held_out = split(documents.names, lambda i: len(documents[i]), config.held_out_bytes)
    train_documents = [documents[i] for i in train]
    held_out_documents = [documents[i] for i in held_out]
    folder = None if cache is None else pathlib.Path(cache)
    hash_ = documents.hash()
    if tokenizer is None:
        tokenizer = _cached_tokenizer(config, train_documents, hash_, folder)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        _require_text(documents)
    key = _digest(hash_, config.held_out_bytes, tokenizer.to_json())
    return Corpus(
        config=config,
        hash=hash_,
        tokenizer=tokenizer,
        train=_cached_streams(train_documents, tokenizer, folder and folder / f"train-{key}.npz"),
        held_out=_cached_streams(held_out_documents, tokenizer, folder and folder / f"held_out-{key}.npz"),
        held_out_names=tuple(documents.names[i] for i in held_out),
        held_out_documents=tuple(held_out_documents),
    )


def build_loader(
    corpus: Corpus, *, process_index: int | None = None, process_count: int | None = None
) -> grain.IterDataset:
    """Endless training batches: this process's share, ``[batch_size // process_count, T]``.

    Rows are shuffled anew each epoch, repeated, and only then dealt out to the processes in turn, so batch n of all
    processes together is the same for any number of them. ``iter()`` of it has ``get_state`` and ``set_state``, and is a
    checkpointable of Orbax; the state holds a position, whatever the number of steps behind it.

    Raises:
      ConfigError: batch_size that the processes can't share evenly.
    """
    config = corpus.config
    index, count = _process(process_index, process_count, config.batch_size)
    rows = Rows(corpus.train, config.sequence_length, seed=config.seed, fill_id=corpus.tokenizer.pad_id or 0)
    # 2**50 rows are endless, and a length that batch() computes exactly (that of repeat() overflows at batch size 1).
    dataset = grain.MapDataset.source(rows).seed(config.seed).shuffle().repeat(2**50 // len(rows))
    dataset = dataset[index::count].batch(config.batch_size // count)
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch)
    batches = dataset.to_iter_dataset(options)
    if config.workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its flags when it starts workers
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(
            grain.multiprocessing.MultiprocessingOptions(
                num_workers=config.workers, per_worker_buffer_size=-(-config.prefetch // config.workers)
            )
        )
    return batches


def build_held_out(
    corpus: Corpus,
    *,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    overlap: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.MapDataset:
    """All held-out documents as a finite sequence of batches, always in the same order.

    Over all batches (of all processes) ``loss_mask_BT`` is true once for every token of every held-out document and its
    EOS. With N the summed negative log-likelihood (nats) under the mask, bits per held-out byte are
    ``N / ln 2 / corpus.held_out_bytes``, comparable between tokenizers: it is the length of a complete code for the
    documents, ends included. Rows past the data are padding, so that every batch has one shape and every process as
    many.

    Args:
      overlap: positions of context that pieces of a long document repeat from the piece before. 0 is fastest and
        pessimistic: the first tokens of each piece see nothing. Cost grows by T / (T − overlap).
    """
    batch_size = batch_size or corpus.config.batch_size
    index, count = _process(process_index, process_count, batch_size)
    if not len(corpus.held_out):
        raise ConfigError("data.held_out_bytes is 0: there is no held-out set to evaluate on")
    length = sequence_length or corpus.config.sequence_length
    rows = Rows(corpus.held_out, length, overlap=overlap, fill_id=corpus.tokenizer.pad_id or 0)
    padded = _Padded(rows, -(-len(rows) // batch_size) * batch_size)
    return grain.MapDataset.source(padded)[index::count].batch(batch_size // count)


class _Padded:
    """Rows followed by rows of padding."""

    def __init__(self, rows: Rows, length: int):
        self._rows, self._length = rows, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index < len(self._rows):
            return self._rows[index]
        empty = {name: np.zeros_like(column) for name, column in self._rows[0].items()}
        fill = self._rows.fill_id
        return empty | {name: np.full_like(empty[name], fill) for name in ("inputs_BT", "targets_BT")}


def _process(index: int | None, count: int | None, batch_size: int) -> tuple[int, int]:
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    if batch_size % count:
        raise ConfigError(f"data.batch_size is {batch_size}: it must be a multiple of the {count} processes")
    return index, count


def _require_text(documents: Documents) -> None:
    for index, name in enumerate(documents.names):
        try:
            documents[index].decode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"data.tokenizer is a TokenizerJson, which encodes UTF-8 text only, and {name} is not ({error}): "
                f"data.tokenizer must be Bytes or BytePairEncoding, or the document text"
            ) from error


def _open_tokenized(config: DataConfig, documents: TokenDocuments, tokenizer: Tokenizer | None) -> Corpus:
    if tokenizer is None:
        if isinstance(config.tokenizer, BytePairEncoding):
            raise ConfigError(
                "data.tokenizer is a BytePairEncoding, which is trained on text, and data.source is tokenised already: "
                "it must be the TokenizerJson (or Bytes) that the data was tokenised with"
            )
        tokenizer = build_tokenizer(config.tokenizer)
    decode = tokenizer.decode_bytes
    train, held_out = split(documents.names, lambda i: len(decode(documents[i])), config.held_out_bytes)
    return Corpus(
        config=config,
        hash=documents.hash(),
        tokenizer=tokenizer,
        train=RecordStreams(documents, train, tokenizer),
        held_out=RecordStreams(documents, held_out, tokenizer),
        held_out_names=tuple(documents.names[i] for i in held_out),
        held_out_documents=tuple(decode(documents[i]) for i in held_out),
    )


def _cached_tokenizer(
    config: DataConfig, documents: Sequence[bytes], hash_: str, folder: pathlib.Path | None
) -> Tokenizer:
    if folder is None or not isinstance(config.tokenizer, BytePairEncoding):
        return build_tokenizer(config.tokenizer, documents)
    key = _digest(hash_, config.held_out_bytes, json.dumps(to_dict(config.tokenizer)))
    path = folder / f"tokenizer-{key}.json"
    try:
        return tokenizer_from_json(path.read_text("utf-8"))
    except (OSError, ValueError):
        tokenizer = build_tokenizer(config.tokenizer, documents)
        _write(path, tokenizer.to_json().encode())
        return tokenizer


def _cached_streams(documents: Sequence[bytes], tokenizer: Tokenizer, path: pathlib.Path | None) -> InMemoryStreams:
    if path is None:
        return InMemoryStreams.from_documents(documents, tokenizer)
    try:
        with open(path, "rb") as file, np.load(file) as held:
            return InMemoryStreams(held["ids"], held["offsets"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        streams = InMemoryStreams.from_documents(documents, tokenizer)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.stem}.{os.getpid()}.npz")
        np.savez(temporary, ids=streams.ids, offsets=streams.offsets)
        temporary.replace(path)
        return streams


def _write(path: pathlib.Path, content: bytes) -> None:
    """Whole or not at all: a killed run leaves no half of a file under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
