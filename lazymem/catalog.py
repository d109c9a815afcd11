# SPDX-License-Identifier: Apache-2.0
"""Which arrays a region shows, where, and which chunks it is made of.

Brings the two kinds of source to one form: a snapshot's index, and the directory of a container read
in place. Reads no array bytes, maps nothing, owns no descriptor.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ._native import CHUNK_UNCHECKED, MapPiece
from .containers.base import ArrayEntry, Directory
from .errors import UnsupportedFormat
from .format import structs
from .format.index import SnapshotIndex
from .format.layout import align_up

_NO_METADATA: Final[Mapping[str, Any]] = {}


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """One array of a snapshot: nothing of it is read to know this.

    shape in elements, order "C" or "F", nbytes and offset (within the region) in bytes. strides: None, or
    bytes from element to element of each dimension where these do not follow one another; nbytes and
    offset are then the range that holds them all.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: str
    nbytes: int
    offset: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class ArrayTables:
    """Non-empty arrays sorted by offset, as the engine wants them: it names them when a touch fails."""

    offsets: NDArray[np.uint64]
    lengths: NDArray[np.uint64]
    name_offsets: NDArray[np.uint32]  # one more than arrays
    names: bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """What a region is made of: runs and records of FORMAT.md over numbered sources.

    records: called where they are needed, which is not where plain files are mapped: one for each chunk.
    pieces: the same as ranges of files to be mapped, or None where they cannot be.
    strips: of a composed region (composition.py), cut from `stock`, whose records these are.
    """

    content_size: int
    chunk_size: int
    runs: NDArray[np.void]
    records: Callable[[], NDArray[np.void]]
    pieces: tuple[MapPiece, ...] | None
    strips: NDArray[np.void] | None = None
    stock: Layout | None = None


class Catalog(Protocol):
    """Names -> arrays, and the layout below them."""

    @property
    def format(self) -> str: ...

    @property
    def names(self) -> Collection[str]: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def info(self, name: str) -> ArrayInfo:
        """Raises KeyError."""

    def name_at(self, begin: int, end: int) -> str | None:
        """The first array with bytes in that range of the region."""

    def tables(self) -> ArrayTables: ...

    def layout(self, fds: Sequence[int]) -> Layout:
        """fds: a descriptor for each source, -1 for one that is not a local file; none: no pieces."""


def _one_table(arrays: NDArray[np.void], name_bytes: bytes) -> ArrayTables:
    """Tables of index rows; names are packed anew where rows of empty arrays are left out."""
    sizes = arrays["nbytes"]
    if sizes.all():
        starts = np.empty(len(arrays) + 1, np.uint32)
        starts[:-1], starts[-1] = arrays["name_offset"], len(name_bytes)
        return ArrayTables(arrays["offset"].copy(), sizes.copy(), starts, name_bytes)
    rows = arrays[sizes > 0]
    begins, lengths = rows["name_offset"].tolist(), rows["name_length"].tolist()
    names = [name_bytes[begin : begin + length] for begin, length in zip(begins, lengths, strict=True)]
    starts = np.array([0, *itertools.accumulate(lengths)], np.uint32)
    return ArrayTables(rows["offset"].copy(), rows["nbytes"].copy(), starts, b"".join(names))


class IndexCatalog:
    """The arrays of a snapshot file."""

    format = "lzm"

    def __init__(self, index: SnapshotIndex) -> None:
        self._index = index

    @property
    def names(self) -> Collection[str]:
        index = self._index
        return dict.fromkeys(index.visible).keys() if index.views else index.rows.keys()

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._index.metadata

    def info(self, name: str) -> ArrayInfo:
        index = self._index
        place = index.place_of(name)
        return ArrayInfo(
            name,
            place.dtype,
            place.shape,
            place.order,
            place.nbytes,
            place.offset,
            index.array_metadata.get(name, _NO_METADATA),
            place.strides,
        )

    def name_at(self, begin: int, end: int) -> str | None:
        rows = self._index.rows_between(begin, end)
        return self._index.names[rows[0]] if rows else None

    def tables(self) -> ArrayTables:
        return _one_table(self._index.arrays, self._index.name_bytes)

    def layout(self, fds: Sequence[int]) -> Layout:
        index = self._index
        return Layout(
            index.content_size,
            index.chunk_size,
            index.runs,
            lambda: index.records,
            self._pieces(fds[0] if fds else -1),
        )

    def _pieces(self, fd: int) -> tuple[MapPiece, ...] | None:
        """Runs of the file that can be mapped: all chunks as they are, on page boundaries, none a base's."""
        index, records = self._index, self._index.records
        size, page = index.chunk_size, mmap.PAGESIZE
        if (
            fd < 0
            or index.sources
            or records["codec"].any()
            or records["filter"].any()
            or (records["offset"] % page).any()
        ):
            return None
        pieces = []
        for first_chunk, count, first_record in index.runs.tolist():
            if first_record == structs.ZERO_RUN:
                continue
            offsets = records["offset"][first_record : first_record + count].astype(np.int64)
            # Chunks that do not follow one another in the file start a piece of their own.
            cuts = [0, *(np.flatnonzero(np.diff(offsets) != size) + 1).tolist(), count]
            for begin, end in itertools.pairwise(cuts):
                at = (first_chunk + begin) * size
                length = min((end - begin) * size, index.content_size - at)
                pieces.append(MapPiece(at, int(offsets[begin]), length, fd))
        return tuple(pieces)


class DirectoryCatalog:
    """The arrays of a container read in place: the region is its files, one after another."""

    def __init__(self, directory: Directory, chunk_size: int) -> None:
        for entry in directory.arrays:
            if entry.compression is not None:
                url = directory.files[entry.file].url
                raise UnsupportedFormat(
                    f"{url}: array {entry.name!r} is compressed ({entry.compression}) and cannot be read in "
                    f"place; `lazymem build {url} FILE.lzm` makes a snapshot of it",
                    url=url,
                    field=entry.name,
                )
        self._directory = directory
        self._chunk_size = chunk_size
        self._bases: list[int] = []
        end = 0
        for blob in directory.files:
            self._bases.append(end)
            end = align_up(end + blob.size, chunk_size)
        self._content_size = self._bases[-1] + directory.files[-1].size if directory.files else 0
        self._entries = {entry.name: entry for entry in directory.arrays}
        self._views = {view.name: view for view in directory.views}
        self._names = dict.fromkeys(directory.names)

    @property
    def format(self) -> str:
        return self._directory.format

    @property
    def names(self) -> Collection[str]:
        return self._names.keys()

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._directory.metadata

    def _offset(self, entry: ArrayEntry) -> int:
        return self._bases[entry.file] + entry.offset

    def info(self, name: str) -> ArrayInfo:
        view = self._views.get(name)
        if view is not None:
            offset = self._offset(self._entries[view.array]) + view.offset
            order, shape, metadata = view.order, view.shape, view.metadata
            strides = None if order else view.strides
            return ArrayInfo(name, view.dtype, shape, order or "C", view.span, offset, metadata, strides)
        if name not in self._names:
            raise KeyError(name)
        entry = self._entries[name]
        return ArrayInfo(
            name, entry.dtype, entry.shape, entry.order, entry.nbytes, self._offset(entry), entry.metadata
        )

    def name_at(self, begin: int, end: int) -> str | None:
        for entry in self._directory.arrays:  # sorted by (file, offset)
            offset = self._offset(entry)
            if entry.nbytes and offset < end and offset + entry.nbytes > begin:
                return entry.name
        return None

    def tables(self) -> ArrayTables:
        entries = [entry for entry in self._directory.arrays if entry.nbytes]
        names = [entry.name.encode() for entry in entries]
        return ArrayTables(
            np.array([self._offset(entry) for entry in entries], np.uint64),
            np.array([entry.nbytes for entry in entries], np.uint64),
            np.concatenate([[0], np.cumsum([len(name) for name in names])]).astype(np.uint32),
            b"".join(names),
        )

    def layout(self, fds: Sequence[int]) -> Layout:
        count = sum(-(-blob.size // self._chunk_size) for blob in self._directory.files)
        runs = np.zeros(1 if count else 0, structs.RUN.dtype)
        runs["count"] = count
        pieces = None
        if len(fds) == len(self._directory.files) and min(fds, default=0) >= 0:
            pieces = tuple(
                MapPiece(base, 0, blob.size, fd)
                for base, blob, fd in zip(self._bases, self._directory.files, fds, strict=True)
                if blob.size
            )
        return Layout(self._content_size, self._chunk_size, runs, self._records, pieces)

    def _records(self) -> NDArray[np.void]:
        files = self._directory.files
        return np.concatenate(
            [
                np.zeros(0, structs.CHUNK.dtype),
                *(self._records_of(i, blob.size) for i, blob in enumerate(files)),
            ]
        )

    def _records_of(self, source: int, size: int) -> NDArray[np.void]:
        """Chunks of a file as it lies, unchecked: the container has no checksums."""
        offsets = np.arange(0, size, self._chunk_size, dtype=np.uint64)
        records = np.zeros(len(offsets), structs.CHUNK.dtype)
        records["offset"] = offsets
        records["stored_length"] = np.minimum(np.uint64(size) - offsets, np.uint64(self._chunk_size))
        records["flags"] = CHUNK_UNCHECKED
        records["source"] = source
        return records
