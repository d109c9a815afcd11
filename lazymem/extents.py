# SPDX-License-Identifier: Apache-2.0
"""Where in memory an object's bytes lie: numpy arrays, torch tensors, and whatever has a buffer.

A leaf, which touches none of those bytes and imports no torch."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

Extent = tuple[int, int]  # addresses: first byte, one after the last

#: No chunk is smaller, so a gap that is holds no chunk of its own, and is not worth an extent.
_GAP: Final = 64 << 10


def extents_of(what: object) -> list[Extent] | None:
    """The bytes that an array, tensor or buffer shows, in ascending order; gaps of less than 64 KiB included.

    Empty for what has no elements, or none in this process's main memory. None for what is no such object.
    """
    found = _placed(what)
    return None if found is None else _runs(*found)


def _placed(what: Any) -> tuple[int, tuple[int, ...], tuple[int, ...], int] | None:
    """Address of the first element, shape, strides in bytes, size of an element."""
    if isinstance(what, np.ndarray):
        return what.__array_interface__["data"][0], what.shape, what.strides, what.dtype.itemsize
    if all(hasattr(what, name) for name in ("data_ptr", "stride", "element_size")):
        return _tensor(what)
    try:
        view = memoryview(what)
    except (TypeError, BufferError):
        return None
    with view:
        if not view.contiguous:
            array = np.asarray(view)
            return array.__array_interface__["data"][0], array.shape, array.strides, array.itemsize
        flat: np.ndarray[Any, Any] = np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)
        return flat.__array_interface__["data"][0], flat.shape, flat.strides, 1


def _tensor(tensor: Any) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    nothing = (0, (0,), (1,), 1)
    try:
        if tensor.device.type != "cpu":
            return nothing
        size = int(tensor.element_size())
        return tensor.data_ptr(), tuple(tensor.shape), tuple(step * size for step in tensor.stride()), size
    except (RuntimeError, NotImplementedError):  # sparse, or a wrapper without memory of its own
        return nothing


def _runs(address: int, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> list[Extent]:
    if 0 in shape or not itemsize:
        return []
    steps = [(abs(step), length) for step, length in zip(strides, shape, strict=True) if step and length > 1]
    address += sum((length - 1) * step for step, length in zip(strides, shape, strict=True) if step < 0)
    run = itemsize
    apart: list[tuple[int, int]] = []
    for step, length in sorted(steps):
        if not apart and step - run < _GAP:
            run += (length - 1) * step
        else:
            apart.append((step, length))
    starts = np.zeros(1, np.int64)
    for step, length in apart:
        starts = np.add.outer(starts, np.arange(length) * step).ravel()
    starts.sort()
    assert len(starts) == math.prod(length for _, length in apart)
    return [(address + start, address + start + run) for start in starts.tolist()]
