"""Where documents come from. A source is a frozen configuration; ``open()`` reads it into named documents.

Four kinds share one interface: :class:`PythonStandardLibrary`, :class:`TextFiles`, :class:`JsonLines` here, and
``TokenArrayRecords`` (text that was tokenised before) in ``research.data.token_records``. Names are unique, use ``/`` on
every platform, and don't depend on where the corpus lies on the disk, so the split and the hash survive a move.
Documents come sorted by name; empty ones are left out.

To add a source: a frozen dataclass with ``open() -> Documents``, and its class in ``DataConfig.source``.
"""

import dataclasses
import glob
import hashlib
import json
import pathlib
import sysconfig
from collections.abc import Iterable

from research.config import ConfigError
from research.data.split import corpus_hash


class Documents:
    """Documents of a corpus held in memory: ``names[i]`` and ``documents[i]``, the bytes of document i.

    Raises:
      ConfigError: no document has any content, or two carry one name.
    """

    def __init__(self, named: Iterable[tuple[str, bytes]], what: str):
        pairs = sorted((name, content) for name, content in named if content)
        if not pairs:
            raise ConfigError(f"{what} holds no text: it must hold at least one document that is not empty")
        self.names: tuple[str, ...] = tuple(name for name, _ in pairs)
        self._contents = [content for _, content in pairs]
        for before, name in zip(self.names, self.names[1:], strict=False):
            if before == name:
                raise ConfigError(f"{what} holds two documents named {name!r}: names must be unique")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> bytes:
        return self._contents[index]

    def hash(self) -> str:
        """The identity of the corpus (see :func:`research.data.split.corpus_hash`)."""
        return corpus_hash(self.names, [hashlib.sha256(content).digest() for content in self._contents])


@dataclasses.dataclass(frozen=True)
class PythonStandardLibrary:
    """The ``.py`` files of the running Python's standard library: about 31 MB of real text with no download.

    Files of ``site-packages``, ``dist-packages`` and ``__pycache__`` are not part of it, nor are the few of its test
    suite that are deliberately not UTF-8. A document is named by its path under the library (``json/decoder.py``).
    """

    def open(self) -> Documents:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "dist-packages", "__pycache__"}
        relative = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
        named = ((name.as_posix(), (root / name).read_bytes()) for name in relative if not skipped & set(name.parts))
        return Documents(((name, content) for name, content in named if _is_utf8(content)), f"the library at {root}")


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Text files, one document each: ``paths`` are files or globs (``books/**/*.txt``).

    A document is named by its path below the directory that holds the file or the glob's first wildcard, that
    directory's own name included. ``encoding`` is any Python codec, or ``binary`` for bytes as they are.
    """

    paths: tuple[str, ...] = ()
    encoding: str = "utf-8"

    def open(self) -> Documents:
        """Raises FileNotFoundError (nothing at a path) or ConfigError (no paths, no text, not in the encoding)."""
        files = expand_paths(self.paths, "TextFiles")
        return Documents(((name, self._read(path)) for name, path in files), "data.source (TextFiles)")

    def _read(self, path: pathlib.Path) -> bytes:
        content = path.read_bytes()
        if self.encoding == "binary":
            return content
        try:
            return content.decode(self.encoding).encode()
        except LookupError as error:
            raise ConfigError(
                f"data.source.encoding is {self.encoding!r}: it must be a codec Python knows, or 'binary'"
            ) from error
        except UnicodeError as error:
            raise ConfigError(
                f"{path} is not {self.encoding} text ({error}): set data.source.encoding to what it is, or to 'binary'"
            ) from error


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """JSON lines, one document a line: the text is the string in ``field``. Named ``file.jsonl:line``."""

    paths: tuple[str, ...] = ()
    field: str = "text"

    def open(self) -> Documents:
        """Raises FileNotFoundError (nothing at a path) or ConfigError (a line that holds no such document)."""
        files = expand_paths(self.paths, "JsonLines")
        return Documents(
            (document for name, path in files for document in self._read(name, path)), "data.source (JsonLines)"
        )

    def _read(self, name: str, path: pathlib.Path) -> Iterable[tuple[str, bytes]]:
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}, must be one JSON object: {error}") from error
            text = record.get(self.field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                if isinstance(record, dict) and self.field in record:
                    held = f"{type(text).__name__} {text!r}"
                else:
                    held = f"fields {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
                raise ConfigError(
                    f"{path}, line {number}, must hold a string in data.source.field = {self.field!r}, got {held}"
                )
            # Lone surrogates are legal JSON escapes and no text: they become the replacement character.
            yield f"{name}:{number}", text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def expand_paths(paths: tuple[str, ...], kind: str) -> list[tuple[str, pathlib.Path]]:
    """(name, path) of every file that ``paths``, files or globs, stand for.

    Raises:
      ConfigError: no paths at all.
      FileNotFoundError: a path or glob that stands for no file.
    """
    if not paths:
        raise ConfigError(f"data.source.paths is empty: {kind} needs at least one file or glob")
    found: dict[pathlib.Path, str] = {}
    for path in paths:
        is_glob = glob.has_magic(path) and not pathlib.Path(path).is_file()
        matches = (
            [pathlib.Path(match) for match in glob.glob(path, recursive=True)] if is_glob else [pathlib.Path(path)]
        )
        files = sorted(match for match in matches if match.is_file())
        if not files:
            what = "matches no file" if is_glob else "is a directory" if matches[0].is_dir() else "does not exist"
            raise FileNotFoundError(f"data.source.paths: {path!r} {what}; it must be a file or a glob of files")
        root = _fixed_part(path) if is_glob else pathlib.Path(path).parent
        for file in files:
            found.setdefault(file.resolve(), pathlib.PurePath(root.name, file.relative_to(root)).as_posix())
    return [(name, path) for path, name in sorted(found.items())]


def _fixed_part(pattern: str) -> pathlib.Path:
    fixed = []
    for part in pathlib.Path(pattern).parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return pathlib.Path(*fixed)


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
