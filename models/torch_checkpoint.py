"""Reads the tensors of a legacy PyTorch checkpoint without PyTorch and without executing code.

A `.pth` file is a chain of pickles followed by raw storages, and a pickle may name any callable to run. This reader
resolves just the four names that a state dict of tensors needs, hands out numpy arrays, and refuses everything else, so
weights from an installed package can be used without trusting them with the interpreter. Called by the backbones that
bring their ImageNet weights as such a file.

Source: the layout that `torch.save(..., _use_new_zipfile_serialization=False)` writes,
https://github.com/pytorch/pytorch/blob/main/torch/serialization.py
"""

import collections
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_STORAGE_DTYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}


class _Storage:
    """One flat buffer; its values follow the pickles at the end of the file."""

    def __init__(self, dtype: np.dtype, num_elements: int):
        self.dtype = dtype
        self.num_elements = num_elements
        self.values: np.ndarray | None = None


class _Tensor:
    """A strided view of a storage, as `torch._utils._rebuild_tensor_v2` describes it."""

    def __init__(self, storage: _Storage, offset: int, size: tuple, stride: tuple, *unused_autograd_state: Any):
        self.storage = storage
        self.offset = offset
        self.size = tuple(size)
        self.stride = tuple(stride)

    def to_numpy(self) -> np.ndarray:
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        if self.offset < 0 or min(self.stride, default=0) < 0 or last >= self.storage.num_elements:
            raise ValueError(
                f"Expected a tensor inside its storage of {self.storage.num_elements} values. "
                f"Received: offset={self.offset}, size={self.size}, stride={self.stride}."
            )
        strides = [s * self.storage.dtype.itemsize for s in self.stride]
        view = np.lib.stride_tricks.as_strided(self.storage.values[self.offset :], self.size, strides)
        return view.copy()


class _StateDictUnpickler(pickle.Unpickler):
    """Resolves OrderedDict, tensors and typed storages; any other name in the file is refused."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise pickle.UnpicklingError(
            f"Expected a checkpoint that holds tensors only. Received one that names `{module}.{name}`."
        )

    def persistent_load(self, persistent_id: tuple) -> _Storage:
        kind, dtype, key, _location, num_elements, _view = persistent_id
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"Expected a tensor's storage. Received: {persistent_id!r}.")
        return self.storages.setdefault(key, _Storage(dtype, num_elements))


def read_state_dict(path: str | Path, *, sha256: str) -> dict[str, np.ndarray]:
    """Reads a state dict from a legacy PyTorch checkpoint.

    Args:
      path: the `.pth` file.
      sha256: hexadecimal digest that the file must have.

    Returns:
      Parameter name -> array in PyTorch's layout (a convolution's kernel is [out, in, height, width]).

    Raises:
      ValueError: if the digest differs or the file is no legacy checkpoint.
      pickle.UnpicklingError: if the file names anything besides tensors and dicts.
    """
    found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(
            f"Expected the weights file {path} to have the SHA-256 digest {sha256}. Received: {found}. "
            "The file is damaged or not the one that this project was tested with: reinstall its package."
        )
    with open(path, "rb") as file:
        header = [_StateDictUnpickler(file).load() for _ in range(2)]
        if header != [_MAGIC_NUMBER, _PROTOCOL_VERSION]:
            raise ValueError(f"Expected {path} to be a legacy PyTorch checkpoint. Received: header={header!r}.")
        _StateDictUnpickler(file).load()  # the writer's byte order and type sizes; always little-endian in practice
        unpickler = _StateDictUnpickler(file)
        tensors = unpickler.load()
        for key in _StateDictUnpickler(file).load():
            storage = unpickler.storages[key]
            num_elements = int.from_bytes(file.read(8), "little")
            if num_elements != storage.num_elements:
                raise ValueError(
                    f"Expected {storage.num_elements} values in storage {key} of {path}. Received: {num_elements}."
                )
            content = file.read(num_elements * storage.dtype.itemsize)
            if len(content) != num_elements * storage.dtype.itemsize:
                raise ValueError(f"Expected {num_elements} values in storage {key} of {path}. Received: a file cut short.")
            storage.values = np.frombuffer(content, storage.dtype)
    return {name: tensor.to_numpy() for name, tensor in tensors.items()}
