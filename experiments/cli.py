"""What every program shares: presets by name, overrides, help for a person, and exit codes.

Exit codes: 0 done, 1 failed, 2 bad input (one sentence on stderr), 128 + n stopped by signal n.
"""

import argparse
import ast
import difflib
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import pkgutil
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from research.config import ConfigError, fields_of, override

# What --help says of a DIR that research.interop.opening opens.
MODEL_DIRECTORY = "work directory of a run (or one of its checkpoints), or a Hugging Face model's directory"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, and whose descriptions keep their line breaks."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help says how)\n")


def call(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a program; its exit code. Bad input is a sentence, anything unforeseen a traceback."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax's routine remarks
    try:
        return main(argv) or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stdout = None  # what read our output has gone: not worth a word
        return 1
    except Exception:
        traceback.print_exc()
        return 1


def keep_compiled(cache: Path) -> None:
    """Keeps compiled programs in the work directory, so that resuming need not wait; JAX's own setting comes first."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        # XLA compiles for this very processor: a work directory may be mounted on others.
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            processor = next(line for line in lines if line.startswith(("flags", "Features")))
        except (OSError, StopIteration):
            processor = platform.processor()
        name = f"compiled-{platform.machine()}-{hashlib.sha256(processor.encode()).hexdigest()[:8]}"
        jax.config.update("jax_compilation_cache_dir", os.fspath((cache / name).absolute()))


def modules_of(package: str) -> dict[str, str]:
    """Names of a package's modules, each with the first line of its docstring; nothing is imported but the package."""
    found = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if not info.ispkg and not info.name.startswith("_"):
            found[info.name] = first_line(f"{package}.{info.name}")
    return dict(sorted(found.items()))


def first_line(module: str) -> str:
    """The first line of a module's docstring, read without running it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin:
        return ""
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def find_module(package: str, name: str, what: str) -> ModuleType:
    """The module ``name`` of ``package``.

    Raises:
      ConfigError: there is none of that name; lists those there are.
    """
    names = list(modules_of(package))
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"there is no {what} {name!r}: {hint}There are {', '.join(names) or 'none'}.")
    return importlib.import_module(f"{package}.{name}")


def load_config(name: str, words: Sequence[str] = ()):
    """The preset ``name`` of the ``configs`` package with ``field.sub=value`` words applied.

    Raises:
      ConfigError: no such preset, or a word that cannot be applied.
    """
    config = find_module("configs", name, "configuration").CONFIG
    waiting = list(words)
    # Words may be valid only together (fewer experts, and fewer of them per token): a refused one waits for the others.
    while waiting:
        refused, first_error = [], None
        for word in waiting:
            try:
                config = override(config, word)
            except ConfigError as error:
                refused.append(word)
                first_error = first_error or error
        if first_error is not None and len(refused) == len(waiting):
            raise first_error
        waiting = refused
    return config


def list_presets() -> str:
    return table([(f"  {name}", line) for name, line in modules_of("configs").items()])


def describe_config(name: str, config) -> str:
    """The preset's docstring, and its fields with types and values."""
    docstring = (find_module("configs", name, "configuration").__doc__ or "").strip()
    rows = [(f"  {path}", json.dumps(value), kind) for path, kind, value in fields_of(config)]
    return f"{docstring}\n\nFields, to be set with field=value:\n{table([('  field', 'value', 'type'), *rows])}"


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as aligned columns; the last one is not padded."""
    texts = [[str(cell) for cell in row] for row in rows]
    if not texts:
        return ""
    widths = [max(len(row[column]) for row in texts) for column in range(len(texts[0]) - 1)]
    return "\n".join(
        "  ".join([cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + [row[-1]]) for row in texts
    )
