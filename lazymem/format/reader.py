# SPDX-License-Identifier: Apache-2.0
"""Reads the chunks of a snapshot from any blob, eagerly: for `verify`, `extract`, `cat`, `build`.

Lazy memory does not come through here; the engine reads chunks in C. Owns the decoders and
the bases of a layer; the blob stays the caller's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from .. import _native
from ..errors import ChunkCorrupt, FormatError, UnsupportedFormat
from ..store import locations
from ..store.ahead import AheadBlob
from ..store.base import Blob, Opener
from . import structs
from .bases import open_bases
from .index import SnapshotIndex, is_snapshot, parse_index
from .layers import resolve
from .sections import decode_section

#: Zeros are handed out in pieces of this size, all of them one object.
_ZEROS = memoryview(bytes(1 << 20))
_SUFFIX = ".lzm"


def has_tail_magic(blob: Blob) -> bool:
    """Whether the last bytes are a snapshot's. No request: a remote blob comes with its last bytes."""
    length = min(blob.size, structs.TAIL.size)
    return is_snapshot(blob.read(blob.size - length, length))


def has_head_magic(head: bytes) -> bool:
    """Whether `head`, the first bytes of a file, are a snapshot's."""
    return head.startswith(structs.HEAD_MAGIC)


def has_magic(blob: Blob) -> bool:
    """Whether the last or the first bytes are a snapshot's."""
    return has_tail_magic(blob) or has_head_magic(blob.read(0, min(blob.size, len(structs.HEAD_MAGIC))))


def open_snapshot(location: str, opener: Opener) -> Blob | None:
    """The object, opened, if it is a snapshot; None for anything else, folders too.

    A file with one damaged end is a snapshot still, so that it is not taken for raw bytes. Raises
    `FormatError` where only the suffix says so; `SnapshotNotFound`, `AccessDenied`, `ReadError`.
    """
    if opener.is_folder(location):
        return None
    blob = opener.open(location)
    try:
        if has_magic(blob):
            return blob
        refuse_suffix(blob)
    except BaseException:
        blob.close()
        raise
    blob.close()
    return None


def refuse_suffix(blob: Blob) -> None:
    """Raise `FormatError` if `blob`, which has no magic, is called a snapshot."""
    if os.path.splitext(locations.name_of(blob.url))[1].lower() == _SUFFIX:
        raise FormatError(
            f"{blob.url}: is called {_SUFFIX}, but neither begins nor ends as a snapshot; it is damaged or "
            f"cut short: copy the file again or build it anew (if it is something else, rename it)",
            url=blob.url,
            field="head magic",
        )


def load_index(blob: Blob) -> SnapshotIndex:
    """Read and check a snapshot's index: one read, two where the index is over 64 KiB."""
    size = blob.size
    length = min(size, structs.TAIL_READ)
    return parse_index(blob.url, blob.read(size - length, length), blob.read, size)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the content that lies in one chunk, or in a run of chunks that are all zeros."""

    offset: int
    length: int
    chunk: int | None  # None: zeros


class SnapshotReader:
    """The content of a snapshot by chunk and by range. Threads may share it.

    opener: opens the bases of a layer, which `close` closes; without one only chunks that lie in `blob`
    itself can be read. Raises as `load_index` and `open_bases`.
    """

    def __init__(self, blob: Blob, opener: Opener | None = None) -> None:
        self.blob = blob
        self.index = load_index(blob)
        self.bases = () if opener is None else open_bases(self.index, opener)
        self._sources: tuple[Blob, ...] = (blob, *self.bases)
        self._local = threading.local()

    def close(self) -> None:
        """Close the bases; the blob stays the caller's. Idempotent."""
        for base in self.bases:
            base.close()

    def chunk_arrays(self, chunk: int) -> list[str]:
        """Names of the arrays with bytes in the chunk, in the order they lie, hidden ones too."""
        index = self.index
        begin = chunk * index.chunk_size
        return [index.names[row] for row in index.rows_between(begin, begin + index.chunk_size)]

    @contextmanager
    def ahead(self, ranges: Iterable[tuple[int, int]]) -> Iterator[None]:
        """Within the block one thread reads these content ranges (offset, length), in this order.

        The chunks of a remote blob, and of its bases, are then fetched several at a time, before they are
        asked for.
        """
        if self.blob.fileno() is not None:
            yield
            return
        plain, wanted = self._sources, list(ranges) if self.bases else ranges
        with ExitStack() as stack:
            self._sources = tuple(
                stack.enter_context(AheadBlob(blob, self._stored_ranges(wanted, source)))
                for source, blob in enumerate(plain)
            )
            try:
                yield
            finally:
                self._sources = plain

    def _stored_ranges(self, ranges: Iterable[tuple[int, int]], source: int) -> Iterator[tuple[int, int]]:
        index, last = self.index, None
        for offset, length in ranges:
            for segment in self.segments(offset, length):
                record = None if segment.chunk in (None, last) else index.record_of(segment.chunk)
                if record is not None:
                    last = segment.chunk
                    if index.records["source"][record] != source:
                        continue
                    yield int(index.records["offset"][record]), int(index.records["stored_length"][record])

    def read_stored(self, record: int) -> bytes:
        """The stored bytes of a record, unchecked. Raises `ReadError`."""
        row = self.index.records[record]
        return self._sources[int(row["source"])].read(int(row["offset"]), int(row["stored_length"]))

    def base_of(self, record: int) -> str | None:
        """The URL of the base that holds the record's bytes; None: they lie in the file itself."""
        source = int(self.index.records["source"][record])
        return resolve(self.index.url, self.index.sources[source - 1]) if source else None

    def read_chunk(self, chunk: int) -> memoryview:
        """The chunk's bytes, checked and decoded; fewer than chunk_size only for the last chunk.

        Each thread keeps the last chunk it read, so that small arrays of one chunk cost one decode.
        Raises `ChunkCorrupt`, or what the blob raises.
        """
        kept: tuple[int, memoryview] | None = getattr(self._local, "kept", None)
        if kept is not None and kept[0] == chunk:
            return kept[1]
        record = self.index.record_of(chunk)
        if record is None:
            return memoryview(bytes(self.index.chunk_length(chunk)))
        data = memoryview(self.decode(chunk, record, self.read_stored(record))).toreadonly()
        self._local.kept = (chunk, data)
        return data

    def decode(self, chunk: int, record: int, stored: bytes) -> bytearray:
        """The bytes of `chunk`, whose record and stored bytes are given. Raises `ChunkCorrupt`."""
        decoder: _native.Decoder | None = getattr(self._local, "decoder", None)
        if decoder is None:
            decoder = self._local.decoder = _native.Decoder()
        out = bytearray(self.index.chunk_length(chunk))
        try:
            decoder.decode(self.index.records[record].tobytes(), stored, out)
        except _native.NativeError as error:
            if error.code == _native.E_CODEC:
                codec = structs.CODEC_NAMES[int(self.index.records["codec"][record])]
                raise UnsupportedFormat(
                    f"{self.index.url}: chunk {chunk} needs the {codec} decoder, which was not found; "
                    "`lazymem doctor` says where it is looked for",
                    url=self.index.url,
                    field="section CHNK",
                ) from error
            raise self._corrupt(chunk, record, error) from error
        return out

    def check_stored(self, record: int, stored: bytes) -> None:
        """Raise `ChunkCorrupt` unless these are the stored bytes of the record."""
        if _native.checksum(stored) != int(self.index.records["checksum"][record]):
            runs = self.index.runs[self.index.runs["first_record"] != structs.ZERO_RUN]
            run = runs[int(runs["first_record"].searchsorted(record, "right")) - 1]
            chunk = int(run["first_chunk"]) + record - int(run["first_record"])
            raise self._corrupt(chunk, record, "the stored bytes do not match their checksum")

    def _corrupt(self, chunk: int, record: int, error: object) -> ChunkCorrupt:
        arrays = self.chunk_arrays(chunk)
        where = f", array {arrays[0]!r}" if arrays else ""
        offset, base = int(self.index.records["offset"][record]), self.base_of(record)
        file = "file offset" if base is None else f"offset in its base {base}:"
        return ChunkCorrupt(
            f"{self.index.url}: chunk {chunk} ({file} {offset}{where}) is damaged: {error}; "
            "copy the file again or build it anew",
            url=self.index.url,
            chunk=chunk,
            array=arrays[0] if arrays else None,
        )

    def segments(self, offset: int, length: int) -> Iterator[Segment]:
        """The content range cut at chunks; runs of zero chunks come as one. Reads nothing."""
        index, end = self.index, offset + length
        if offset < 0 or length < 0 or end > index.content_size:
            raise ValueError(f"content range {offset}+{length} is outside 0 to {index.content_size}")
        size = index.chunk_size
        for first, count, record in _runs_from(index, offset // size):
            if offset >= end:
                return
            if record == structs.ZERO_RUN:
                stop = min(end, (first + count) * size)
                yield Segment(offset, stop - offset, None)
                offset = stop
                continue
            while offset < end and offset < (first + count) * size:
                chunk = offset // size
                stop = min(end, (chunk + 1) * size)
                yield Segment(offset, stop - offset, chunk)
                offset = stop

    def read_segment(self, segment: Segment) -> Iterator[memoryview]:
        """The bytes of a segment, in pieces of at most a chunk or 1 MiB. Raises as `read_chunk`."""
        if segment.chunk is not None:
            begin = segment.offset - segment.chunk * self.index.chunk_size
            yield self.read_chunk(segment.chunk)[begin : begin + segment.length]
            return
        left = segment.length
        while left:
            piece = _ZEROS[:left]
            yield piece
            left -= len(piece)

    def read_range(self, offset: int, length: int) -> Iterator[memoryview]:
        """The bytes of a content range in pieces; at most one chunk is held. Raises as `read_chunk`."""
        for segment in self.segments(offset, length):
            yield from self.read_segment(segment)

    def chunk_digests(self) -> bytes | None:
        """Section CDIG: SHA-256 of each stored chunk, 32 bytes a record, or None if the file has none.

        Raises `FormatError` if it is damaged.
        """
        section = self.index.cold.get("CDIG")
        if section is None:
            return None
        stored = self.blob.read(section.offset, section.stored_length)
        return decode_section(self.index.url, section, stored)


def _runs_from(index: SnapshotIndex, chunk: int) -> Iterator[tuple[int, int, int]]:
    row = max(int(index.runs["first_chunk"].searchsorted(chunk, "right")) - 1, 0)
    for run in index.runs[row:]:
        yield int(run["first_chunk"]), int(run["count"]), int(run["first_record"])
