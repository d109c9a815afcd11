# SPDX-License-Identifier: Apache-2.0
"""Snapshots in memory, and ways to damage them so that only one thing is wrong."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lazymem import _native
from lazymem.format import structs
from lazymem.format.index import SnapshotIndex, parse_index
from lazymem.format.sections import (
    EncodedSection,
    decode_section,
    encode_index,
    encode_section,
    parse_directory,
)
from lazymem.format.writer import SnapshotWriter
from lazymem.options import BuildOptions

URL = "memory.lzm"


class MemoryBlob:
    """A blob over bytes that refuses reads outside them."""

    identity = "memory"
    url = URL

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        return self.data[offset : offset + length]

    def read_into(self, offset: int, out: memoryview) -> None:
        out[:] = self.read(offset, len(out))

    def fileno(self) -> None:
        return None

    def has_changed(self) -> bool:
        return False

    def close(self) -> None:
        pass


def write_snapshot(arrays: Mapping[str, np.ndarray[Any, Any]], **options: Any) -> bytes:
    options.setdefault("chunk_size", 1 << 16)
    options.setdefault("threads", 2)
    file = io.BytesIO()
    with SnapshotWriter(file, BuildOptions(**options)) as writer:
        for name, array in arrays.items():
            writer.add_array(name, array.dtype, array.shape)
            writer.write(np.frombuffer(array.tobytes(), np.uint8))
        writer.finish(metadata={"made": "for a test"}, array_metadata={name: {"n": 1} for name in arrays})
    return file.getvalue()


def parse(data: bytes, tail_read: int = structs.TAIL_READ) -> SnapshotIndex:
    blob = MemoryBlob(data)
    return parse_index(URL, data[-tail_read:], blob.read, len(data))


def tail_fields(data: bytes) -> dict[str, Any]:
    return structs.TAIL.unpack(data[-structs.TAIL.size :])


def with_tail(data: bytes, **fields: Any) -> bytes:
    """The same file with other fields in its tail, and a tail checksum that is right."""
    values = {
        name: np.void(value) if isinstance(value, bytes) else value
        for name, value in {**tail_fields(data), **fields}.items()
    }
    tail = structs.TAIL.pack(**values)
    if "checksum" not in fields:
        tail = tail[:-8] + _native.checksum(tail[:-8]).to_bytes(8, "little")
    return data[: -structs.TAIL.size] + tail


def with_index(data: bytes, index: bytes, **fields: Any) -> bytes:
    """The same chunks under another index, sealed so that only its content can be wrong."""
    offset = tail_fields(data)["index_offset"]
    size = offset + len(index) + structs.TAIL.size
    fields = {
        "index_length": len(index),
        "index_checksum": _native.checksum(index),
        "file_size": size,
        **fields,
    }
    return with_tail(data[:offset] + index + data[-structs.TAIL.size :], **fields)


def raw_sections(data: bytes) -> dict[str, bytes]:
    """Raw bytes of all hot sections."""
    fields = tail_fields(data)
    begin, length = fields["index_offset"], fields["index_length"]
    return {
        name: decode_section(URL, section, data[section.offset : section.offset + section.stored_length])
        for name, section in parse_directory(URL, data[begin : begin + length], begin).items()
        if not section.flags & structs.COLD
    }


def with_sections(data: bytes, change: Callable[[dict[str, bytes]], object], **tail: Any) -> bytes:
    """The same file with other raw sections; everything around them is right."""
    sections = raw_sections(data)
    change(sections)
    fields = tail_fields(data)
    begin, length = fields["index_offset"], fields["index_length"]
    digests = parse_directory(URL, data[begin : begin + length], begin)["CDIG"]
    stored = data[digests.offset : digests.offset + digests.stored_length]
    cold = {digests.offset: EncodedSection("CDIG", digests.codec, digests.raw_length, stored)}
    hot = [encode_section(name, raw) for name, raw in sections.items()]
    return with_index(data, encode_index(hot, cold), **tail)


def with_row(data: bytes, section: str, row: int, **fields: Any) -> bytes:
    """The same file with other fields in one row of a table section."""
    table = {
        "RUNS": structs.RUN,
        "CHNK": structs.CHUNK,
        "ARRS": structs.ARRAY,
        "EXTN": structs.EXTENT,
    }[section]

    def change(sections: dict[str, bytes]) -> None:
        rows = np.frombuffer(sections[section], table.dtype).copy()
        for name, value in fields.items():
            rows[name][row] = value
        sections[section] = rows.tobytes()

    return with_sections(data, change)


def small_snapshot() -> bytes:
    """Of every kind of array that an index describes: of one chunk and of several, of zeros, of nothing."""
    rng = np.random.default_rng(1)
    return write_snapshot(
        {
            "first": rng.standard_normal((300, 100)).astype(np.float32),
            "zeros": np.zeros(500_000, np.uint8),
            "empty": np.zeros((0, 7), np.int16),
            "last": rng.integers(0, 255, 70_001, np.uint8),
        }
    )
