"""PyTorch's .pt files, written here as PyTorch writes them: H-Net is published as one."""

import collections
import io
import pickle
import sys
import types
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

from research.interop import huggingface
from research.interop.pickled_tensors import STORAGES, pickled_tensors
from tests.interop.checkpoints import golden, write_checkpoint

STORAGE_OF = {np.dtype(np.float32): "FloatStorage", np.dtype(ml_dtypes.bfloat16): "BFloat16Storage"}


class Rebuilt:
    """Pickled as a call of ``torch._utils._rebuild_tensor_v2`` on a storage."""

    def __init__(self, array, key, offset=0, strides=None):
        self.array, self.key, self.offset = array, key, offset
        self.strides = tuple(s // array.itemsize for s in array.strides) if strides is None else strides

    def __reduce__(self):
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        arguments = (Pointer(self.array, self.key), self.offset, self.array.shape, self.strides, False)
        return rebuild, (*arguments, collections.OrderedDict())


class Pointer:
    def __init__(self, array, key):
        self.array, self.key = array, key


@pytest.fixture
def torch(monkeypatch):
    """Modules with the names that a pickle calls, and something that must not be called."""
    module, utils, evil = (types.ModuleType(name) for name in ("torch", "torch._utils", "evil"))

    def made(name, owner):
        kind = type(name, (), {"__module__": owner.__name__})
        setattr(owner, name, kind)
        return kind

    def _rebuild_tensor_v2(*arguments): ...
    def run(command):
        raise AssertionError(f"ran {command}")

    _rebuild_tensor_v2.__module__, utils._rebuild_tensor_v2 = "torch._utils", _rebuild_tensor_v2
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    run.__module__, run.__qualname__, evil.run = "evil", "run", run
    for name in STORAGES:
        made(name, module)
    for imitation in (module, utils, evil):
        monkeypatch.setitem(sys.modules, imitation.__name__, imitation)
    return module


def write(path, torch, held, arrays):
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, Pointer):
                kind = getattr(torch, STORAGE_OF[obj.array.dtype])
                return ("storage", kind, obj.key, "cpu", obj.array.size)
            return None

    told = io.BytesIO()
    Pickler(told, protocol=2).dump(held)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as zipped:
        zipped.writestr("archive/data.pkl", told.getvalue())
        for key, array in arrays.items():
            zipped.writestr(f"archive/data/{key}", array.tobytes())
    return path


def test_a_published_h_net(torch, tmp_path):
    """The same arrays as from safetensors."""
    g = golden("hnet")
    arrays = {str(i): array for i, array in enumerate(g.tensors.values())}
    state = collections.OrderedDict((name, Rebuilt(array, str(i))) for i, (name, array) in enumerate(g.tensors.items()))
    one = huggingface.load(write_checkpoint(tmp_path / "one", g.hub, g.tensors))
    other = write_checkpoint(tmp_path / "other", g.hub, g.tensors)
    (other / "model.safetensors").unlink()
    write(other / "hnet_2stage_XL.pt", torch, state, arrays)
    for ours, theirs in zip(jax.tree.leaves(huggingface.load(other)), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_else_is_pickled_is_not_run(torch, tmp_path):
    class Evil:
        def __reduce__(self):
            return sys.modules["evil"].run, ("rm -rf",)

    whole = np.arange(12, dtype=np.float32)
    half = whole[6:].reshape(2, 3).astype(ml_dtypes.bfloat16)
    held = {
        "state_dict": {"a": Rebuilt(whole[4:10].reshape(2, 3), "0", offset=4), "b": Rebuilt(half, "1")},
        "e": Evil(),
    }
    file = write(tmp_path / "x.pt", torch, held, {"0": whole, "1": half})
    found = pickled_tensors(file)
    raw = file.read_bytes()
    assert (found["a"].dtype, found["b"].dtype) == ("F32", "BF16")
    np.testing.assert_array_equal(np.frombuffer(raw[found["a"].start : found["a"].stop], np.float32), whole[4:10])
    assert raw[found["b"].start : found["b"].stop] == half.tobytes()


def test_what_cannot_be_read_is_said(torch, tmp_path):
    array = np.zeros((2, 3), np.float32)
    turned = write(tmp_path / "t.pt", torch, {"a": Rebuilt(array, "0", strides=(1, 2))}, {"0": array})
    with pytest.raises(ValueError, match=r"a is not stored row after row, but with strides \(1, 2\)"):
        pickled_tensors(turned)
    (tmp_path / "old.pt").write_bytes(b"\x80\x02\x8a")
    with pytest.raises(ValueError, match=r"old\.pt must be a checkpoint that PyTorch 1\.6 or later wrote"):
        pickled_tensors(tmp_path / "old.pt")
    with pytest.raises(ValueError, match="it holds no dictionary of tensors"):
        pickled_tensors(write(tmp_path / "none.pt", torch, [1, 2], {}))
