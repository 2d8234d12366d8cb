"""Where the tensors of a PyTorch checkpoint (.pt) lie, found without PyTorch and without running what is pickled.

Such a file is a zip whose ``data.pkl`` names tensors and whose other members, uncompressed, are their bytes (PyTorch 1.6 and
later). A pickle is a program; here it may build dictionaries, lists and tensors, and whatever else it names becomes an empty
stand-in.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

# What PyTorch calls an array of each dtype, in safetensors' words, and its bytes.
STORAGES = {
    "DoubleStorage": ("F64", 8), "FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8), "IntStorage": ("I32", 4), "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1),
}  # fmt: skip


class Pickled(NamedTuple):
    """Bytes ``start`` to ``stop`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def pickled_tensors(file: Path) -> dict[str, Pickled]:
    """Every tensor of a .pt file that holds a dictionary of them, by name, in the order of their bytes.

    Raises:
      ValueError: no such file, another format, or tensors that are not stored row after row.
    """
    try:
        with zipfile.ZipFile(file) as zipped:
            members = {info.filename: info for info in zipped.infolist()}
            pickle_name = next((name for name in members if name.endswith("data.pkl")), None)
            if pickle_name is None:
                raise ValueError("it holds no data.pkl")
            with zipped.open(pickle_name) as opened:
                held = _Reader(opened).load()
        found = _named(held)
        if not found:
            raise ValueError("it holds no dictionary of tensors")
        folder, tensors = pickle_name.removesuffix("data.pkl"), {}
        with open(file, "rb") as raw:
            for name, tensor in found.items():
                tensors[name] = _place(name, tensor, members.get(f"{folder}data/{tensor.storage.key}"), raw)
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{file} must be a checkpoint that PyTorch 1.6 or later wrote: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file} must be a checkpoint that PyTorch 1.6 or later wrote: {error}") from None
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


class _Storage(NamedTuple):
    dtype: str
    itemsize: int
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Anything:
    """Stands in for objects that nothing here reads."""

    def __init__(self, *args, **kwargs): ...
    def __setstate__(self, state): ...
    def __setitem__(self, key, value): ...
    def append(self, value): ...
    def extend(self, values): ...


def _tensor(storage, offset, shape, strides, *_) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _Reader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "torch" and global_name in STORAGES:
            return STORAGES[global_name]
        if (module_name, global_name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module_name == "torch._utils" and global_name.startswith("_rebuild_parameter"):
            return lambda tensor, *_: tensor
        return OrderedDict if (module_name, global_name) == ("collections", "OrderedDict") else _Anything

    def persistent_load(self, pid: Any) -> _Storage:
        _, (dtype, itemsize), key, *_ = pid
        return _Storage(dtype, itemsize, str(key))


def _named(held: Any) -> dict[str, _Tensor]:
    """The dictionary itself, or the one under ``state_dict`` or ``model``."""
    if not isinstance(held, dict):
        return {}
    found = {name: value for name, value in held.items() if isinstance(value, _Tensor)}
    return found or _named(held.get("state_dict", held.get("model")))


def _place(name: str, tensor: _Tensor, member: zipfile.ZipInfo | None, raw) -> Pickled:
    rows, expected = 1, []
    for size in reversed(tensor.shape):
        expected.insert(0, rows)
        rows *= size
    differing = [size > 1 and a != b for size, a, b in zip(tensor.shape, tensor.strides, expected, strict=True)]
    if any(differing):
        raise ValueError(f"{name} is not stored row after row, but with strides {tensor.strides}")
    if member is None or member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"the bytes of {name} are missing or compressed")
    # The header before a member has its own name and padding, of lengths that only it knows.
    raw.seek(member.header_offset + 26)
    lengths = raw.read(4)
    begin = member.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    start = begin + tensor.offset * tensor.storage.itemsize
    stop = start + math.prod(tensor.shape) * tensor.storage.itemsize
    if stop > begin + member.file_size:
        raise ValueError(f"{name} reaches past its bytes")
    return Pickled(tensor.storage.dtype, tensor.shape, start, stop)
