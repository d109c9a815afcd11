# SPDX-License-Identifier: Apache-2.0
"""Containers as a source of `build`: every byte of their files goes in, and can come out again.

Files are read front to back once: the same pass feeds the snapshot and the files' SHA-256. Remote ones are
read ahead. Holes of sparse files are skipped (lseek(2), SEEK_DATA). Deflated zip members go in
uncompressed; whether deflating them again gives the file's bytes is tried in the same pass.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..containers.base import ArrayEntry, Directory
from ..errors import BuildError, FormatError, SnapshotChanged
from ..format import structs
from ..format.layout import SMALL_ALIGNMENT
from ..format.origin import DeflatedMember, Origin, OriginFile, unsafe_name
from ..store.ahead import AheadBlob
from ..store.base import Blob
from ..views import PIECE, View
from .sources import Item, Items, Piece

_BYTES: Final = np.dtype(np.uint8)
#: Hashing more zeros than this would take longer than writing the snapshot; the file gets no SHA-256.
_MAX_HASHED_HOLES: Final = 1 << 30
_ZEROS: Final = memoryview(bytes(1 << 20))
#: zlib's default, which numpy.savez_compressed and most zip programs use.
_DEFLATE_LEVEL: Final = 6
_DEFLATE_PIECE: Final = 256 << 10
#: Formats whose only array is called "data", so that several need other names.
_ONE_ARRAY: Final = ("npy", "raw")


class ContainerSource:
    """A container's arrays, and what lies between them as hidden arrays."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self.metadata = directory.metadata
        self.left_out = tuple(directory.left_out)
        self.source_bytes = sum(blob.size for blob in directory.files)
        self.source_bytes += sum(map(len, directory.extra_files.values()))
        deflated = [entry for entry in directory.arrays if entry.compression]
        grown = sum(entry.member_size - entry.stored_length for entry in deflated)
        self.total_bytes: int | None = self.source_bytes + grown
        self._hidden_prefix = ".container"
        names = {entry.name for entry in directory.arrays}.union(self.names)
        while any(name.startswith(self._hidden_prefix) for name in names):
            self._hidden_prefix = "." + self._hidden_prefix
        # (file, file_offset, array's name, offset within it, length)
        self._extents: list[tuple[int, int, str, int, int]] = []
        self._members: list[tuple[ArrayEntry, _Member, list[tuple[str, int]]]] = []
        self._hashes: list[_FileHash] = []

    @property
    def names(self) -> Collection[str]:
        return self._directory.names

    @property
    def views(self) -> Sequence[View]:
        return self._directory.views

    @property
    def files(self) -> Sequence[Blob]:
        """What the arrays come from."""
        return self._directory.files

    def close(self) -> None:
        self._directory.close()

    # ---- arrays ----

    def items(self) -> Items:
        by_file: list[list[ArrayEntry]] = [[] for _ in self._directory.files]
        for entry in self._directory.arrays:
            by_file[entry.file].append(entry)
        for number, blob in enumerate(self._directory.files):
            self._hashes.append(_FileHash(blob))
            if blob.fileno() is not None:
                yield from self._file_items(number, blob, by_file[number])
                continue
            with AheadBlob(blob, [(0, blob.size)]) as ahead:
                yield from self._file_items(number, ahead, by_file[number])
        for number, content in enumerate(self._directory.extra_files.values(), len(by_file)):
            yield self._hidden(number, 0, len(content), iter([content]))

    def _file_items(self, number: int, blob: Blob, entries: list[ArrayEntry]) -> Iterator[Item]:
        cursor = 0
        for entry in entries:
            if entry.stored_length:
                if entry.offset < cursor:
                    raise FormatError(
                        f"{blob.url}: array {entry.name!r} overlaps the one before; get the file again",
                        url=blob.url,
                        field=entry.name,
                    )
                if entry.offset > cursor:
                    yield self._gap(number, blob, cursor, entry.offset)
                cursor = entry.offset + entry.stored_length
            if entry.compression is None:
                if entry.nbytes:
                    self._extents.append((number, entry.offset, entry.name, 0, entry.nbytes))
                pieces = self._read(number, blob, entry.offset, entry.nbytes)
                keeps = self._directory.format.startswith("safetensors")
                aligned = entry.offset % (entry.dtype.itemsize or 1) == 0
                yield _item(entry, pieces, entry.offset % SMALL_ALIGNMENT if keeps and aligned else 0)
            else:
                yield from self._deflated(number, blob, entry)
        if cursor < blob.size:
            yield self._gap(number, blob, cursor, blob.size)
        if blob.has_changed():
            raise SnapshotChanged(
                f"{blob.url}: was changed while it was read; build again when its writer is done",
                url=blob.url,
            )

    def _gap(self, number: int, blob: Blob, begin: int, end: int) -> Item:
        return self._hidden(number, begin, end - begin, self._read(number, blob, begin, end - begin))

    def _hidden(self, number: int, offset: int, length: int, pieces: Iterator[Piece]) -> Item:
        name = f"{self._hidden_prefix}/{number}/{offset}"
        if length:
            self._extents.append((number, offset, name, 0, length))
        return Item(name, _BYTES, (length,), pieces, hidden=True)

    def _deflated(self, number: int, blob: Blob, entry: ArrayEntry) -> Iterator[Item]:
        member = _Member(blob, entry, self._hashes[number])
        after = entry.member_size - entry.skip - entry.nbytes
        parts: list[tuple[str, int]] = []
        self._members.append((entry, member, parts))
        base = f"{self._hidden_prefix}/{number}/{entry.offset}"
        if entry.skip:
            parts.append((f"{base}/header", entry.skip))
            yield Item(parts[-1][0], _BYTES, (entry.skip,), member.take(entry.skip), hidden=True)
        parts.append((entry.name, entry.nbytes))
        yield _item(entry, member.take(entry.nbytes))
        if after:
            parts.append((f"{base}/rest", after))
            yield Item(parts[-1][0], _BYTES, (after,), member.take(after), hidden=True)
        member.finish()

    def _read(self, number: int, blob: Blob, offset: int, length: int) -> Iterator[Piece]:
        digest = self._hashes[number]
        for begin, size, hole in _segments(blob, offset, length):
            if hole:
                digest.update_zeros(size)
                yield size
                continue
            for position in range(begin, begin + size, PIECE):
                data = blob.read(position, min(PIECE, begin + size - position))
                digest.update(data)
                yield data

    # ---- the files ----

    def origin(self, offsets: Mapping[str, int]) -> tuple[Origin, NDArray[np.void]]:
        directory = self._directory
        deflated: list[list[DeflatedMember]] = [[] for _ in directory.files]
        reason = None
        for entry, member, parts in self._members:
            if not member.repeatable:
                reason = (
                    f"member {entry.name!r} was deflated by another program or level than zlib's "
                    f"{_DEFLATE_LEVEL}, so its bytes cannot be made again"
                )
                continue
            pairs = tuple((offsets[name], length) for name, length in parts if length)
            deflated[entry.file].append(
                DeflatedMember(entry.offset, entry.stored_length, _DEFLATE_LEVEL, pairs)
            )
        files = []
        for number, (name, blob) in enumerate(zip(directory.file_names, directory.files, strict=True)):
            sha256 = self._hashes[number].result()
            files.append(OriginFile(_file_name(name, number), blob.size, sha256, tuple(deflated[number])))
        for name, content in directory.extra_files.items():
            digest = hashlib.sha256(content).hexdigest()
            files.append(OriginFile(_file_name(name, len(files)), len(content), digest))
        extents = np.zeros(len(self._extents), structs.EXTENT.dtype)
        if self._extents:
            files_column, offset, _, _, length = zip(*self._extents, strict=True)
            extents["file"], extents["file_offset"], extents["length"] = files_column, offset, length
            extents["content_offset"] = [offsets[name] + delta for _, _, name, delta, _ in self._extents]
        return Origin(directory.format, reason is None, tuple(files), reason), extents


def _item(entry: ArrayEntry, pieces: Iterator[Piece], phase: int = 0) -> Item:
    return Item(
        entry.name, entry.dtype, entry.shape, pieces, entry.order, entry.hidden, entry.metadata, phase
    )


def _file_name(name: str, number: int) -> str:
    """`name`, or a plain one where FORMAT.md does not allow it (Linux allows a backslash)."""
    return f"file{number}" if unsafe_name(name) else name


def combine(directories: Sequence[Directory]) -> Directory:
    """Several containers as one. Where they use one array name twice, the file's stem goes before it.

    The only array of an .npy or a raw file takes the stem as its name. Raises `BuildError` for two
    files of one name: their bytes could not be given back side by side.
    """
    file_names = [name for directory in directories for name in directory.file_names]
    file_names += [name for directory in directories for name in directory.extra_files]
    twice = _repeated(file_names)
    if twice:
        raise BuildError(f"two of the files are called {twice[0]!r}; rename one of them")
    arrays: list[tuple[str, ArrayEntry]] = []
    views: list[tuple[str, View]] = []
    base = 0
    for directory in directories:
        for entry in directory.arrays:
            stem = os.path.splitext(directory.file_names[entry.file])[0]
            name = stem if directory.format in _ONE_ARRAY else entry.name
            arrays.append((stem, entry._replace(name=name, file=base + entry.file)))
        stems = {
            entry.name: os.path.splitext(directory.file_names[entry.file])[0] for entry in directory.arrays
        }
        views += [(stems[view.array], view) for view in directory.views]
        base += len(directory.files)
    repeated = set(_repeated([entry.name for _, entry in arrays] + [view.name for _, view in views]))

    def name_of(stem: str, name: str) -> str:
        return f"{stem}/{name}" if name in repeated else name

    formats = {directory.format for directory in directories}
    metadata: dict[str, Any] = {}
    extra: dict[str, bytes] = {}
    for directory in directories:
        metadata.update(directory.metadata)
        extra.update(directory.extra_files)
    return Directory(
        formats.pop() if len(formats) == 1 else "mixed",
        [blob for directory in directories for blob in directory.files],
        [name for directory in directories for name in directory.file_names],
        [entry._replace(name=name_of(stem, entry.name)) for stem, entry in arrays],
        metadata,
        extra,
        [
            view._replace(name=name_of(stem, view.name), array=name_of(stem, view.array))
            for stem, view in views
        ],
    )


def _repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


class _FileHash:
    """SHA-256 of a whole file, unless it has more holes than are worth hashing."""

    def __init__(self, blob: Blob) -> None:
        holes = sum(size for _, size, hole in _segments(blob, 0, blob.size) if hole)
        self._sha256 = hashlib.sha256() if holes <= _MAX_HASHED_HOLES else None

    def update(self, data: bytes) -> None:
        if self._sha256 is not None:
            self._sha256.update(data)

    def update_zeros(self, length: int) -> None:
        while self._sha256 is not None and length:
            piece = _ZEROS[:length]
            self._sha256.update(piece)
            length -= len(piece)

    def result(self) -> str | None:
        return None if self._sha256 is None else self._sha256.hexdigest()


def _segments(blob: Blob, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """(offset, length, is a hole) for each piece of the range; holes read as zeros."""
    fd, end = blob.fileno(), offset + length
    while offset < end:
        data = end
        if fd is None:
            data = offset
        else:
            try:
                data = min(os.lseek(fd, offset, os.SEEK_DATA), end)
            except OSError as error:
                # ENXIO: a hole up to the end of the file. Others: the filesystem cannot tell.
                if error.errno != errno.ENXIO:
                    fd, data = None, offset
        if data > offset:
            yield offset, data - offset, True
            offset = data
            continue
        stop = end if fd is None else min(os.lseek(fd, offset, os.SEEK_HOLE), end)
        yield offset, stop - offset, False
        offset = stop


class _Member:
    """Inflates a zip member piece by piece, checks it, and deflates it again to compare."""

    def __init__(self, blob: Blob, entry: ArrayEntry, digest: _FileHash) -> None:
        self._blob = blob
        self._entry = entry
        self._digest = digest
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._again = zlib.compressobj(_DEFLATE_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
        self._position = entry.offset
        self._end = entry.offset + entry.stored_length
        self._crc = 0
        # What the file has and what deflating again gave, as far as the other has not got there yet.
        self._original = bytearray()
        self._repeated = bytearray()
        self.repeatable = True

    def take(self, length: int) -> Iterator[bytes]:
        """The next `length` uncompressed bytes, in pieces."""
        while length:
            data = self._inflate(min(length, _DEFLATE_PIECE))
            length -= len(data)
            yield data

    def _inflate(self, limit: int) -> bytes:
        while True:
            pending = self._inflater.unconsumed_tail or self._next_stored()
            try:
                data = self._inflater.decompress(pending, limit)
            except zlib.error as error:
                raise self._damaged(f"does not inflate ({error})") from None
            if data:
                self._crc = zlib.crc32(data, self._crc)
                self._repeat(self._again.compress(data))
                return data
            if self._inflater.eof or not pending:
                raise self._damaged("inflates to fewer bytes than it declares")

    def _next_stored(self) -> bytes:
        length = min(_DEFLATE_PIECE, self._end - self._position)
        data = self._blob.read(self._position, length)
        self._position += length
        self._digest.update(data)
        if self.repeatable:
            self._original += data
        return data

    def _repeat(self, data: bytes) -> None:
        if not self.repeatable:
            return
        self._repeated += data
        common = min(len(self._original), len(self._repeated))
        self.repeatable = self._original[:common] == self._repeated[:common]
        del self._original[:common], self._repeated[:common]

    def finish(self) -> None:
        """All bytes were taken: nothing may be left, and the member's CRC-32 must be right."""
        while not self._inflater.eof:
            pending = self._inflater.unconsumed_tail or self._next_stored()
            try:
                more = self._inflater.decompress(pending, 1)
            except zlib.error as error:
                raise self._damaged(f"does not inflate ({error})") from None
            if more or (not pending and not self._inflater.eof):
                raise self._damaged("does not end where it should")
        if self._inflater.unused_data or self._position != self._end:
            raise self._damaged("has bytes after the end of its deflate stream")
        if self._entry.crc32 is not None and self._crc != self._entry.crc32:
            raise self._damaged("does not match its CRC-32")
        self._repeat(self._again.flush())
        self.repeatable = self.repeatable and not self._original and not self._repeated

    def _damaged(self, what: str) -> FormatError:
        url, name = self._blob.url, self._entry.name
        return FormatError(f"{url}: member {name!r} {what}; get the file again", url=url, field=name)
