# SPDX-License-Identifier: Apache-2.0
"""Zip files: their directory, and where their members' bytes lie. For the containers that are zip files.

The standard library parses the central directory; every number in it is checked here before use.
"""

from __future__ import annotations

import io
import itertools
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar

from ..errors import LazymemError
from ..store.base import Blob
from .base import damaged, unsupported

if TYPE_CHECKING:
    from typing_extensions import Buffer

_T = TypeVar("_T")

#: A zip begins with a member, or with the end record if it has none.
MAGICS: Final = (b"PK\x03\x04", b"PK\x05\x06")
LOCAL: Final = 30  # bytes of a local header before name and extra field

_ENCRYPTED: Final = 0x1 | 0x40
_UTF8: Final = 0x800
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


def member_of(info: zipfile.ZipInfo) -> str:
    """What errors call it."""
    return f"member {info.filename[:200]!r}"


def check_names(url: str, members: Iterable[zipfile.ZipInfo]) -> None:
    """Raise `FormatError` where two members have one name."""
    names: set[str] = set()
    for info in members:
        if info.filename in names:
            raise damaged(url, member_of(info), "stands twice in the zip directory")
        names.add(info.filename)


def check_disjoint(url: str, members: Iterable[tuple[zipfile.ZipInfo, int]]) -> None:
    """Raise `FormatError` where members overlap; each comes with where its bytes begin."""
    ranges = sorted(
        (info.header_offset, start + info.compress_size, member_of(info)) for info, start in members
    )
    for (_, end, _), (begin, _, member) in itertools.pairwise(ranges):
        if begin < end:
            raise damaged(url, member, "overlaps the member before it")


def for_each(
    blob: Blob, members: Sequence[zipfile.ZipInfo], read: Callable[[zipfile.ZipInfo], _T]
) -> list[_T]:
    """`read` of each member; several at a time of a remote blob, where each costs a request."""
    if blob.fileno() is not None or not members:
        return [read(info) for info in members]
    with ThreadPoolExecutor(min(len(members), _READ_AT_ONCE), "lazymem-zip") as pool:
        return list(pool.map(read, members))


def data_start(blob: Blob, info: zipfile.ZipInfo, first_read: int, needed: int) -> tuple[int, bytes]:
    """Where the member's bytes begin, and the first of them, `needed` or more if it has so many.

    first_read: bytes to read at once, beginning with its header.
    """
    member = member_of(info)
    url, where = blob.url, info.header_offset
    if info.flag_bits & _ENCRYPTED:
        raise unsupported(url, member, "is encrypted", "unpack the file and pack it without a password")
    if where < 0 or where > blob.size - LOCAL or info.compress_size < 0 or info.file_size < 0:
        raise damaged(url, member, f"has its header at byte {where} of {blob.size}")
    data = blob.read(where, min(first_read, blob.size - where))
    name_length = int.from_bytes(data[26:28], "little")
    name = data[LOCAL : LOCAL + name_length]
    expected = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
    # A name may be longer than the first read; then only its beginning is held against the directory.
    if data[:4] != MAGICS[0] or not name or not expected.startswith(name) or name_length != len(expected):
        raise damaged(url, member, f"has no header of its name at byte {where}")
    if info.filename != info.orig_filename:
        raise damaged(url, member, "has a NUL in its name")
    start = LOCAL + name_length + int.from_bytes(data[28:30], "little")
    if info.compress_size > blob.size - where - start:
        raise damaged(
            url, member, f"needs {info.compress_size} bytes at byte {where + start}, the file has {blob.size}"
        )
    head = data[start : start + info.compress_size]
    if len(head) < min(needed, info.compress_size):  # a long name or extra field, or a small file
        head = blob.read(where + start, min(first_read, info.compress_size))
    return where + start, head
