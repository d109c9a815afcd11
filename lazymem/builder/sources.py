# SPDX-License-Identifier: Apache-2.0
"""What `build` reads: dicts of arrays, containers, streams, snapshots -> one stream of arrays.

Each source yields `Item`s in the order in which their bytes lie, with the bytes in pieces, so that
no source needs more memory than a few pieces. Owns the bytes that are in no array (headers, padding):
they become hidden arrays, so that a container can be given back byte for byte.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right, insort
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from ..dtypes import dtype_to_json
from ..errors import BuildError, FormatError, UnsupportedDtype
from ..format import structs
from ..format.layout import SMALL_ALIGNMENT
from ..format.origin import Origin, OriginFile
from ..format.reader import SnapshotReader
from ..store.base import Blob, Opener
from ..views import PIECE, View, pieces_in_c_order

#: A piece of an array: bytes, or a number of zero bytes that need not be read.
Piece = bytes | memoryview | NDArray[np.uint8] | int


@dataclass(frozen=True, slots=True)
class Item:
    """One array on its way into a snapshot. shape None: one dimension, as long as its pieces.

    phase: where it begins within 64 bytes, see format/layout.py.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...] | None
    pieces: Iterator[Piece]
    order: str = "C"
    hidden: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    phase: int = 0


#: Closed by who takes them, at the last one or before: a source may have threads at work for them.
Items = Generator[Item, None, None]


class Source(Protocol):
    """Something to build from. Items must be taken in order, each with all of its pieces."""

    @property
    def names(self) -> Collection[str]:
        """Of the visible arrays, views too, known before anything is read."""

    @property
    def views(self) -> Sequence[View]:
        """Arrays that share the bytes of items."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Of the whole."""

    @property
    def total_bytes(self) -> int | None:
        """What the pieces will add up to, for progress."""

    @property
    def source_bytes(self) -> int:
        """Size of what went in; final once all pieces were taken."""

    def items(self) -> Items: ...

    def origin(self, offsets: Mapping[str, int]) -> tuple[Origin, NDArray[np.void]] | None:
        """CONT and EXTN, given each array's offset in the content; call after the last item."""

    def close(self) -> None: ...


class ArraySource:
    """A mapping of names to arrays, or to what numpy makes arrays of. Refuses what has no bytes.

    An array whose memory lies within that of an earlier one is a view of that: tied weights go in once.
    """

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}
        self._views: list[View] = []
        self._taken: list[tuple[int, int, str]] = []  # address, end, name: of contiguous arrays, sorted
        self.names: Collection[str] = arrays.keys()
        for name, value in arrays.items():
            if not isinstance(name, str):
                raise BuildError(f"array name {name!r} is not a string; name arrays with strings")
            array = _as_array(name, value)
            dtype_to_json(array.dtype, name=name)  # refuse it now, not after an hour of compressing
            self._add(name, array)
        self.total_bytes = self.source_bytes = sum(array.nbytes for array in self._arrays.values())

    def _add(self, name: str, array: NDArray[Any]) -> None:
        begin = array.__array_interface__["data"][0]
        view = View(name, "", 0, array.dtype, array.shape, array.strides)
        # Those that are taken are kept, so nothing else can come to lie at their addresses meanwhile.
        at = bisect_right(self._taken, begin, key=lambda taken: taken[0]) - 1
        if array.nbytes and at >= 0 and min(array.strides, default=0) >= 0:
            start, end, other = self._taken[at]
            if begin + view.span <= end:
                self._views.append(view._replace(array=other, offset=begin - start))
                return
        self._arrays[name] = array
        if array.nbytes and (array.flags.c_contiguous or array.flags.f_contiguous):
            insort(self._taken, (begin, begin + array.nbytes, name))

    @property
    def views(self) -> Sequence[View]:
        return self._views

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {}

    def items(self) -> Items:
        for name, array in self._arrays.items():
            fortran = array.flags.f_contiguous and not array.flags.c_contiguous
            pieces = pieces_in_c_order(array.T if fortran else array)
            yield Item(name, array.dtype, array.shape, pieces, "F" if fortran else "C")

    def origin(self, offsets: Mapping[str, int]) -> None:
        return None

    def close(self) -> None:
        pass


def _as_array(name: str, value: Any) -> NDArray[Any]:
    if isinstance(value, np.ma.MaskedArray):
        raise UnsupportedDtype(f"array {name!r} is a masked array; give its .filled() or its .data and .mask")
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedDtype(
            f"array {name!r} cannot be made a numpy array ({error}); convert it first"
        ) from error


class StreamSource:
    """A binary stream of unknown length: one uint8 array called "data"."""

    total_bytes: int | None = None
    views: Sequence[View] = ()

    def __init__(self, file: BinaryIO, *, file_name: str, close: bool) -> None:
        self._file = file
        self._file_name = file_name
        self._close = close
        self._sha256 = hashlib.sha256()
        self.source_bytes = 0

    @property
    def names(self) -> Collection[str]:
        return ("data",)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {}

    def items(self) -> Items:
        yield Item("data", np.dtype(np.uint8), None, self._pieces())

    def _pieces(self) -> Iterator[bytes]:
        while True:
            try:
                data = self._file.read(PIECE)
            except OSError as error:
                raise BuildError(
                    f"{self._file_name}: reading failed after {self.source_bytes} bytes ({error})"
                ) from error
            if isinstance(data, str):
                raise BuildError(f"{self._file_name}: is opened as text; open it in mode 'rb'")
            if data is None:
                raise BuildError(f"{self._file_name}: is non-blocking and has no data; make it blocking")
            if not data:
                return
            self._sha256.update(data)
            self.source_bytes += len(data)
            yield data

    def origin(self, offsets: Mapping[str, int]) -> tuple[Origin, NDArray[np.void]]:
        file = OriginFile(self._file_name, self.source_bytes, self._sha256.hexdigest())
        extents = np.zeros(1 if self.source_bytes else 0, structs.EXTENT.dtype)
        extents["content_offset"] = offsets["data"]
        extents["length"] = self.source_bytes
        return Origin("raw", True, (file,)), extents

    def close(self) -> None:
        if self._close:
            self._file.close()


class SnapshotSource:
    """An existing snapshot, built again with other settings. Its zero chunks are not read."""

    def __init__(self, blob: Blob, opener: Opener) -> None:
        self._blob = blob
        self._reader = SnapshotReader(blob, opener)
        self._index = self._reader.index
        self.total_bytes = int(self._index.arrays["nbytes"].sum())
        self.source_bytes = blob.size

    @property
    def names(self) -> Collection[str]:
        return self._index.visible

    @property
    def views(self) -> Sequence[View]:
        metadata = self._index.array_metadata
        return [view._replace(metadata=metadata.get(name, {})) for name, view in self._index.views.items()]

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._index.metadata

    def items(self) -> Items:
        index = self._index
        ranges = (index.range_of(row) for row in range(len(index.names)))
        with self._reader.ahead(ranges):
            for row, name in enumerate(index.names):
                yield Item(
                    name,
                    index.dtype_of(row),
                    index.shape_of(row),
                    self._pieces(*index.range_of(row)),
                    index.order_of(row),
                    index.is_hidden(row),
                    index.array_metadata.get(name, {}),
                    phase=index.range_of(row)[0] % SMALL_ALIGNMENT,
                )

    def _pieces(self, offset: int, length: int) -> Iterator[Piece]:
        for segment in self._reader.segments(offset, length):
            if segment.chunk is None:
                yield segment.length
            else:
                yield from self._reader.read_segment(segment)

    def origin(self, offsets: Mapping[str, int]) -> tuple[Origin, NDArray[np.void]] | None:
        index, old = self._index, self._index.container
        if old is None:
            return None
        moved = np.fromiter((offsets[name] for name in index.names), np.uint64, len(index.names))
        extents = index.extents.copy()
        extents["content_offset"] = self._moved(moved, extents["content_offset"], extents["length"])
        files = []
        for file in old.files:
            members = []
            for member in file.deflated:
                pairs = np.array(member.extents, np.uint64).reshape(-1, 2)
                starts = self._moved(moved, pairs[:, 0], pairs[:, 1])
                new = tuple(zip(starts.tolist(), pairs[:, 1].tolist(), strict=True))
                members.append(replace(member, extents=new))
            files.append(replace(file, deflated=tuple(members)))
        return replace(old, files=tuple(files)), extents

    def _moved(
        self, moved: NDArray[np.uint64], start: NDArray[np.uint64], length: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        """Content offsets of ranges, now that arrays lie elsewhere; each must lie in one array."""
        index = self._index
        # Of arrays that end at one place only the first can be non-empty; side="right" skips them.
        rows = np.searchsorted(index.ends, start, "right")
        inside = not len(rows) or int(rows.max()) < len(moved)
        begins, ends = index.arrays["offset"], index.ends
        if not inside or np.any(start < begins[rows]) or np.any(start + length > ends[rows]):
            raise FormatError(
                f"{index.url}: section EXTN has an extent that lies in no array, so it cannot be moved; "
                "extract the snapshot and build from its files",
                url=index.url,
                field="section EXTN",
            )
        shifted: NDArray[np.uint64] = moved[rows] + (start - begins[rows])
        return shifted

    def close(self) -> None:
        self._reader.close()
        self._blob.close()


def file_name_of(file: object, default: str) -> str:
    """The last part of a file object's path, where it has one that is a path."""
    name = getattr(file, "name", None)
    return os.path.basename(name) or default if isinstance(name, str) else default
