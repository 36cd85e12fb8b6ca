import builtins
import collections
import hashlib
import os
import pickle
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from models.torch_checkpoint import read_state_dict

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001


class _Storage:
    def __init__(self, key: str, values: np.ndarray, kind: str = "FloatStorage"):
        self.key, self.values, self.kind = key, values, kind


class _Tensor:
    """Pickles as `torch.save` has it: a call of `_rebuild_tensor_v2` on a storage that is named, not contained."""

    def __init__(self, storage: _Storage, offset: int, size: tuple, stride: tuple):
        self.arguments = (storage, offset, size, stride, False, collections.OrderedDict())

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


class _Call:
    """Pickles as a call of a function: what an attacker would put into a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        if not isinstance(value, _Storage):
            return None
        kind = getattr(sys.modules["torch"], value.kind)
        return ("storage", kind, value.key, "cpu", len(value.values), None)


@pytest.fixture(autouse=True)
def _named_torch(monkeypatch):
    """Modules under PyTorch's names, so that the pickles name its functions; PyTorch itself is not needed."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "LongStorage", "HalfStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2():
        raise AssertionError("only named, never called")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


def _write(path: Path, state, storages, *, header=(MAGIC_NUMBER, PROTOCOL_VERSION), keys=None, cut: int = 0) -> str:
    """Writes a legacy checkpoint and returns its digest."""
    with open(path, "wb") as file:
        for part in (*header, {"little_endian": True}, state, keys or [storage.key for storage in storages]):
            _Pickler(file, protocol=2).dump(part)
        for storage in storages:
            file.write(len(storage.values).to_bytes(8, "little") + storage.values.tobytes())
        file.truncate(file.tell() - cut)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "weights.pth"


def test_read_state_dict_reads_tensors_of_each_type(path):
    weights = _Storage("1", np.arange(24, dtype="<f4"))
    steps = _Storage("2", np.array([7, 8], "<i8"), "LongStorage")
    state = collections.OrderedDict(kernel=_Tensor(weights, 0, (2, 3, 4), (12, 4, 1)), steps=_Tensor(steps, 0, (2,), (1,)))

    found = read_state_dict(path, sha256=_write(path, state, [weights, steps]))

    assert list(found) == ["kernel", "steps"]
    assert found["kernel"].dtype == np.float32
    np.testing.assert_array_equal(found["kernel"], np.arange(24).reshape(2, 3, 4))
    assert found["steps"].dtype == np.int64
    np.testing.assert_array_equal(found["steps"], [7, 8])


def test_read_state_dict_reads_a_scalar(path):
    storage = _Storage("1", np.array([7], "<i8"), "LongStorage")
    state = {"num_batches_tracked": _Tensor(storage, 0, (), ())}

    found = read_state_dict(path, sha256=_write(path, state, [storage]))

    assert found["num_batches_tracked"] == 7
    assert found["num_batches_tracked"].shape == ()


def test_read_state_dict_reads_views_that_share_a_storage(path):
    storage = _Storage("1", np.arange(12, dtype="<f4"))
    state = {"transposed": _Tensor(storage, 0, (4, 3), (1, 4)), "tail": _Tensor(storage, 10, (2,), (1,))}

    found = read_state_dict(path, sha256=_write(path, state, [storage]))

    np.testing.assert_array_equal(found["transposed"], np.arange(12).reshape(3, 4).T)
    np.testing.assert_array_equal(found["tail"], [10, 11])
    assert found["transposed"].flags.c_contiguous


def test_read_state_dict_refuses_another_digest(path):
    storage = _Storage("1", np.zeros(1, "<f4"))
    digest = _write(path, {"x": _Tensor(storage, 0, (1,), (1,))}, [storage])
    wrong = "0" * 64

    with pytest.raises(ValueError, match=f"to have the SHA-256 digest {wrong}. Received: {digest}. The file is damaged"):
        read_state_dict(path, sha256=wrong)


@pytest.mark.parametrize("place", ["header", "state", "keys"])
@pytest.mark.parametrize(
    ("function", "name"), [(os.system, f"{os.system.__module__}.system"), (builtins.eval, "builtins.eval")]
)
def test_read_state_dict_refuses_to_call_what_a_file_names(path, tmp_path, place, function, name):
    marker = tmp_path / "executed"
    command = f"touch '{marker}'" if function is os.system else f"open({str(marker)!r}, 'w')"
    evil, storage = _Call(function, command), _Storage("1", np.zeros(1, "<f4"))
    digest = _write(
        path,
        {"x": evil} if place == "state" else {"x": _Tensor(storage, 0, (1,), (1,))},
        [storage],
        header=(evil, PROTOCOL_VERSION) if place == "header" else (MAGIC_NUMBER, PROTOCOL_VERSION),
        keys=[evil] if place == "keys" else None,
    )
    # The attack works on a reader that trusts the file, so that a refusal means something.
    pickle.loads(pickle.dumps(evil, protocol=2))
    assert marker.exists()
    marker.unlink()

    # Protocol 2 writes the names that Python 2 had.
    python_2_name = name.replace("builtins.", "__builtin__.")
    with pytest.raises(pickle.UnpicklingError, match="that holds tensors only") as caught:
        read_state_dict(path, sha256=digest)

    assert f"`{name}`" in str(caught.value) or f"`{python_2_name}`" in str(caught.value)
    assert not marker.exists()


def test_read_state_dict_refuses_a_storage_of_another_type(path):
    storage = _Storage("1", np.zeros(2, "<f2"), "HalfStorage")
    digest = _write(path, {"x": _Tensor(storage, 0, (2,), (1,))}, [storage])

    with pytest.raises(pickle.UnpicklingError, match=r"names `torch\.HalfStorage`"):
        read_state_dict(path, sha256=digest)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (5,), (1,)), (3, (2,), (1,)), (0, (2, 2), (3, 1)), (-1, (2,), (1,)), (3, (2,), (-1,))],
)
def test_read_state_dict_refuses_a_tensor_outside_of_its_storage(path, offset, size, stride):
    storage = _Storage("1", np.zeros(4, "<f4"))
    digest = _write(path, {"x": _Tensor(storage, offset, size, stride)}, [storage])

    received = f"Received: offset={offset}, size={size}, stride={stride}."
    with pytest.raises(ValueError, match=re.escape(f"Expected a tensor inside its storage of 4 values. {received}")):
        read_state_dict(path, sha256=digest)


def test_read_state_dict_refuses_another_magic_number(path):
    digest = _write(path, {}, [], header=(1, PROTOCOL_VERSION))

    with pytest.raises(ValueError, match=r"to be a legacy PyTorch checkpoint. Received: header=\[1, 1001\]"):
        read_state_dict(path, sha256=digest)


def test_read_state_dict_refuses_a_storage_of_another_length(path):
    declared, stored = _Storage("1", np.zeros(4, "<f4")), _Storage("1", np.zeros(3, "<f4"))
    digest = _write(path, {"x": _Tensor(declared, 0, (4,), (1,))}, [stored])

    with pytest.raises(ValueError, match=r"Expected 4 values in storage 1 of .*weights\.pth\. Received: 3\."):
        read_state_dict(path, sha256=digest)


@pytest.mark.parametrize("cut", [4, 6, 16])
def test_read_state_dict_refuses_a_file_that_is_cut_off(path, cut):
    storage = _Storage("1", np.ones(4, "<f4"))
    digest = _write(path, {"x": _Tensor(storage, 0, (4,), (1,))}, [storage], cut=cut)

    with pytest.raises(ValueError, match=r"Expected 4 values in storage 1 .*cut short"):
        read_state_dict(path, sha256=digest)
