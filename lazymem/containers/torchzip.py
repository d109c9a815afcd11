# SPDX-License-Identifier: Apache-2.0
"""torch.save's files (.pt, .pth, .bin): a zip of a pickle and of one stored member for each storage.

torch/serialization.py writes, below one folder: data.pkl, whose tensors refer to storages by key;
byteorder; data/<key>, the bytes of each storage; version; and more. The bytes are read in place. A tensor
is a storage, an offset, a shape and strides, and several may lie in one storage: the first one that is all
of it is an array, the others are views of that.

Where members begin: a zip says so in the header before each. Of a remote file that would be a request
for each, so there the place follows from where the next member begins and from torch's alignment, two
facts that must agree; where they do not, the headers are read.
"""

from __future__ import annotations

import itertools
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np

from ..errors import FormatError
from ..store import locations
from ..store.base import Blob
from ..views import View, order_of, problem_of
from .base import NO_METADATA, ArrayEntry, Directory, damaged, unsupported
from .torch_globals import Storage, Tensor
from .torch_pickle import MAX_PICKLE, read_pickle
from .torch_tree import Leaves
from .zipped import LOCAL, check_disjoint, check_names, data_start, for_each, list_members, member_of

PICKLE: Final = "data.pkl"
#: A zip of this name whose directory is damaged is no file of raw bytes. (.bin says nothing.)
SUFFIXES: Final = (".pt", ".pth")

_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(scalar)
    for name, scalar in {
        "bool": np.bool_,
        "uint8": np.uint8,
        "int8": np.int8,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
        "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
        "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
        "int16": "<i2",
        "uint16": "<u2",
        "float16": "<f2",
        "bfloat16": ml_dtypes.bfloat16,
        "int32": "<i4",
        "uint32": "<u4",
        "float32": "<f4",
        "int64": "<i8",
        "uint64": "<u8",
        "float64": "<f8",
        "complex64": "<c8",
        "complex128": "<c16",
    }.items()
}
#: Several elements to a byte, or bits without a meaning: shown as whole bytes, with a word of what they are.
_PACKED: Final = (
    "float4_e2m1fn_x2",
    "bits1x8",
    "bits2x4",
    "bits4x2",
    "bits8",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
)
_NEWEST_VERSION: Final = 10
_LONG_NAME: Final = 1000
_MAX_WORD: Final = 64  # bytes of the members that hold a word or number
_AFTER_PICKLE: Final = 4096  # where byteorder lies
_HEADER_READ: Final = 512
_DESCRIPTORS: Final = (24, 16)  # bytes of a data descriptor after a member, with 64-bit sizes or 32-bit
_HAS_DESCRIPTOR: Final = 0x8
_LARGE: Final = 0xFFFF_FFFF  # from here on sizes and offsets take 64 bits
_USUAL_FLAGS: Final = 0x808  # and UTF-8


def prefix_of(members: Sequence[zipfile.ZipInfo]) -> str | None:
    """The folder that holds all of torch's members, with its "/"; None if it is no file of torch.save."""
    found = [info.filename for info in members if info.filename.split("/")[1:] == [PICKLE]]
    return found[0].removesuffix(PICKLE) if len(found) == 1 else None


def read_torch(blob: Blob, head: bytes, members: list[zipfile.ZipInfo] | None = None) -> Directory:
    """The directory of a torch.save. head: as `read_head` gives it. members: of `list_members`, if asked."""
    url = blob.url
    members = list_members(blob) if members is None else members
    prefix = prefix_of(members)
    if prefix is None:
        raise damaged(url, "the zip directory", f"has no one member NAME/{PICKLE}")
    check_names(url, members)
    records = {i.filename.removeprefix(prefix): i for i in members if i.filename.startswith(prefix)}
    if "constants.pkl" in records:
        raise unsupported(
            url,
            "the file",
            "is a TorchScript archive, a program",
            "torch.jit.load it and torch.save its state_dict()",
        )
    window = _Window(blob, head)
    leaves = Leaves(url, read_pickle(url, _read_pickle(url, window, records[PICKLE])))
    order = _word(window, records, "byteorder") or "little"
    if order != "little":
        raise unsupported(
            url, "byteorder", f"is {order!r}", "load it with torch on this machine and save it again"
        )
    version = _word(window, records, "version") or "1"
    if not version.isdecimal() or not 1 <= int(version) <= _NEWEST_VERSION:
        raise unsupported(url, "version", f"is {version!r}", f"save it as version 1 to {_NEWEST_VERSION}")
    storages: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in leaves.tensors.items():
        storages.setdefault(tensor.storage.key, []).append((name, tensor))
    wanted = [_record_of(url, records, key, tensors) for key, tensors in storages.items()]
    starts = _starts(window, members, wanted, _word(window, records, ".storage_alignment") or "64")
    placer = _Placer(url, leaves)
    for info, start, tensors in zip(wanted, starts, storages.values(), strict=True):
        placer.add(info, start, tensors)
    metadata: dict[str, Any] = {"torch": leaves.values} if leaves.values else {}
    if leaves.left_out:
        metadata["torch_left_out"] = leaves.left_out
    placer.arrays.sort(key=lambda entry: entry.offset)
    names = (locations.name_of(url),)
    return Directory("torch", (blob,), names, tuple(placer.arrays), metadata, views=tuple(placer.views))


class _Window:
    """A blob, of which a part was read ahead: each read of a remote one is a request."""

    def __init__(self, blob: Blob, head: bytes) -> None:
        self._blob = blob
        self._base = 0
        self._data = head
        self.url = blob.url
        self.size = blob.size
        self.identity = blob.identity

    def cover(self, offset: int, length: int) -> None:
        """Read these bytes, or what the file has of them, unless they are there."""
        length = min(length, self.size - offset)
        if length > 0 and not self._has(offset, length):
            self._base, self._data = offset, self._blob.read(offset, length)

    def _has(self, offset: int, length: int) -> bool:
        return self._base <= offset and offset + length <= self._base + len(self._data)

    def read(self, offset: int, length: int) -> bytes:
        if self._has(offset, length):
            return self._data[offset - self._base : offset - self._base + length]
        return self._blob.read(offset, length)

    def read_into(self, offset: int, out: memoryview) -> None:
        out[:] = self.read(offset, len(out))

    def fileno(self) -> int | None:
        return self._blob.fileno()

    def has_changed(self) -> bool:
        return self._blob.has_changed()

    def close(self) -> None:
        """The blob is the directory's."""


def _check_stored(url: str, info: zipfile.ZipInfo) -> None:
    if info.compress_type != zipfile.ZIP_STORED:
        raise unsupported(
            url,
            member_of(info),
            "is compressed, as torch.save never writes it",
            "unzip the file and zip it again without compression (zip -0 -r), or torch.load and save it",
        )
    if info.compress_size != info.file_size:
        raise damaged(
            url, member_of(info), f"is stored, but in {info.compress_size} bytes instead of {info.file_size}"
        )


def _read_pickle(url: str, window: _Window, info: zipfile.ZipInfo) -> bytes:
    _check_stored(url, info)
    if info.file_size > MAX_PICKLE:
        raise damaged(url, member_of(info), f"has {info.file_size} bytes (the limit is {MAX_PICKLE})")
    if 0 <= info.header_offset < window.size:
        window.cover(info.header_offset, info.file_size + _AFTER_PICKLE)
    start, _ = data_start(window, info, _HEADER_READ, 0)
    data = window.read(start, info.file_size)
    # torch can be told to leave checksums out (set_crc32_options); it then writes 0.
    if info.CRC not in (0, zlib.crc32(data)):
        raise damaged(url, member_of(info), "does not match its CRC-32")
    return data


def _word(window: _Window, records: Mapping[str, zipfile.ZipInfo], name: str) -> str | None:
    """The text of a small member; None if there is none."""
    info = records.get(name)
    if info is None:
        return None
    _check_stored(window.url, info)
    if info.file_size > _MAX_WORD:
        raise damaged(window.url, member_of(info), f"has {info.file_size} bytes instead of a word")
    _, data = data_start(window, info, _HEADER_READ, info.file_size)
    return data[: info.file_size].decode("latin-1").strip()


def _record_of(
    url: str, records: Mapping[str, zipfile.ZipInfo], key: str, tensors: list[tuple[str, Tensor]]
) -> zipfile.ZipInfo:
    info = records.get(f"data/{key}")
    if info is None:
        raise damaged(
            url, f"tensor {tensors[0][0][:200]!r}", f"lies in storage {key[:200]!r}, which is missing"
        )
    _check_stored(url, info)
    return info


def _starts(
    window: _Window, members: Sequence[zipfile.ZipInfo], wanted: list[zipfile.ZipInfo], alignment: str
) -> list[int]:
    """Where the bytes of each wanted member begin."""
    inferred: dict[str, int] = {}
    ordered = sorted(members, key=lambda info: info.header_offset)
    for info, after in itertools.pairwise(ordered):
        start = _inferred_start(info, after.header_offset, alignment)
        if start is not None and start + info.file_size <= window.size:
            inferred[info.filename] = start

    def read(info: zipfile.ZipInfo) -> int:
        start, _ = data_start(window, info, _HEADER_READ, 0)
        if start != inferred.get(info.filename, start):
            raise damaged(
                window.url, member_of(info), "has a header that disagrees with where the next begins"
            )
        return start

    unknown = wanted
    if window.fileno() is None:
        unknown = [info for info in wanted if info.filename not in inferred]
    found = dict(zip((info.filename for info in unknown), for_each(window, unknown, read), strict=True))
    starts = [found.get(info.filename) or inferred[info.filename] for info in wanted]
    check_disjoint(window.url, zip(wanted, starts, strict=True))
    return starts


def _inferred_start(info: zipfile.ZipInfo, end: int, alignment: str) -> int | None:
    """Where a member's bytes begin that torch wrote before one whose header is at `end`; None if unclear.

    torch pads the extra field so that they begin at a multiple of `alignment` (getPadding in
    caffe2/serialize/inline_container.cc); a descriptor follows them, then the next header.
    """
    step = int(alignment) if alignment.isdecimal() and len(alignment) < 8 else 0
    if not step or info.filename != info.orig_filename or info.flag_bits & ~_USUAL_FLAGS:
        return None
    place, size = info.header_offset, info.file_size
    extra = 4  # of the padding's own field; then those of a zip with 64-bit sizes
    if place >= _LARGE or size >= _LARGE:
        extra += 4 + 16 * (size >= _LARGE) + 8 * (place >= _LARGE)
    least = place + LOCAL + len(info.orig_filename.encode("utf-8")) + extra
    start = -(-least // step) * step
    descriptors = _DESCRIPTORS if info.flag_bits & _HAS_DESCRIPTOR else (0,)
    return start if place >= 0 and end - start - size in descriptors else None


class _Placed(NamedTuple):
    """A tensor in bytes."""

    name: str
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    metadata: Mapping[str, Any]


class _Placer:
    """Tensors -> arrays and views."""

    def __init__(self, url: str, leaves: Leaves) -> None:
        self.arrays: list[ArrayEntry] = []
        self.views: list[View] = []
        self._url = url
        self._hidden_prefix = ".storage"
        while any(name.startswith(self._hidden_prefix) for name in leaves.tensors):
            self._hidden_prefix = "." + self._hidden_prefix

    def add(self, info: zipfile.ZipInfo, start: int, tensors: list[tuple[str, Tensor]]) -> None:
        """All tensors of one storage, whose bytes begin at `start`."""
        size = self._size(info, tensors)
        placed = []
        for name, tensor in tensors:
            found = self._place(name, tensor, size)
            if 0 in found.shape:  # shares no bytes with any other
                self._array(found, start, "C")
            else:
                placed.append(found)
        whole = next((one for one in placed if _nbytes(one) == size and _order(one)), None)
        if whole is not None:
            self._array(whole, start, _order(whole) or "C")
            self._view_all([one for one in placed if one is not whole], whole.name)
        elif _are_apart(placed):
            for one in placed:
                self._array(one, start, _order(one) or "C")
        else:
            self._hide(placed, start, size)

    def _size(self, info: zipfile.ZipInfo, tensors: list[tuple[str, Tensor]]) -> int:
        """Bytes of the storage, which all that refer to it must say alike."""
        first = tensors[0][1].storage
        itemsize = _dtype(self._url, tensors[0][0], first)[0].itemsize
        for name, tensor in tensors:
            if tensor.storage != first:
                raise self._wrong(
                    name, f"lies in storage {first.key[:200]!r}, which is described in two ways"
                )
        if first.numel * itemsize > info.file_size:
            found = (
                f"lies in a storage of {first.numel * itemsize} bytes, but its member has {info.file_size}"
            )
            raise self._wrong(tensors[0][0], found)
        return first.numel * itemsize

    def _wrong(self, name: str, found: str) -> FormatError:
        return damaged(self._url, f"tensor {name[:200]!r}", found)

    def _place(self, name: str, tensor: Tensor, size: int) -> _Placed:
        dtype, packed = _dtype(self._url, name, tensor)
        item = dtype.itemsize
        # A tensor without elements may lie anywhere, and the stride of a length of 1 means nothing.
        offset = 0 if 0 in tensor.shape else tensor.offset * item
        pairs = zip(tensor.shape, tensor.strides, strict=True)
        strides = tuple(0 if length == 1 else stride * item for length, stride in pairs)
        view = View(name, "its storage", offset, dtype, tensor.shape, strides)
        problem = problem_of(view, size)
        if problem is not None:
            raise self._wrong(name, problem)
        return _Placed(name, dtype, view.offset, view.shape, strides, _metadata(packed, view.shape))

    def _array(self, one: _Placed, start: int, order: str) -> None:
        nbytes = _nbytes(one)
        self.arrays.append(
            ArrayEntry(
                one.name,
                one.dtype,
                one.shape,
                order,
                0,
                start + one.offset,
                nbytes,
                nbytes,
                metadata=one.metadata,
            )
        )

    def _hide(self, placed: list[_Placed], start: int, size: int) -> None:
        """No tensor is all of the storage: it is an array that is not shown, and all of them are views."""
        first = placed[0]
        dtype = first.dtype if size % first.dtype.itemsize == 0 else np.dtype(np.uint8)
        name = f"{self._hidden_prefix}/{first.name}"
        if len(name) > _LONG_NAME:
            name = f"{self._hidden_prefix}/{len(self.arrays)}"
        shape = (size // dtype.itemsize,)
        self.arrays.append(ArrayEntry(name, dtype, shape, "C", 0, start, size, size, hidden=True))
        self._view_all(placed, name)

    def _view_all(self, placed: Sequence[_Placed], array: str) -> None:
        self.views += [
            View(one.name, array, one.offset, one.dtype, one.shape, one.strides, one.metadata)
            for one in placed
        ]


def _dtype(url: str, name: str, what: Tensor | Storage) -> tuple[np.dtype[Any], str | None]:
    """numpy's dtype; and torch's name of it where numpy only shows bytes."""
    torch_name = what.dtype or "uint8"
    known = _DTYPES.get(torch_name)
    if known is not None:
        return known, None
    if torch_name in _PACKED:
        return _DTYPES["uint8"], torch_name
    if torch_name == "bits16":
        return _DTYPES["uint16"], torch_name
    raise unsupported(
        url, f"tensor {name[:200]!r}", f"has dtype {torch_name!r}", "convert it to another and save again"
    )


def _metadata(packed: str | None, shape: tuple[int, ...]) -> Mapping[str, Any]:
    if packed is None:
        return NO_METADATA
    if packed == "float4_e2m1fn_x2" and shape:  # as containers/safetensors.py says it
        return {"dtype": "F4", "shape": [*shape[:-1], 2 * shape[-1]]}
    return {"dtype": packed}


def _nbytes(one: _Placed) -> int:
    return math.prod(one.shape) * one.dtype.itemsize


def _order(one: _Placed) -> str | None:
    return order_of(one.shape, one.strides, one.dtype.itemsize)


def _are_apart(placed: list[_Placed]) -> bool:
    """Whether all are contiguous and no two overlap."""
    if not all(_order(one) for one in placed):
        return False
    ordered = sorted(placed, key=lambda one: one.offset)
    return all(one.offset + _nbytes(one) <= after.offset for one, after in itertools.pairwise(ordered))
