# SPDX-License-Identifier: Apache-2.0
"""The index of a snapshot in memory, and how it is read from a file's tail.

Owns `SnapshotIndex`. Nothing leaves `parse_index` that has not been checked, and opening costs what
the index costs: no chunk is read, and no Python object is made per array but its name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from .. import _native
from ..dtypes import dtype_from_json
from ..errors import FormatError
from ..views import View
from . import structs
from .layers import Base, parse_bases
from .origin import Origin, parse_origin
from .sections import (
    Section,
    damaged,
    decode_json,
    decode_section,
    parse_directory,
    unsupported,
)
from .tables import check_arrays, check_extents, check_records, check_runs, split_names
from .views import parse_views

#: (offset, length) -> exactly those bytes of the file.
Read = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class IndexSummary:
    """What `info` shows. Sizes in bytes; ratio is array bytes over stored chunk bytes.

    arrays: visible ones, of which `views` have no bytes of their own. stored_bytes: in this file;
    shared_chunks lie in the bases of a layer, and count in codecs and filters, too.
    """

    arrays: int
    views: int
    hidden_arrays: int
    array_bytes: int
    content_size: int
    file_size: int
    chunk_size: int
    chunks: int
    zero_chunks: int
    shared_chunks: int
    stored_bytes: int
    codecs: Mapping[str, int]
    filters: Mapping[str, int]
    ratio: float


class Place(NamedTuple):
    """Where an array lies in the content, and how. offset, nbytes: the range that holds its elements.

    order: "C" or "F", in which they follow one another; with strides (bytes) they do not.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: str
    strides: tuple[int, ...] | None
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Bytes of all elements, each as often as it is shown."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class SnapshotIndex:
    """Everything a reader knows of a snapshot before it reads a chunk. Immutable by convention.

    sources: the bases of a layer, which records name from 1 on; empty for other files.
    runs, records, arrays, extents: the sections' own records (structs.RUN, CHUNK, ARRAY, EXTENT).
    names: of all arrays, hidden ones too, in the order of `arrays`. rows: visible name -> row.
    views: more visible names, and bases: the row of each view's array.
    shapes: all dimensions one after another. ends: where each array ends in the content.
    sections: raw bytes of the sections the digest covers. cold: where the unread ones lie.
    """

    url: str
    file_size: int
    content_size: int
    chunk_size: int
    digest: bytes
    features: tuple[str, ...]
    sources: tuple[Base, ...]
    runs: NDArray[np.void]
    records: NDArray[np.void]
    arrays: NDArray[np.void]
    ends: NDArray[np.uint64]
    name_bytes: bytes
    names: list[str]
    rows: Mapping[str, int]
    views: Mapping[str, View]
    bases: Mapping[str, int]
    shapes: NDArray[np.uint64]
    dtypes: tuple[np.dtype[Any], ...]
    metadata: Mapping[str, Any]
    array_metadata: Mapping[str, Any]
    created_by: str | None
    container: Origin | None
    extents: NDArray[np.void]
    sections: Mapping[str, bytes]
    cold: Mapping[str, Section]

    @property
    def chunk_count(self) -> int:
        return -(-self.content_size // self.chunk_size)

    def chunk_length(self, chunk: int) -> int:
        """Uncompressed bytes of a chunk; the last one may be shorter than chunk_size."""
        return min(self.chunk_size, self.content_size - chunk * self.chunk_size)

    def dtype_of(self, row: int) -> np.dtype[Any]:
        return self.dtypes[int(self.arrays["dtype"][row])]

    def shape_of(self, row: int) -> tuple[int, ...]:
        begin = int(self.arrays["shape_offset"][row])
        return tuple(self.shapes[begin : begin + int(self.arrays["ndim"][row])].tolist())

    def order_of(self, row: int) -> str:
        """ "C" or "F"."""
        return "F" if self.arrays["flags"][row] & structs.FORTRAN else "C"

    def is_hidden(self, row: int) -> bool:
        return bool(self.arrays["flags"][row] & structs.HIDDEN)

    def range_of(self, row: int) -> tuple[int, int]:
        """(offset in the content, nbytes)."""
        return int(self.arrays["offset"][row]), int(self.arrays["nbytes"][row])

    @property
    def visible(self) -> list[str]:
        """Names of all arrays of the user's, views too."""
        return [*self.rows, *self.views]

    def place_of(self, name: str) -> Place:
        """Where an array or a view lies. Raises KeyError for any but visible names."""
        view = self.views.get(name)
        if view is None:
            row = self.rows[name]
            return Place(
                self.dtype_of(row), self.shape_of(row), self.order_of(row), None, *self.range_of(row)
            )
        order = view.order
        strides = None if order else view.strides
        offset = self.range_of(self.bases[name])[0] + view.offset
        return Place(view.dtype, view.shape, order or "C", strides, offset, view.span)

    def rows_between(self, begin: int, end: int) -> list[int]:
        """Rows of the non-empty arrays that have bytes in content [begin, end)."""
        low = int(np.searchsorted(self.ends, begin, "right"))
        high = int(np.searchsorted(self.arrays["offset"], end, "left"))
        return [row for row in range(low, high) if self.arrays["nbytes"][row]]

    def record_of(self, chunk: int) -> int | None:
        """Index into `records` of the chunk's record, or None for a chunk of zeros."""
        if not 0 <= chunk < self.chunk_count:
            raise IndexError(f"chunk {chunk} of {self.chunk_count}")
        run = self.runs[int(np.searchsorted(self.runs["first_chunk"], chunk, "right")) - 1]
        if run["first_record"] == structs.ZERO_RUN:
            return None
        return int(run["first_record"]) + chunk - int(run["first_chunk"])

    def summary(self) -> IndexSummary:
        hidden = (self.arrays["flags"] & structs.HIDDEN) != 0
        hidden[list(self.bases.values())] = False  # its bytes are shown
        array_bytes = int(self.arrays["nbytes"][~hidden].sum())
        is_own = self.records["source"] == 0
        stored_bytes = int(self.records["stored_length"][is_own].sum(dtype=np.uint64))
        codecs = np.bincount(self.records["codec"], minlength=len(structs.CODEC_NAMES)).tolist()
        filters: dict[str, int] = {}
        for kind, name in structs.FILTER_NAMES.items():
            own = self.records["width"][self.records["filter"] == kind]
            widths = np.bincount(own, minlength=9).tolist()
            filters |= {f"{name}{width}": widths[width] for width in structs.PLANE_WIDTHS if widths[width]}
        return IndexSummary(
            arrays=len(self.rows) + len(self.views),
            views=len(self.views),
            hidden_arrays=int(hidden.sum()),
            array_bytes=array_bytes,
            content_size=self.content_size,
            file_size=self.file_size,
            chunk_size=self.chunk_size,
            chunks=self.chunk_count,
            zero_chunks=self.chunk_count - len(self.records),
            shared_chunks=int((~is_own).sum()),
            stored_bytes=stored_bytes,
            codecs={name: codecs[code] for code, name in structs.CODEC_NAMES.items() if codecs[code]},
            filters=filters,
            ratio=array_bytes / stored_bytes if stored_bytes else 0.0,
        )


def content_digest(
    chunk_size: int,
    content_size: int,
    runs: NDArray[np.void],
    chunk_digests: bytes | bytearray,
    sections: Mapping[str, bytes],
) -> bytes:
    """FORMAT.md, *Digest*. chunk_digests: 32 bytes per record, in the order of CHNK."""
    total = hashlib.sha256(structs.DIGEST_PREFIX)
    total.update(chunk_size.to_bytes(8, "little") + content_size.to_bytes(8, "little"))
    zero_chunk = hashlib.sha256(bytes(chunk_size)).digest()
    size = structs.DIGEST_SIZE
    batch = 1 << 15  # bounds memory: a run may be 2^30 chunks
    stored = memoryview(chunk_digests)
    for first_chunk, count, first_record in runs.tolist():
        if first_record != structs.ZERO_RUN:
            total.update(stored[first_record * size : (first_record + count) * size])
            continue
        last = content_size - (first_chunk + count - 1) * chunk_size  # of the run's last chunk
        whole = count if last >= chunk_size else count - 1
        for done in range(0, whole, batch):
            total.update(zero_chunk * min(batch, whole - done))
        if whole != count:
            total.update(hashlib.sha256(bytes(last)).digest())
    for name in structs.DIGEST_SECTIONS:
        raw = sections.get(name, b"")
        total.update(len(raw).to_bytes(8, "little"))
        total.update(raw)
    return total.digest()


def is_snapshot(data: bytes) -> bool:
    """Whether `data`, a file's first bytes (8 or more) or last bytes (128 or more), are a snapshot's."""
    tail = data[-structs.TAIL.size :]
    return data.startswith(structs.HEAD_MAGIC) or (
        len(tail) == structs.TAIL.size and tail.startswith(structs.TAIL_MAGIC)
    )


def parse_head(url: str, data: bytes) -> dict[str, Any]:
    """The head's fields. Only `verify` needs it; opening does not."""
    if len(data) != structs.HEAD.size or not data.startswith(structs.HEAD_MAGIC):
        raise damaged(url, "head magic", f"is {data[:8]!r}")
    head = structs.HEAD.unpack(data)
    if head["checksum"] != _native.checksum(data[:-8]):
        raise damaged(url, "head", "does not match its checksum")
    if head["head_size"] != structs.HEAD.size or any(head["reserved"]) or head["major"] != structs.MAJOR:
        raise damaged(url, "head", "has an impossible size, version or reserved byte")
    return head


def parse_index(url: str, tail: bytes, read: Read, file_size: int) -> SnapshotIndex:
    """Read and check the index of the file `url`.

    tail: its last bytes, TAIL_READ of them or the whole file. read: fetches the rest, if the index
    does not fit into them. file_size: the true one. Raises `FormatError` or `UnsupportedFormat`.
    """
    fields = parse_tail(url, tail, read, file_size)
    offset, length = fields["index_offset"], fields["index_length"]
    begin = offset - (file_size - len(tail))
    index = tail[begin : begin + length] if begin >= 0 else read(offset, length)
    if len(index) != length or _native.checksum(index) != fields["index_checksum"]:
        raise damaged(url, "index", "does not match its checksum")
    directory, view = parse_directory(url, index, offset), memoryview(index)
    decompressor = zstandard.ZstdDecompressor()

    def load(section_id: str) -> bytes | None:
        section = directory.get(section_id)
        if section is None:
            return None
        start = section.offset - offset
        return decode_section(url, section, view[start : start + section.stored_length], decompressor)

    features = _parse_features(url, fields["incompatible"], load("FEAT"))
    return _Parser(url, fields, directory, load).parse(features)


def parse_tail(url: str, tail: bytes, read: Read, file_size: int) -> dict[str, Any]:
    """The tail's fields, checked. Arguments and errors are those of `parse_index`."""
    size = structs.TAIL.size
    if file_size < structs.HEAD.size + size or len(tail) < size:
        raise damaged(url, "file_size", f"is {file_size} bytes, too few for a snapshot")
    data = tail[-size:]
    if not data.startswith(structs.TAIL_MAGIC):
        if read(0, 8) == structs.HEAD_MAGIC:
            raise damaged(url, "tail", "is missing: the file was cut short, added to or never finished")
        raise FormatError(
            f"{url}: is not a snapshot (no lazymem tail at its end); `lazymem build` makes one from it",
            url=url,
            field="tail magic",
        )
    fields = structs.TAIL.unpack(data)
    if fields["checksum"] != _native.checksum(data[:-8]):
        raise damaged(url, "tail", "does not match its checksum")
    if fields["major"] > structs.MAJOR:
        raise unsupported(url, "major", f"is format version {fields['major']}.{fields['minor']}")
    if fields["major"] < 1:
        raise damaged(url, "major", "is 0")
    if fields["tail_size"] != size:
        raise damaged(url, "tail_size", f"is {fields['tail_size']}, not {size}")
    if fields["reserved0"] or fields["reserved1"]:
        raise damaged(url, "tail reserved", "is not zero")
    if fields["file_size"] != file_size:
        raise damaged(url, "file_size", f"says {fields['file_size']} bytes, but the file has {file_size}")
    chunk_size = fields["chunk_size"]
    if not 1 << 16 <= chunk_size <= 1 << 26 or chunk_size & (chunk_size - 1):
        raise damaged(url, "chunk_size", f"is {chunk_size}, not a power of two from 2^16 to 2^26")
    if fields["content_size"] > structs.MAX_CONTENT:
        raise damaged(url, "content_size", f"is {fields['content_size']}, more than 2^46")
    if fields["index_offset"] < structs.HEAD.size:
        raise damaged(url, "index_offset", f"is {fields['index_offset']}, inside the head")
    if fields["index_offset"] + fields["index_length"] + size != file_size:
        raise damaged(url, "index_length", "and index_offset do not lead to the tail")
    return fields


def _parse_features(url: str, incompatible: int, raw: bytes | None) -> tuple[str, ...]:
    names = [] if raw is None else decode_json(url, "FEAT", raw, list)
    if not all(isinstance(name, str) for name in names):
        raise damaged(url, "section FEAT", "has a name that is not a string")
    unknown = incompatible & ~structs.KNOWN_INCOMPATIBLE
    names = [name for name in names if name not in structs.FEATURE_BITS.values()]
    if unknown or names:
        bits = [structs.FEATURE_BITS.get(1 << i, f"bit {i}") for i in range(64) if unknown >> i & 1]
        shown = ", ".join(str(name)[:100] for name in names[:10]) or ", ".join(bits)
        raise unsupported(url, "incompatible", f"says that the file uses {shown}")
    return tuple(name for bit, name in structs.FEATURE_BITS.items() if incompatible & bit)


def _visible_rows(names: list[str], flags: NDArray[np.uint8]) -> dict[str, int]:
    rows = dict(zip(names, range(len(names)), strict=True))
    for row in np.flatnonzero(flags & structs.HIDDEN).tolist():  # few
        del rows[names[row]]
    return rows


class _Parser:
    """Sections -> `SnapshotIndex`, in the order in which the checks depend on one another."""

    def __init__(
        self,
        url: str,
        tail: Mapping[str, Any],
        directory: Mapping[str, Section],
        load: Callable[[str], bytes | None],
    ) -> None:
        self._url = url
        self._tail = tail
        self._directory = directory
        self._load = load
        self._raw: dict[str, bytes] = {}

    def _table(self, section_id: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        raw = self._load(section_id) or b""
        self._raw[section_id] = raw
        if len(raw) % dtype.itemsize:
            what = f"has {len(raw)} bytes, not a multiple of {dtype.itemsize}"
            raise damaged(self._url, f"section {section_id}", what)
        return np.frombuffer(raw, dtype)

    def _json(self, section_id: str, kind: type) -> Any:
        raw = self._load(section_id)
        if raw is None:
            return None
        self._raw[section_id] = raw
        return decode_json(self._url, section_id, raw, kind)

    def parse(self, features: tuple[str, ...]) -> SnapshotIndex:
        url, tail, raw = self._url, self._tail, self._raw
        content_size, chunk_size = tail["content_size"], tail["chunk_size"]
        chunk_count = -(-content_size // chunk_size)

        cold = {name: s for name, s in self._directory.items() if s.flags & structs.COLD}
        chunks_end = min([tail["index_offset"], *(s.offset for s in cold.values())])
        runs = self._table("RUNS", structs.RUN.dtype)
        records = self._table("CHNK", structs.CHUNK.dtype)
        check_runs(url, raw["RUNS"], len(records), chunk_count)
        stored_last = len(runs) and runs["first_record"][-1] != structs.ZERO_RUN
        tail_length = content_size - (chunk_count - 1) * chunk_size
        bases = parse_bases(url, self._json("SRCS", list) or [])
        if bool(bases) != bool(tail["incompatible"] & structs.LAYERS):
            raise damaged(url, "section SRCS", "and the feature bit `layers` do not agree")
        ends = [chunks_end, *(base.size - structs.TAIL.size for base in bases)]
        last_length = tail_length if stored_last else chunk_size
        check_records(url, raw["CHNK"], records, chunk_size, last_length, ends)
        digests = cold.get("CDIG")
        if digests is not None and digests.raw_length != len(records) * structs.DIGEST_SIZE:
            raise damaged(url, "section CDIG", f"is not {structs.DIGEST_SIZE} bytes for each record")

        arrays = self._table("ARRS", structs.ARRAY.dtype)
        shapes = self._table("SHAP", np.dtype("<u8"))
        name_bytes = raw["NAME"] = self._load("NAME") or b""
        dtypes = self._dtypes(len(arrays))
        item_sizes = [dtype.itemsize for dtype in dtypes]
        check_arrays(url, raw["ARRS"], raw["SHAP"], item_sizes, len(name_bytes), content_size)
        names = split_names(url, arrays, name_bytes)
        views = parse_views(url, self._json("VIEW", list), names, arrays["nbytes"])

        metadata, array_metadata = self._metadata()
        container = self._json("CONT", dict)
        origin = None if container is None else parse_origin(url, container, content_size)
        extents = self._table("EXTN", structs.EXTENT.dtype)
        check_extents(url, origin, raw["EXTN"], content_size)
        tool = self._json("TOOL", dict) or {}
        created_by = tool.get("created_by")
        return SnapshotIndex(
            url=url,
            file_size=tail["file_size"],
            content_size=content_size,
            chunk_size=chunk_size,
            digest=tail["digest"],
            features=features,
            sources=bases,
            runs=runs,
            records=records,
            arrays=arrays,
            ends=arrays["offset"] + arrays["nbytes"],
            name_bytes=name_bytes,
            names=names,
            rows=_visible_rows(names, arrays["flags"]),
            views={view.name: view for view, _ in views},
            bases={view.name: row for view, row in views},
            shapes=shapes,
            dtypes=dtypes,
            metadata=metadata,
            array_metadata=array_metadata,
            created_by=created_by if isinstance(created_by, str) else None,
            container=origin,
            extents=extents,
            sections={name: self._raw[name] for name in structs.DIGEST_SECTIONS if name in self._raw},
            cold=cold,
        )

    def _dtypes(self, array_count: int) -> tuple[np.dtype[Any], ...]:
        values = self._json("DTYP", list)
        if len(values) > array_count:
            raise damaged(self._url, "section DTYP", f"has {len(values)} dtypes for {array_count} arrays")
        return tuple(
            dtype_from_json(value, url=self._url, field=f"section DTYP entry {i}")
            for i, value in enumerate(values)
        )

    def _metadata(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        value = self._json("META", dict) or {}
        metadata, arrays = value.get("metadata", {}), value.get("arrays", {})
        if not isinstance(metadata, dict) or not isinstance(arrays, dict):
            raise damaged(self._url, "section META", "has metadata or arrays that is not an object")
        if not all(isinstance(entry, dict) for entry in arrays.values()):
            raise damaged(self._url, "section META", "has an array's metadata that is not an object")
        return metadata, arrays
