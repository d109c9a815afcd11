# SPDX-License-Identifier: Apache-2.0
"""safetensors files.

A file is 8 bytes of header length, a JSON header, and a buffer that the tensors cover without hole
or overlap (https://github.com/huggingface/safetensors, "Format"). The rules here are those that the
`safetensors` package enforces, and stricter in three points: a key may not stand twice, a tensor is
an object and not a list, and its shape is one that numpy can have.

F4 and F6 tensors are packed: numpy can only show their bytes. Such an array is uint8; its last
dimension counts the bytes of one row where a row fills whole bytes, else it has one dimension, all
bytes. `ArrayEntry.metadata` keeps the tensor's own "dtype" and "shape".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, Final, NoReturn

import ml_dtypes
import numpy as np

from ..errors import BuildError
from ..store import locations
from ..store.base import Blob
from .base import ArrayEntry, Directory, array_size, damaged, unsupported
from .strict_json import load_json

SUFFIX: Final = ".safetensors"
MAX_HEADER: Final = 100_000_000  # the package's limit

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(scalar)
    for name, scalar in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "I16": "<i2",
        "U16": "<u2",
        "F16": "<f2",
        "BF16": ml_dtypes.bfloat16,
        "I32": "<i4",
        "U32": "<u4",
        "F32": "<f4",
        "C64": "<c8",
        "F64": "<f8",
        "I64": "<i8",
        "U64": "<u8",
    }.items()
}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
PACKED_BITS: Final = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

_UINT8: Final = np.dtype(np.uint8)
_HEADER: Final = "the header"


def looks_like(head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes that begins with `head` can be a safetensors file."""
    length = int.from_bytes(head[:8], "little")
    return len(head) > 8 and 2 <= length <= min(MAX_HEADER, size - 8) and head[8:9] == b"{"


def read_safetensors(blob: Blob, head: bytes) -> Directory:
    """The directory of one safetensors file. head: as `read_head` gives it."""
    arrays, metadata = _parse(blob, head)
    return Directory("safetensors", (blob,), (locations.name_of(blob.url),), arrays, metadata)


def make_header(tensors: Sequence[tuple[str, str, Sequence[int], int]], metadata: dict[str, str]) -> bytes:
    """Length and JSON of a file that holds the tensors (name, dtype, shape, nbytes) in this order.

    Raises `BuildError` if the format cannot hold so many, or one of that name.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, kind, shape, nbytes in tensors:
        if name == "__metadata__":
            raise BuildError(f"no tensor in a safetensors file can be called {name!r}; use another format")
        offsets = [position, position + nbytes]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": offsets}
        position += nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    if len(text) > MAX_HEADER:
        raise BuildError(f"the safetensors header would have {len(text)} bytes (the limit is {MAX_HEADER})")
    return len(text).to_bytes(8, "little") + text


def dtype_name(
    dtype: np.dtype[Any], shape: tuple[int, ...], own: Mapping[str, Any]
) -> tuple[str, list[int]] | None:
    """What the format calls `dtype`, and the shape it gives; None if it has no such dtype.

    own: the array's metadata, which keeps the dtype and shape of a tensor that is packed.
    """
    bits, packed = PACKED_BITS.get(str(own.get("dtype"))), own.get("shape")
    if bits and dtype == _UINT8 and isinstance(packed, list):
        count = array_size(packed, 1)
        if count is not None and count * bits == 8 * math.prod(shape):
            return str(own["dtype"]), packed
    name = _NAMES.get(dtype)
    return None if name is None else (name, list(shape))


def _parse(blob: Blob, head: bytes) -> tuple[list[ArrayEntry], dict[str, str]]:
    """The arrays of one safetensors file, sorted by offset, and its __metadata__."""
    url, size = blob.url, blob.size
    if len(head) < 8:
        raise damaged(url, _HEADER, f"has a length of 8 bytes, but the file has {size}")
    length = int.from_bytes(head[:8], "little")
    if length > min(MAX_HEADER, size - 8):
        raise damaged(url, _HEADER, f"has {length} bytes (the limit is {MAX_HEADER}), the file {size}")
    start = 8 + length
    text = head[8:start] if start <= len(head) else blob.read(8, length)
    header = load_json(text, url, _HEADER)
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(url, "__metadata__", "is not an object of strings")
    entries = [_entry(url, name, info, start, size - start) for name, info in header.items()]
    # The size breaks ties: an empty tensor lies before the one that begins where it does.
    entries.sort(key=attrgetter("offset", "nbytes"))
    position = start
    for entry in entries:
        if entry.offset != position:
            found = f"begins at byte {entry.offset - start} of the buffer, though {position - start} is next"
            raise damaged(url, _tensor(entry.name), found)
        position += entry.nbytes
    if position != size:
        found = f"has {size - start} bytes, of which the tensors cover {position - start}"
        raise damaged(url, "the buffer", found)
    _check_text(url, [*header, *metadata, *metadata.values()])
    return entries, metadata


def _check_text(url: str, strings: list[str]) -> None:
    # JSON can spell half a surrogate pair, which is no text: it has no UTF-8.
    try:
        "".join(strings).encode()
    except UnicodeEncodeError as error:
        raise damaged(url, _HEADER, f"has a name that is no text ({str(error)[-100:]})") from None


def _tensor(name: str) -> str:
    return f"tensor {name[:200]!r}"


def _entry(url: str, name: str, info: Any, start: int, buffer: int) -> ArrayEntry:
    try:
        kind, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise damaged(url, _tensor(name), "lacks a dtype, a shape or two data_offsets") from None
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= buffer:
        raise damaged(
            url, _tensor(name), f"has data_offsets {str([begin, end])[:100]} in a buffer of {buffer} bytes"
        )
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if not isinstance(shape, list):
        raise damaged(url, _tensor(name), "has a shape that is no list")
    if dtype is None:
        return _packed_entry(url, name, kind, shape, start + begin, end - begin)
    nbytes = array_size(shape, dtype.itemsize)
    if nbytes != end - begin:
        _raise_size(url, name, kind, shape, end - begin)
    return ArrayEntry(name, dtype, tuple(shape), "C", 0, start + begin, nbytes, nbytes)


def _packed_entry(
    url: str, name: str, kind: object, shape: list[Any], offset: int, nbytes: int
) -> ArrayEntry:
    bits = PACKED_BITS.get(kind) if isinstance(kind, str) else None
    if bits is None:
        raise unsupported(
            url, _tensor(name), f"has the dtype {str(kind)[:100]!r}", "upgrade lazymem, or convert the tensor"
        )
    count = array_size(shape, 1)
    if count is None or count * bits != 8 * nbytes:
        _raise_size(url, name, kind, shape, nbytes)
    whole_rows = bool(shape) and shape[-1] * bits % 8 == 0
    shown = (*shape[:-1], shape[-1] * bits // 8) if whole_rows else (nbytes,)
    own = {"dtype": kind, "shape": shape}
    return ArrayEntry(name, _UINT8, shown, "C", 0, offset, nbytes, nbytes, metadata=own)


def _raise_size(url: str, name: str, kind: object, shape: list[Any], nbytes: int) -> NoReturn:
    found = f"is {kind} of shape {str(shape)[:200]}, which {nbytes} bytes do not hold"
    raise damaged(url, _tensor(name), found)
