"""Tensors of a directory of safetensors files (or of PyTorch's .pt files), one at a time, whatever they are stored in.

Read straight from the files, as the format allows (github.com/huggingface/safetensors): memory holds one tensor, and no pages
of a mapped file; the library's numpy front end knows no float8. The library writes.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from research.interop.pickled_tensors import pickled_tensors

PICKLED = (".pt", ".pth")
INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
# What four bits say in MXFP4 (Open Compute Project 2023, "OCP Microscaling Formats", E2M1): the last one is the sign.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# Bytes of one file that we write, about.
FILE_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes ``start`` to ``stop`` of ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> np.ndarray:
        dtype = np.dtype(DTYPES[self.dtype])
        array = np.fromfile(self.file, dtype, math.prod(self.shape), offset=self.start)
        if array.nbytes != self.stop - self.start:
            raise ValueError(f"{self.file} ends before its tensors do: it must be downloaded again")
        return array.reshape(self.shape)


class StoredTensors:
    """The tensors of a checkpoint by name. A matrix in float8 whose blocks have scales (``NAME_scale_inv``) is one tensor, and
    so are matrices in MXFP4 (``NAME_blocks`` and ``NAME_scales``, a scale for each row of blocks), which are stored [..., out,
    in] and read [..., in, out], as gpt-oss stores them otherwise.

    Attributes:
      stored: every tensor in the files, scales included.
      block: rows and columns that share a scale; None where nothing is block-scaled.
    """

    def __init__(self, directory: Path, block: tuple[int, int] | None = None):
        """Reads the files' headers.

        Raises:
          ValueError: there are no files of tensors, one that the index names is missing, or one is damaged.
        """
        self.block = block
        self.stored: dict[str, Stored] = {}
        for file in _files(directory):
            for name, tensor in (_pickled(file) if file.suffix in PICKLED else _header(file)).items():
                if name in self.stored:
                    raise ValueError(f"{name} is in two files, {self.stored[name].file.name} and {file.name}")
                self.stored[name] = tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, in the order of the files."""
        found = {}
        for name, tensor in self.stored.items():
            if self._is_four_bits(name):
                *rest, out, blocks, width = tensor.shape
                found[name.removesuffix("_blocks")] = (*rest, blocks * width * 2, out)
            elif not self._is_scale(name):
                found[name] = tensor.shape
        return found

    def read(self, name: str) -> np.ndarray:
        """One tensor; float32 where it was scaled.

        Raises:
          ValueError: float8 without scales, or scales of another shape than its blocks.
        """
        if self._is_four_bits(f"{name}_blocks"):
            return self._read_four_bits(name)
        tensor = self.stored[name]
        if not tensor.dtype.startswith("F8"):
            return tensor.read()
        scale = self.stored.get(f"{name}_scale_inv")
        if scale is None or self.block is None:
            raise ValueError(
                f"{name} is {tensor.dtype}: it must have {name}_scale_inv, and config.json a weight_block_size"
            )
        blocks = tuple(-(-size // step) for size, step in zip(tensor.shape, self.block, strict=True))
        if scale.shape != blocks:
            raise ValueError(f"{name}_scale_inv has shape {scale.shape}, must have {blocks}")
        values, scales = tensor.read().astype(np.float32), scale.read().astype(np.float32)
        for axis, step in enumerate(self.block):
            scales = np.repeat(scales, step, axis).take(range(tensor.shape[axis]), axis)
        return values * scales

    def _read_four_bits(self, name: str) -> np.ndarray:
        """Two numbers a byte, the lower half first; a scale is the exponent of two with 127 on top."""
        bytes_, scales = self.stored[f"{name}_blocks"].read(), self.stored[f"{name}_scales"].read()
        if bytes_.dtype != np.uint8 or scales.dtype != np.uint8 or scales.shape != bytes_.shape[:-1]:
            raise ValueError(
                f"{name}_blocks and {name}_scales must be of uint8, a scale a block of {list(bytes_.shape[:-1])}, got "
                f"{bytes_.dtype} and {scales.dtype} of shape {list(scales.shape)}"
            )
        values = np.stack([E2M1[bytes_ & 15], E2M1[bytes_ >> 4]], axis=-1)
        values *= np.ldexp(np.float32(1), scales.astype(np.int32) - 127)[..., None, None]
        return values.reshape(*bytes_.shape[:-2], -1).swapaxes(-1, -2)

    def _is_scale(self, name: str) -> bool:
        whole = name.removesuffix("_scale_inv")
        if whole != name:
            return whole in self.stored
        return name.endswith("_scales") and self._is_four_bits(f"{name.removesuffix('_scales')}_blocks")

    def _is_four_bits(self, name: str) -> bool:
        whole = name.removesuffix("_blocks")
        return whole != name and name in self.stored and f"{whole}_scales" in self.stored


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} must be JSON with a weight_map: {error}") from error
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
        if SINGLE_FILE in names:
            names = [SINGLE_FILE]
        names = names or sorted(path.name for path in directory.iterdir() if path.suffix in PICKLED)
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"{directory} lacks {', '.join(missing)}, which {INDEX_FILE} names")
    if not names:
        raise ValueError(f"{directory} holds no safetensors files: it must hold {SINGLE_FILE} or {INDEX_FILE}")
    return [directory / name for name in names]


def _pickled(file: Path) -> dict[str, Stored]:
    return {name: Stored(file, *place) for name, place in pickled_tensors(file).items()}


def _header(file: Path) -> dict[str, Stored]:
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = os.fstat(opened.fileno()).st_size
            if length > size:
                raise ValueError("its header is longer than the file")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        found = {
            name: Stored(file, about["dtype"], tuple(about["shape"]), *(8 + length + n for n in about["data_offsets"]))
            for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} must be a safetensors file: {error}") from error
    unknown = sorted({tensor.dtype for tensor in found.values()} - set(DTYPES))
    if unknown:
        raise ValueError(f"{file} holds tensors of {', '.join(unknown)}: they must be of {', '.join(DTYPES)}")
    if any(tensor.stop > size for tensor in found.values()):
        raise ValueError(f"{file} ends before its tensors do: it must be downloaded again")
    return found


@contextlib.contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """A directory to fill, which becomes ``directory`` once the block is left without an error, and is removed otherwise.

    Raises:
      ValueError: ``directory`` exists and isn't empty, or can't be made.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists: it must be an empty directory or not exist yet")
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{directory} can't be made: {error.strerror}") from error
    try:
        yield unfinished
        with contextlib.suppress(FileNotFoundError):
            directory.rmdir()
        unfinished.rename(directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write(
    directory: Path, tensors: Iterable[tuple[str, np.ndarray]], sizes: Mapping[str, int], texts: Mapping[str, str]
) -> None:
    """Writes a directory with tensors and text files, whole or not at all.

    Args:
      tensors: one at a time; memory holds those of one file.
      sizes: bytes of each, in their order.
      texts: content of further files by name.

    Raises:
      ValueError: the directory exists and isn't empty.
    """
    with whole_directory(directory) as unfinished:
        for name, text in texts.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        _write_tensors(unfinished, tensors, sizes)


def _write_tensors(directory: Path, tensors: Iterable[tuple[str, np.ndarray]], sizes: Mapping[str, int]) -> None:
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    stream: Iterator[tuple[str, np.ndarray]] = iter(tensors)
    where: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = SINGLE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(dict(next(stream) for _ in names), directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(files) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2))


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)
