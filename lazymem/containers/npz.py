# SPDX-License-Identifier: Apache-2.0
"""numpy's .npz archives: zip files whose members are .npy files.

The standard library parses the central directory; every number in it is checked here before use.
Stored members are read in place. Deflated ones are only described (`ArrayEntry.compression`).
Members that are not .npy are no arrays, but remain part of the file.
"""

from __future__ import annotations

import io
import itertools
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from ..errors import LazymemError
from ..store import locations
from ..store.base import Blob
from . import npy
from .base import ArrayEntry, Directory, damaged, unsupported

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: A zip begins with a member, or with the end record if it has none.
MAGICS: Final = (b"PK\x03\x04", b"PK\x05\x06")

_LOCAL: Final = 30  # bytes of a local header before name and extra field
_ENCRYPTED: Final = 0x1 | 0x40
_UTF8: Final = 0x800
_MAX_RATIO: Final = 1040  # deflate's own limit is 1032 to 1
_FIRST_INPUT: Final = 1 << 16
_READ_AT_ONCE: Final = 16


class _BlobFile(io.RawIOBase):
    """A blob as the file object that zipfile wants."""

    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._blob.size}[whence]
        if start + offset < 0:
            raise OSError("a position before the file's start")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self._blob.size - self._position))
        view[:length] = self._blob.read(self._position, length) if length else b""
        self._position += length
        return length


def list_members(blob: Blob) -> list[zipfile.ZipInfo]:
    """The central directory of a zip file, not yet checked."""
    try:
        with zipfile.ZipFile(io.BufferedReader(_BlobFile(blob))) as archive:
            return archive.infolist()
    except LazymemError:
        raise
    except Exception as error:  # zipfile raises five kinds of error and more for a damaged directory
        raise damaged(blob.url, "the zip directory", f"cannot be read ({str(error)[:200]})") from None


def read_npz(blob: Blob, members: list[zipfile.ZipInfo] | None = None) -> Directory:
    """The directory of an .npz file; `members` is what `list_members` gave, if it was asked already."""
    entries: list[ArrayEntry] = []
    ranges: list[tuple[int, int, str]] = []
    names: set[str] = set()
    members = list_members(blob) if members is None else members
    arrays = [info for info in members if info.filename.endswith(".npy")]
    for info in arrays:
        if info.filename in names:
            raise damaged(blob.url, _member(info), "stands twice in the zip directory")
        names.add(info.filename)
    for info, (start, entry) in zip(arrays, _read_headers(blob, arrays), strict=True):
        ranges.append((info.header_offset, start + info.compress_size, _member(info)))
        entries.append(entry)
    ranges.sort()
    for (_, end, _), (begin, _, member) in itertools.pairwise(ranges):
        if begin < end:
            raise damaged(blob.url, member, "overlaps the member before it")
    entries.sort(key=lambda entry: entry.offset)
    return Directory("npz", (blob,), (locations.name_of(blob.url),), tuple(entries))


def _member(info: zipfile.ZipInfo) -> str:
    return f"member {info.filename[:200]!r}"


def _read_headers(blob: Blob, arrays: list[zipfile.ZipInfo]) -> list[tuple[int, ArrayEntry]]:
    """For each member, where its bytes begin and the array it holds. Each costs a remote blob a request."""

    def read(info: zipfile.ZipInfo) -> tuple[int, ArrayEntry]:
        start, head = _data_start(blob, info, _member(info))
        return start, _entry(blob, info, start, head, _member(info))

    if blob.fileno() is not None or not arrays:
        return [read(info) for info in arrays]
    with ThreadPoolExecutor(min(len(arrays), _READ_AT_ONCE), "lazymem-npz") as pool:
        return list(pool.map(read, arrays))


def _data_start(blob: Blob, info: zipfile.ZipInfo, member: str) -> tuple[int, bytes]:
    """Where the member's bytes begin, and the first of them (as many as came with the header)."""
    url, where = blob.url, info.header_offset
    if info.flag_bits & _ENCRYPTED:
        raise unsupported(url, member, "is encrypted", "unpack the file and pack it without a password")
    if where < 0 or where > blob.size - _LOCAL or info.compress_size < 0 or info.file_size < 0:
        raise damaged(url, member, f"has its header at byte {where} of {blob.size}")
    data = blob.read(where, min(npy.FIRST_READ, blob.size - where))
    name_length = int.from_bytes(data[26:28], "little")
    name = data[_LOCAL : _LOCAL + name_length]
    expected = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
    # A name may be longer than the first read; then only its beginning is held against the directory.
    if data[:4] != MAGICS[0] or not name or not expected.startswith(name) or name_length != len(expected):
        raise damaged(url, member, f"has no header of its name at byte {where}")
    if info.filename != info.orig_filename:
        raise damaged(url, member, "has a NUL in its name")
    start = _LOCAL + name_length + int.from_bytes(data[28:30], "little")
    if info.compress_size > blob.size - where - start:
        raise damaged(
            url, member, f"needs {info.compress_size} bytes at byte {where + start}, the file has {blob.size}"
        )
    head = data[start : start + info.compress_size]
    if len(head) < min(npy.PREFIX, info.compress_size):  # a long name or extra field, or a small file
        head = blob.read(where + start, min(npy.FIRST_READ, info.compress_size))
    return where + start, head


def _entry(blob: Blob, info: zipfile.ZipInfo, start: int, head: bytes, member: str) -> ArrayEntry:
    url, method = blob.url, info.compress_type
    declared, stored = info.file_size, info.compress_size
    deflated = method == zipfile.ZIP_DEFLATED
    if deflated:
        if declared > _MAX_RATIO * stored:
            raise damaged(url, member, f"declares {declared} bytes from {stored} deflated ones")
        head = _inflate_header(blob, info, start, head, member)
    elif method != zipfile.ZIP_STORED:
        raise unsupported(
            url, member, f"is compressed by zip's method {method}", "save it with numpy.savez_compressed"
        )
    elif declared != stored:
        raise damaged(url, member, f"is stored, but in {stored} bytes instead of {declared}")
    size = npy.header_size(head[: npy.PREFIX], url=url, field=member)
    if size > declared:
        raise damaged(url, member, f"has a .npy header of {size} bytes in a member of {declared}")
    if size > len(head):  # only of a stored member: _inflate_header brings all
        head = blob.read(start, size)
    name = info.filename.removesuffix(".npy")
    header = npy.parse_header(head[:size], url=url, field=member, name=name)
    if header.nbytes > declared - size:
        raise damaged(url, member, f"needs {header.nbytes} bytes, but has {declared - size}")
    return ArrayEntry(
        name=name,
        dtype=header.dtype,
        shape=header.shape,
        order=header.order,
        file=0,
        offset=start if deflated else start + size,
        nbytes=header.nbytes,
        stored_length=stored if deflated else header.nbytes,
        compression="deflate" if deflated else None,
        skip=size if deflated else 0,
        member_size=declared if deflated else 0,
        crc32=info.CRC if deflated else None,
    )


def _inflate_header(blob: Blob, info: zipfile.ZipInfo, start: int, pending: bytes, member: str) -> bytes:
    """The first bytes of a deflated member: the whole .npy header and no more. pending: its first stored."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    output = bytearray()
    position, end, wanted = start + len(pending), start + info.compress_size, npy.PREFIX
    while len(output) < wanted and not inflater.eof:
        if not pending:
            if position == end:
                break
            pending = blob.read(position, min(_FIRST_INPUT, end - position))
            position += len(pending)
        try:
            output += inflater.decompress(pending, wanted - len(output))
        except zlib.error as error:
            raise damaged(blob.url, member, f"is no deflate stream ({error})") from None
        pending = inflater.unconsumed_tail
        if wanted == npy.PREFIX and len(output) == wanted:
            wanted = npy.header_size(bytes(output), url=blob.url, field=member)
    if len(output) < wanted:
        raise damaged(blob.url, member, f"ends after {len(output)} bytes, within the .npy header")
    return bytes(output)
