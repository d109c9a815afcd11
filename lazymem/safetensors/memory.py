# SPDX-License-Identifier: Apache-2.0
"""A file that is already in memory, as bytes: what `load` and `deserialize` read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..containers.base import ArrayEntry
from ..containers.safetensors import dtype_name, read_safetensors
from .errors import SafetensorError, both_kinds


class _Bytes:
    """Implements `store.base.Blob` over bytes."""

    url = "the given bytes"
    identity = ""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]

    def read_into(self, offset: int, out: memoryview) -> None:
        out[:] = self._data[offset : offset + len(out)]

    def has_changed(self) -> bool:
        return False

    def fileno(self) -> None:
        return None

    def close(self) -> None:
        pass


def _entries(data: object) -> list[ArrayEntry]:
    if not isinstance(data, bytes):
        raise TypeError(f"argument 'bytes': {type(data).__name__!r} object is not an instance of 'bytes'")
    with both_kinds():
        return list(read_safetensors(_Bytes(data), data).arrays)


def arrays_in(data: bytes) -> dict[str, tuple[NDArray[Any], ArrayEntry]]:
    """Each tensor as a writable array with memory of its own, and what the file says of it.

    Raises `TypeError` for anything but bytes, and `SafetensorError`.
    """
    return {entry.name: (_copy(data, entry), entry) for entry in _entries(data)}


def _copy(data: bytes, entry: ArrayEntry) -> NDArray[Any]:
    own = bytearray(memoryview(data)[entry.offset : entry.offset + entry.nbytes])
    return np.ndarray(entry.shape, entry.dtype, buffer=own)


def deserialize(bytes: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Names, and {"shape": list, "dtype": str, "data": bytearray}, of the tensors in a file's bytes.

    Raises `TypeError` for anything but bytes, and `SafetensorError`.
    """
    found = []
    for entry in _entries(bytes):
        named = dtype_name(entry.dtype, entry.shape, entry.metadata)
        if named is None:
            raise SafetensorError(f"tensor {entry.name}: {entry.dtype} is no dtype of the format")
        dtype, shape = named
        own = bytearray(memoryview(bytes)[entry.offset : entry.offset + entry.nbytes])
        found.append((entry.name, {"shape": shape, "dtype": dtype, "data": own}))
    return found
