# SPDX-License-Identifier: Apache-2.0
"""Views: a name, dtype, shape and strides for bytes that another array holds. A leaf: the arithmetic of
strides, and its checks, for containers, the snapshot file and memory alike."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Bytes copied at once.
PIECE: Final = 4 << 20

_MAX_BYTES: Final = 1 << 62
_MAX_NDIM: Final = 64  # numpy's
_IN_MEMORY: Final = 64 << 20
_NO_METADATA: Final[Mapping[str, Any]] = {}


class View(NamedTuple):
    """Tied weights, a slice of a storage, a transposed or channels-last tensor.

    array: the name of the array, maybe a hidden one, whose bytes these are. offset: of the first element,
    in bytes from that array's first. shape in elements; strides in bytes, none negative, 0 where a
    dimension repeats. metadata: as an array's.
    """

    name: str
    array: str
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    metadata: Mapping[str, Any] = _NO_METADATA

    @property
    def span(self) -> int:
        """Bytes from the first to the last that it shows."""
        return span_of(self.shape, self.strides, self.dtype.itemsize)

    @property
    def order(self) -> str | None:
        """ "C" or "F" where its bytes follow one another in that order, else None."""
        return order_of(self.shape, self.strides, self.dtype.itemsize)


def problem_of(view: View, base_nbytes: int) -> str | None:
    """Why `view`, whose numbers may be anything, cannot lie in an array of so many bytes; None if it can."""
    shape, strides = view.shape, view.strides
    if len(shape) != len(strides):
        return f"has {len(shape)} lengths and {len(strides)} strides"
    if len(shape) > _MAX_NDIM:
        return f"has {len(shape)} dimensions, where {_MAX_NDIM} are the most"
    # A bool is no length, and Python integers do not overflow.
    if any(type(number) is not int or number < 0 for number in (*shape, *strides, view.offset)):
        return "has a length, stride or offset that is no number from 0"
    size = view.dtype.itemsize
    for length in shape:
        size *= length or 1
    if size > _MAX_BYTES or any(stride > _MAX_BYTES for stride in strides):
        return "has an impossible shape"
    if view.offset + view.span > base_nbytes:
        return f"needs {view.span} bytes from byte {view.offset} of {view.array!r}, which has {base_nbytes}"
    return None


def span_of(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Bytes from the first element's first to the last one's last; 0 without elements."""
    if 0 in shape:
        return 0
    return itemsize + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


def order_of(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> str | None:
    """ "C" or "F" where elements follow one another without gap in that order, C if in both; else None."""
    if 0 in shape:
        return "C"
    for order, step in (("C", -1), ("F", 1)):
        expected = itemsize
        for length, stride in list(zip(shape, strides, strict=True))[::step]:
            if length != 1:
                if stride != expected:
                    break
                expected *= length
        else:
            return order
    return None


def show(
    data: Any, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...] | None, order: str
) -> NDArray[Any]:
    """`data`, a buffer that begins with the first element, as an array. strides None: contiguous."""
    if strides is not None:
        return np.ndarray(shape, dtype, buffer=data, strides=strides)
    ordered: Any = order
    return np.ndarray(shape, dtype, buffer=data, order=ordered)


def pieces_in_c_order(array: NDArray[Any]) -> Iterator[NDArray[np.uint8]]:
    """The array's bytes in C order. Copies at most a piece at a time, whatever the strides."""
    if array.nbytes == 0:
        return
    if array.flags.c_contiguous:
        flat = array.reshape(-1).view(np.uint8)
        for begin in range(0, len(flat), PIECE):
            yield flat[begin : begin + PIECE]
        return
    rows = PIECE // (array.nbytes // len(array))
    if rows == 0:
        for part in array:
            yield from pieces_in_c_order(part)
        return
    for begin in range(0, len(array), rows):
        part = np.ascontiguousarray(array[begin : begin + rows])
        yield part.reshape(-1).view(np.uint8)


def gather(
    stored: Iterable[Any], nbytes: int, dtype: np.dtype[Any], shape: tuple[int, ...],
    strides: tuple[int, ...] | None, order: str,
) -> Iterator[NDArray[np.uint8]]:  # fmt: skip
    """The elements in C order, as pieces of bytes. stored: the `nbytes` bytes that they lie in, in pieces.

    Elements come from anywhere in these bytes, so they are kept until the last is out: in memory, or in
    a temporary file that has no name, so that a view of any size fits.
    """
    if nbytes == 0:
        return
    with contextlib.ExitStack() as stack:
        kept: BinaryIO = io.BytesIO()
        if nbytes > _IN_MEMORY:
            import tempfile  # rarely: and it brings a dozen modules along

            kept = stack.enter_context(tempfile.TemporaryFile())
        for piece in stored:
            kept.write(piece)
        kept.flush()
        data: Any = kept.getbuffer() if isinstance(kept, io.BytesIO) else np.memmap(kept, np.uint8, "r")
        yield from pieces_in_c_order(show(data, dtype, shape, strides, order))
