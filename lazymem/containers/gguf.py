# SPDX-License-Identifier: Apache-2.0
"""GGUF, the files of llama.cpp and ggml: versions 2 and 3, little-endian.

A file is a header (magic, version, counts), key-values, tensor infos, and the tensors' bytes, each at a
multiple of `general.alignment` (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Dimensions
count from the innermost; shapes here are numpy's, the other way round.

Quantised tensors are shown as their raw blocks, as the `gguf` package shows them: uint8, the last dimension
the bytes of one row. `ArrayEntry.metadata` keeps the type's name and the shape in numbers.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np

from ..store import locations
from ..store.base import Blob
from .base import MAX_NDIM, ArrayEntry, Directory, array_size, damaged, unsupported

MAGIC: Final = b"GGUF"
SUFFIX: Final = ".gguf"
#: Bytes before the tensors, and numbers and strings in arrays of the key-values, which become objects of
#: Python's: a vocabulary of 256 Ki words with types, scores and merges fits three times over.
MAX_HEADER: Final = 256 << 20
MAX_ELEMENTS: Final = 1 << 22

_VERSIONS: Final = (2, 3)
_DEFAULT_ALIGNMENT: Final = 32
_ALIGNMENT: Final = "general.alignment"
_MAX_KEY: Final = 65_535
_MAX_DEPTH: Final = 4  # of arrays in arrays
_LEAST_KEY_VALUE: Final = 8 + 4 + 1
_LEAST_TENSOR: Final = 8 + 4 + 4 + 8
_HEADER: Final = "the header"
_UINT8: Final = np.dtype(np.uint8)


class TensorType(NamedTuple):
    """One of ggml's types: `block` numbers take `size` bytes. dtype: numpy's, None for quantised ones."""

    name: str
    block: int
    size: int
    dtype: np.dtype[Any] | None = None


def _plain(name: str, dtype: Any) -> TensorType:
    return TensorType(name, 1, np.dtype(dtype).itemsize, np.dtype(dtype))


#: By number, from ggml.h (enum ggml_type) and its blocks' sizes.
TYPES: Final = {
    0: _plain("F32", "<f4"),
    1: _plain("F16", "<f2"),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    9: TensorType("Q8_1", 32, 40),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    15: TensorType("Q8_K", 256, 292),
    16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74),
    18: TensorType("IQ3_XXS", 256, 98),
    19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18),
    21: TensorType("IQ3_S", 256, 110),
    22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136),
    24: _plain("I8", "i1"),
    25: _plain("I16", "<i2"),
    26: _plain("I32", "<i4"),
    27: _plain("I64", "<i8"),
    28: _plain("F64", "<f8"),
    29: TensorType("IQ1_M", 256, 56),
    30: _plain("BF16", ml_dtypes.bfloat16),
    34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66),
    39: TensorType("MXFP4", 32, 17),
    40: TensorType("NVFP4", 64, 36),
    41: TensorType("Q1_0", 128, 18),
}

#: The key-values' types that have a fixed size; two more are strings and arrays.
_SCALARS: Final[dict[int, np.dtype[Any]]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_BOOL: Final = 7
_STRING: Final = 8
_ARRAY: Final = 9
_UINT32: Final = 4


def read_gguf(blob: Blob, head: bytes) -> Directory:
    """The directory of a GGUF file. head: as `read_head` gives it.

    The header is read in growing ranges: a remote file with a large vocabulary costs three or four requests.
    """
    cursor = _Cursor(blob, head)
    if cursor.take(4) != MAGIC:
        raise damaged(blob.url, _HEADER, "does not begin with GGUF")
    version = cursor.number("<I")
    if version & 0xFFFF == 0:
        raise unsupported(
            blob.url, _HEADER, "is big-endian", "convert the file with gguf's gguf_convert_endian"
        )
    if version not in _VERSIONS:
        advice = "convert the model again with a newer llama.cpp" if version < 2 else "upgrade lazymem"
        raise unsupported(blob.url, _HEADER, f"has version {version}", advice)
    tensors = cursor.count("tensors", _LEAST_TENSOR)
    pairs = cursor.count("key-values", _LEAST_KEY_VALUE)
    metadata, alignment = _read_metadata(cursor, pairs)
    infos = [_read_info(cursor) for _ in range(tensors)]
    start = -(-cursor.position // alignment) * alignment
    return Directory(
        "gguf", (blob,), (locations.name_of(blob.url),), _entries(blob, infos, start, alignment), metadata
    )


class _Cursor:
    """Reads the header front to back; never beyond the file, nor beyond `MAX_HEADER`."""

    def __init__(self, blob: Blob, head: bytes) -> None:
        self.blob = blob
        self.position = 0
        self.elements = 0  # of arrays, so far
        self.data = head

    def need(self, length: int) -> None:
        """See to it that `data` has that many bytes from `position`."""
        end = self.position + length
        if end <= len(self.data):
            return
        if end > self.blob.size:
            found = f"needs {length} bytes at byte {self.position}, the file has {self.blob.size}"
            raise damaged(self.blob.url, _HEADER, found)
        if end > MAX_HEADER:
            raise unsupported(
                self.blob.url, _HEADER, f"has more than {MAX_HEADER} bytes", "make its metadata smaller"
            )
        wanted = min(max(end, 4 * len(self.data)), self.blob.size, MAX_HEADER)
        self.data += self.blob.read(len(self.data), wanted - len(self.data))

    def take(self, length: int) -> bytes:
        self.need(length)
        begin, self.position = self.position, self.position + length
        return self.data[begin : self.position]

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def count(self, what: str, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        value = self.number("<Q")
        if value > (self.blob.size - self.position) // least:
            raise damaged(self.blob.url, _HEADER, f"counts {value} {what} in {self.blob.size} bytes")
        return value

    def text(self, what: str, most: int) -> bytes:
        length = self.number("<Q")
        if length > most:
            raise damaged(self.blob.url, what, f"has {length} bytes (the limit is {most})")
        return self.take(length)


# ---- key-values ----


def _read_metadata(cursor: _Cursor, pairs: int) -> tuple[dict[str, Any], int]:
    """All of them, as JSON has them, and the alignment."""
    metadata: dict[str, Any] = {}
    alignment = _DEFAULT_ALIGNMENT
    for _ in range(pairs):
        key = _name(cursor, "a key")
        field = f"key {key[:200]!r}"
        if key in metadata:
            raise damaged(cursor.blob.url, field, "stands twice")
        kind = cursor.number("<I")
        value = _read_value(cursor, kind, field, 0)
        metadata[key] = value
        if key == _ALIGNMENT:
            if kind != _UINT32 or value < 1 or value & (value - 1):
                raise damaged(cursor.blob.url, field, f"is {value!r}, not a power of two of type uint32")
            alignment = value
    return metadata, alignment


def _name(cursor: _Cursor, what: str) -> str:
    try:
        return cursor.text(what, _MAX_KEY).decode("utf-8")
    except UnicodeDecodeError:
        raise damaged(cursor.blob.url, what, "is no text (not UTF-8)") from None


def _read_value(cursor: _Cursor, kind: int, field: str, depth: int) -> Any:
    if kind == _STRING:
        return _shown(cursor.text(field, MAX_HEADER))
    if kind == _ARRAY:
        if depth == _MAX_DEPTH:
            raise damaged(cursor.blob.url, field, f"has arrays within arrays more than {_MAX_DEPTH} deep")
        inner, count = cursor.number("<I"), cursor.number("<Q")
        cursor.elements += count
        if cursor.elements > MAX_ELEMENTS:
            found = f"and those before it have more than {MAX_ELEMENTS} elements"
            raise unsupported(cursor.blob.url, field, found, "make the file's metadata smaller")
        if inner in _SCALARS:
            return _read_numbers(cursor, inner, field, count)
        if inner == _STRING:
            return _read_strings(cursor, field, count)
        return [_read_value(cursor, inner, field, depth + 1) for _ in range(count)]
    if kind not in _SCALARS:
        raise unsupported(cursor.blob.url, field, f"is of type {kind}", "upgrade lazymem")
    return _read_numbers(cursor, kind, field, 1)[0]


def _read_numbers(cursor: _Cursor, kind: int, field: str, count: int) -> list[Any]:
    dtype = _SCALARS[kind]
    content = cursor.take(count * dtype.itemsize)
    if kind == _BOOL and content.strip(b"\0\1"):
        raise damaged(cursor.blob.url, field, "has a bool that is neither 0 nor 1")
    values: list[Any] = np.frombuffer(content, dtype).tolist()
    if dtype.kind == "f":
        return [value if math.isfinite(value) else str(value) for value in values]  # JSON has no others
    return values


def _read_strings(cursor: _Cursor, field: str, count: int) -> list[str]:
    # Vocabularies have hundreds of thousands: this loop is most of the time to open a file.
    strings = []
    length_at: Callable[[bytes, int], tuple[int]] = struct.Struct("<Q").unpack_from
    position, data = cursor.position, cursor.data
    for _ in range(count):
        if position + 8 > len(data):
            cursor.position = position
            cursor.need(8)
            data = cursor.data
        (length,) = length_at(data, position)
        position += 8
        if position + length > len(data):
            cursor.position = position
            cursor.need(length)
            data = cursor.data
        strings.append(_shown(data[position : position + length]))
        position += length
    cursor.position = position
    return strings


def _shown(content: bytes) -> str:
    """Text; tokens need not be any, and what is none is spelt out."""
    return content.decode("utf-8", errors="backslashreplace")


# ---- tensors ----


class _Info(NamedTuple):
    name: str
    shape: list[int]
    kind: int
    offset: int


def _read_info(cursor: _Cursor) -> _Info:
    name = _name(cursor, "a tensor's name")
    ndim = cursor.number("<I")
    if ndim > MAX_NDIM:
        raise damaged(cursor.blob.url, _tensor(name), f"has {ndim} dimensions (the limit is {MAX_NDIM})")
    dimensions = struct.unpack(f"<{ndim}Q", cursor.take(8 * ndim))
    return _Info(name, list(reversed(dimensions)), cursor.number("<I"), cursor.number("<Q"))


def _tensor(name: str) -> str:
    return f"tensor {name[:200]!r}"


def _entries(blob: Blob, infos: list[_Info], start: int, alignment: int) -> list[ArrayEntry]:
    """In the order in which they lie. start: of the tensors' bytes."""
    entries: list[ArrayEntry] = []
    names: set[str] = set()
    for info in infos:
        if info.name in names:
            raise damaged(blob.url, _tensor(info.name), "stands twice")
        names.add(info.name)
        entries.append(_entry(blob, info, start, alignment))
    # The size breaks ties: an empty tensor lies before the one that begins where it does.
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    end, before = 0, ""
    for entry in entries:
        if entry.nbytes and entry.offset < end:
            raise damaged(blob.url, _tensor(entry.name), f"overlaps {_tensor(before)}")
        end, before = max(end, entry.offset + entry.nbytes), entry.name
    return entries


def _entry(blob: Blob, info: _Info, start: int, alignment: int) -> ArrayEntry:
    name, shape, kind, offset = info
    found = TYPES.get(kind)
    if found is None:
        raise unsupported(
            blob.url, _tensor(name), f"is of ggml's type {kind}", "upgrade lazymem, or quantise it otherwise"
        )
    if found.dtype is not None:
        dtype, shown, own = found.dtype, tuple(shape), None
    else:
        if not shape or shape[-1] % found.block:
            rows = f"is {found.name} of shape {str(shape)[:200]}, whose rows are no blocks of {found.block}"
            raise damaged(blob.url, _tensor(name), rows)
        dtype, shown = _UINT8, (*shape[:-1], shape[-1] // found.block * found.size)
        own = {"dtype": found.name, "shape": shape}
    nbytes = array_size(shown, dtype.itemsize)
    if nbytes is None or array_size(shape, 1) is None:
        raise damaged(blob.url, _tensor(name), f"has the impossible shape {str(shape)[:200]}")
    if offset % alignment:
        raise damaged(blob.url, _tensor(name), f"begins at byte {offset}, no multiple of {alignment}")
    if offset > max(0, blob.size - start) or nbytes > max(0, blob.size - start - offset):
        lies = f"needs {nbytes} bytes at byte {start + offset}, the file has {blob.size}"
        raise damaged(blob.url, _tensor(name), lies)
    entry = ArrayEntry(name, dtype, shown, "C", 0, start + offset, nbytes, nbytes)
    return entry if own is None else entry._replace(metadata=own)
