"""Text to ids and back: bytes, a byte-level BPE trained on the spot, and Hugging Face ``tokenizer.json`` files.

:class:`Bytes`, :class:`BytePairEncoding` and :class:`TokenizerJson` are configurations (what a person asks for);
:func:`build_tokenizer` makes a :class:`Tokenizer` of one (what encodes). A tokenizer goes through
:meth:`Tokenizer.to_json` into a checkpoint, and :func:`tokenizer_from_json` rebuilds it without any other file.
"""

import abc
import codecs
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
import tokenizers

from research.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Bytes:
    """One token a byte, and three special ones: 259 ids.

    ``inside``: 256 ids, where BOS and EOS are 254 and 255, bytes that no text in UTF-8 has (H-Net as published).
    """

    inside: bool = False


@dataclasses.dataclass(frozen=True)
class BytePairEncoding:
    """A byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) trained on the training documents.

    ``vocab_size`` counts the 256 bytes and the three special tokens. Training reads whole documents, chosen by the hash
    of their content, up to ``training_bytes``: more of them move the result by little and the time by much.
    """

    vocab_size: int = 4096
    training_bytes: int = 8_000_000

    def __post_init__(self):
        if self.vocab_size < 259:
            raise ConfigError(f"data.tokenizer.vocab_size is {self.vocab_size}: it must be at least 259")
        if self.training_bytes < 1:
            raise ConfigError(f"data.tokenizer.training_bytes is {self.training_bytes}: it must be at least 1")


@dataclasses.dataclass(frozen=True)
class TokenizerJson:
    """A Hugging Face ``tokenizer.json``. ``bos``, ``eos``, ``pad`` name its special tokens.

    Where they are empty, ``tokenizer_config.json`` in the same directory is asked. Special tokens written out in a text
    are recognised, as the file says.
    """

    path: str = ""
    bos: str = ""
    eos: str = ""
    pad: str = ""


class Tokenizer(abc.ABC):
    """Ids for text. Encoding adds no special tokens; decoding leaves them out.

    Attributes:
      vocab_size: ids are 0 … vocab_size − 1, special ones included.
      bos_id, eos_id, pad_id: the special tokens, None where there is none.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    @property
    def start_id(self) -> int:
        """What every document begins with: BOS, or EOS for vocabularies without one (the GPT-2 convention)."""
        start = self.eos_id if self.bos_id is None else self.bos_id
        if start is None:
            raise ConfigError("the tokenizer has neither BOS nor EOS: data.tokenizer.bos or .eos must name one")
        return start

    @abc.abstractmethod
    def encode(self, text: str | bytes) -> np.ndarray:
        """int32 ids of ``text``. Raises ValueError for a str with lone surrogates, which is no text."""

    def encode_published(self, text: str | bytes) -> np.ndarray:
        """``encode`` with the special tokens that the tokenizer's own file puts around a text (often BOS, or none)."""
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    @abc.abstractmethod
    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The bytes of ``ids``. Raises ValueError for an id that is not in the vocabulary."""

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def stream(self) -> "DecodeStream":
        return DecodeStream(self)

    @abc.abstractmethod
    def to_json(self) -> str: ...


class DecodeStream:
    """Text of ids that come one at a time: bytes that are not yet a whole character wait for the next id."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: SupportsIndex) -> str:
        """The text that ``token_id`` completes; often empty in the middle of a character."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        """U+FFFD if the last character never came to an end, else nothing."""
        return self._decoder.decode(b"", final=True)


class ByteTokenizer(Tokenizer):
    """Ids 0 … 255 are bytes; 256, 257, 258 are padding, BOS and EOS. ``inside``: see ``Bytes``."""

    def __init__(self, inside: bool = False):
        self.vocab_size, self.pad_id, self.bos_id, self.eos_id = (
            (256, None, 254, 255) if inside else (259, 256, 257, 258)
        )

    def encode(self, text: str | bytes) -> np.ndarray:
        return np.frombuffer(_as_bytes(text), np.uint8).astype(np.int32)

    def encode_published(self, text: str | bytes) -> np.ndarray:
        ids = self.encode(text)
        return ids if self.vocab_size > 256 else np.insert(ids, 0, self.start_id)

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        return bytes(i for i in _checked(ids, self.vocab_size) if i < min(256, self.start_id))

    def to_json(self) -> str:
        return json.dumps({"kind": "ByteTokenizer"} | ({} if self.vocab_size > 256 else {"inside": True}))


# The pieces a BPE token never crosses: a word with one sign or space before it; up to three digits; signs; a run
# outside ASCII; line ends with the indentation after them, less its last space (that one goes with the word, so that
# " return" is one token at any depth); other space; control characters. Every class is spelled in ASCII, so the pattern
# cuts the same pieces from text (in the tokenizers library) and from its bytes (here, at several times the speed).
_SIGN = r"!-/:-@\[-`{-~"
_PIECES = (
    rf"[ {_SIGN}]?[A-Za-z]+|[0-9]{{1,3}}| ?[{_SIGN}]+|[^\x00-\x7F]+"
    r"|[ \t\f\v\r\n]*[\r\n][ \t]*(?=[ \t])|[ \t\f\v\r\n]+(?![^ \t\f\v\r\n])|[ \t\f\v\r\n]+|[\x00-\x1F\x7F]"
)
_BYTE_PIECES = re.compile(_PIECES.encode())


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (printable ones for themselves)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in plain)
    table = {byte: chr(byte) for byte in plain} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


_CHARACTER_OF_BYTE = _byte_alphabet()
_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(_CHARACTER_OF_BYTE)}


class BytePairTokenizer(Tokenizer):
    """A trained byte-level BPE. Lossless on any bytes; special tokens written out in a text are plain text.

    ``tokenizer_json`` is a complete Hugging Face ``tokenizer.json``; it encodes text to the same ids.
    """

    _MOST_CACHED = 1 << 20

    def __init__(self, tokenizer_json: str):
        self._json = tokenizer_json
        whole = _from_library_json(tokenizer_json)
        self._model = whole.model
        self.vocab_size = whole.get_vocab_size(with_added_tokens=True)
        self.pad_id, self.bos_id, self.eos_id = range(self.vocab_size - 3, self.vocab_size)
        self._bytes_of_id = [b""] * self.vocab_size
        for piece, i in whole.get_vocab(with_added_tokens=False).items():
            self._bytes_of_id[i] = bytes(_BYTE_OF_CHARACTER[c] for c in piece)
        self._ids_of_piece: dict[bytes, tuple[int, ...]] = {}

    def encode(self, text: str | bytes) -> np.ndarray:
        pieces = _BYTE_PIECES.findall(_as_bytes(text))
        known = self._ids_of_piece
        for piece in set(pieces).difference(known):
            characters = "".join(_CHARACTER_OF_BYTE[byte] for byte in piece)
            known[piece] = tuple(token.id for token in self._model.tokenize(characters))
        ids = np.fromiter(itertools.chain.from_iterable(map(known.__getitem__, pieces)), np.int32)
        if len(known) > self._MOST_CACHED:
            known.clear()
        return ids

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        return b"".join(self._bytes_of_id[i] for i in _checked(ids, self.vocab_size))

    def to_json(self) -> str:
        return json.dumps({"kind": "BytePairTokenizer", "tokenizer": json.loads(self._json)})

    def to_huggingface(self) -> str:
        """The content of a ``tokenizer.json``."""
        return self._json


class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer of the ``tokenizers`` library, with the ids of its special tokens."""

    def __init__(self, tokenizer_json: str, bos_id: int | None, eos_id: int | None, pad_id: int | None):
        self._json = tokenizer_json
        self._tokenizer = _from_library_json(tokenizer_json)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id

    def encode(self, text: str | bytes) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        try:
            strings = [text if isinstance(text, str) else text.decode() for text in texts]
        except UnicodeDecodeError as error:
            raise ValueError(f"a Hugging Face tokenizer encodes UTF-8 text only, got other bytes: {error}") from error
        encodings = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def encode_published(self, text: str | bytes) -> np.ndarray:
        string = _as_bytes(text).decode(errors="replace")
        return np.asarray(self._tokenizer.encode(string, add_special_tokens=True).ids, np.int32)

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        return self.decode(ids).encode()

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return self._tokenizer.decode(_checked(ids, self.vocab_size), skip_special_tokens=True)

    def stream(self) -> DecodeStream:
        return _HuggingFaceStream(self, self._tokenizer)

    def to_json(self) -> str:
        ids = {"bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id}
        return json.dumps({"kind": "HuggingFaceTokenizer", "tokenizer": json.loads(self._json), **ids})


class _HuggingFaceStream(DecodeStream):
    """The library's own stream: what a token adds may depend on the ones before (spaces, byte fallback)."""

    def __init__(self, tokenizer: Tokenizer, library_tokenizer: tokenizers.Tokenizer):
        super().__init__(tokenizer)
        self._library_tokenizer = library_tokenizer
        self._stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._sent = 0

    def push(self, token_id: SupportsIndex) -> str:
        self._ids += _checked([token_id], self._tokenizer.vocab_size)
        text = self._stream.step(self._library_tokenizer, self._ids[-1]) or ""
        self._sent += len(text)
        return text

    def finish(self) -> str:
        return self._tokenizer.decode(self._ids)[self._sent :]


def build_tokenizer(config: Bytes | BytePairEncoding | TokenizerJson, documents: Sequence[bytes] = ()) -> Tokenizer:
    """The tokenizer that ``config`` asks for; a BPE is trained on ``documents``: give the training ones only.

    The same documents, in any order, give the same BPE. Callers keep :meth:`Tokenizer.to_json` and don't train twice.

    Raises:
      ConfigError: nothing to train on, too little text for the vocabulary, or a special token that doesn't exist.
      FileNotFoundError: no ``tokenizer.json`` there.
    """
    if isinstance(config, Bytes):
        return ByteTokenizer(config.inside)
    if isinstance(config, BytePairEncoding):
        return _train(config, documents)
    return _load(config)


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokenizer that :meth:`Tokenizer.to_json` wrote.

    Raises:
      ConfigError: text that no tokenizer wrote.
    """
    try:
        held = json.loads(text)
        kind, model = held["kind"], json.dumps(held.get("tokenizer"), ensure_ascii=False)
        if kind == "ByteTokenizer":
            return ByteTokenizer(held.get("inside", False))
        if kind == "BytePairTokenizer":
            return BytePairTokenizer(model)
        if kind == "HuggingFaceTokenizer":
            return HuggingFaceTokenizer(model, held["bos_id"], held["eos_id"], held["pad_id"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"this is not what Tokenizer.to_json writes: {error}") from error
    raise ConfigError(f"kind is {kind!r}: it must be ByteTokenizer, BytePairTokenizer or HuggingFaceTokenizer")


def _train(config: BytePairEncoding, documents: Sequence[bytes]) -> BytePairTokenizer:
    chosen, total = [], 0
    for document in sorted(documents, key=lambda content: hashlib.sha256(content).digest()):
        if total < config.training_bytes:
            chosen.append(document.decode(errors="replace"))
            total += len(document)
    if not chosen:
        raise ConfigError("data.tokenizer is a BytePairEncoding: it needs training documents, and there are none")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_PIECES), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocab_size - 3,
        initial_alphabet=sorted(_CHARACTER_OF_BYTE),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chosen, trainer)
    tokenizer.add_special_tokens(["<|pad|>", "<|bos|>", "<|eos|>"])
    reached = tokenizer.get_vocab_size(with_added_tokens=True)
    if reached != config.vocab_size:
        raise ConfigError(
            f"data.tokenizer.vocab_size is {config.vocab_size:,}, and {total:,} bytes of text give {reached:,} tokens: "
            f"it must be at most that"
        )
    return BytePairTokenizer(tokenizer.to_str())


def _load(config: TokenizerJson) -> HuggingFaceTokenizer:
    path = pathlib.Path(config.path)
    if not config.path or not path.is_file():
        raise FileNotFoundError(f"data.tokenizer.path is {config.path!r}: it must be a tokenizer.json file")
    text = path.read_text("utf-8")
    try:
        library_tokenizer = _from_library_json(text)
    except ValueError as error:
        raise ConfigError(
            f"data.tokenizer.path {config.path!r} must be a Hugging Face tokenizer.json: {error}"
        ) from error
    beside = path.with_name("tokenizer_config.json")
    known = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
    ids = {}
    for role in ("bos", "eos", "pad"):
        given, said = getattr(config, role), known.get(f"{role}_token")
        token = given or (said["content"] if isinstance(said, dict) else said)
        ids[f"{role}_id"] = None if token is None else library_tokenizer.token_to_id(token)
        if token is not None and ids[f"{role}_id"] is None:
            raise ConfigError(f"data.tokenizer.{role} is {token!r}: it must be a token of {config.path}")
    return HuggingFaceTokenizer(text, **ids)


def _from_library_json(text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(str(error)) from error


def _as_bytes(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text to encode must not hold lone surrogates: {error}") from error


def _checked(ids: Iterable[SupportsIndex], vocab_size: int) -> list[int]:
    checked = [int(i) for i in ids]
    for i in checked:
        if not 0 <= i < vocab_size:
            raise ValueError(f"token id {i} is outside the vocabulary: ids must be in 0 … {vocab_size - 1}")
    return checked
