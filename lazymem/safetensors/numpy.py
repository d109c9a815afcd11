# SPDX-License-Identifier: Apache-2.0
"""`safetensors.numpy`: what reads is lazymem's, the rest the package's own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import package
from .errors import UnsupportedTensor
from .handle import StrPath, safe_open
from .memory import arrays_in


def load_file(filename: StrPath, *, backend: str = "mmap", **options: Any) -> dict[str, NDArray[Any]]:
    """All arrays of a file by name: writable, private, read when they are touched.

    options: further ones of `safe_open`. Raises as `safe_open`, and `UnsupportedTensor`.
    """
    with safe_open(filename, "np", backend=backend, **options) as file:
        return file.get_tensors()


def load(data: bytes) -> dict[str, NDArray[Any]]:
    """All arrays in the bytes of a file, copied. Raises `TypeError`, `SafetensorError`."""
    loaded = {}
    for name, (array, entry) in arrays_in(data).items():
        if entry.metadata and array.dtype == np.uint8:
            raise UnsupportedTensor(f"numpy has no dtype for {entry.metadata.get('dtype')}, tensor {name}")
        loaded[name] = array
    return loaded


def __getattr__(name: str) -> Any:
    return package.attribute("numpy", name)
