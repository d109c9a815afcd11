# SPDX-License-Identifier: Apache-2.0
"""One chunk's bytes -> its stored bytes. Owns the choice of codec, filter and raw, for each chunk.

Everything heavy here (zero scan, SHA-256, planes, compression, XXH3) releases the GIL, so threads
encode side by side.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import lz4.block
import zstandard

from .. import _native
from ..options import BuildOptions
from . import structs

#: Taken from this many places of a chunk, to decide on byte planes.
_SAMPLE_PIECES: Final = 4
#: Of the sample, per byte of element width: zstd gives each 128 KiB block a Huffman table of its own, so
#: that planes show what they save only where each of them fills a block.
_SAMPLE_PLANE: Final = 128 << 10
#: Planes cost a pass over the data at every population. A gain below 3 % does not pay for it, nor
#: does one below 1/256 of the data, where the chunk is tiny either way.
_PLANES_GAIN: Final = 0.03
_PLANES_FRACTION: Final = 256
#: Literals alone decode two to three times as fast as zstd's matches, which is worth so much size.
_LITERALS_HANDICAP: Final = 1.01
#: Where the sign's place matters: float16 gains nothing by it and loses nothing; float64 loses, because
#: rotated by one its exponent's end shares a byte with more of the mantissa.
_ROTATED_WIDTHS: Final = (2, 4)
#: A chunk that shrinks by less than 1/64 is stored raw: decoding it would cost more than reading it.
_RAW_FRACTION: Final = 64
_LZ4_HIGH: Final = 3

_DEFAULT_LEVEL: Final = {"zstd": 3, "lz4": 1, "none": 0}


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk as the file will hold it. digest: SHA-256 of the uncompressed bytes."""

    stored: bytes | memoryview
    codec: int
    filter: int
    width: int
    checksum: int
    digest: bytes

    def record(self, offset: int) -> bytes:
        """The CHNK record, with the stored bytes at file offset `offset`."""
        return structs.CHUNK_STRUCT.pack(
            offset, len(self.stored), self.codec, self.filter, self.width, 0, 0, 0, 0, self.checksum
        )


@dataclass(frozen=True, slots=True)
class SharedChunk:
    """A chunk that a base has already. record: as CHNK will hold it."""

    record: bytes
    digest: bytes


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to store a chunk. literals: no matches are looked for."""

    filter: int
    width: int
    literals: bool


_PLAIN: Final = _Way(structs.FILTER_NONE, 0, False)


class ChunkEncoder:
    """Encodes chunks as `options` say. Threads may share it; each keeps its compressors and a buffer.

    find: SHA-256 -> the record of a chunk that need not be stored again, or None.
    """

    def __init__(self, options: BuildOptions, find: Callable[[bytes], bytes | None] | None = None) -> None:
        self._find = find
        self._codec = {"none": structs.RAW, "lz4": structs.LZ4, "zstd": structs.ZSTD}[options.codec]
        self._level = _DEFAULT_LEVEL[options.codec] if options.level is None else options.level
        # Who asks for a level wants its size; who does not wants what is fast to read.
        self._literals_handicap = _LITERALS_HANDICAP if options.level is None else 1.0
        self._planes = options.planes
        self._chunk_size = options.chunk_size
        self._local = threading.local()

    def encode(self, data: memoryview, width: int) -> EncodedChunk | SharedChunk | None:
        """Encode one chunk, or return None if it is all zeros.

        width: of the floating-point numbers that fill the chunk, 2, 4 or 8 bytes; 0 if none do.
        A chunk stored raw borrows `data`.
        """
        if _native.bytes_are_zero(data):
            return None
        digest = hashlib.sha256(data).digest()
        record = None if self._find is None else self._find(digest)
        if record is not None:
            return SharedChunk(record, digest)
        if self._codec != structs.RAW:
            way = self._choose(data, width) if width and self._planes is not False else _PLAIN
            stored = self._store(data, way)
            if len(stored) < len(data) - len(data) // _RAW_FRACTION:
                checksum = _native.checksum(stored)
                return EncodedChunk(stored, self._codec, way.filter, way.width, checksum, digest)
        checksum = _native.checksum(data)
        return EncodedChunk(data, structs.RAW, structs.FILTER_NONE, 0, checksum, digest)

    def _choose(self, data: memoryview, width: int) -> _Way:
        """The way that a sample says is best."""
        sample = _sample(data, width)
        planes = _Way(structs.FILTER_PLANES, width, False)
        best, size = planes, float(len(self._store(sample, planes)))
        if self._codec == structs.ZSTD:
            kind = structs.FILTER_FLOAT_PLANES if width in _ROTATED_WIDTHS else structs.FILTER_PLANES
            literals = _Way(kind, width, True)
            found = len(self._store(sample, literals))
            if found <= size * self._literals_handicap:
                best, size = literals, float(found)
        if self._planes:
            return best
        plain = len(self._store(sample, _PLAIN))
        return best if plain - size >= max(plain * _PLANES_GAIN, len(sample) / _PLANES_FRACTION) else _PLAIN

    def _store(self, data: memoryview, way: _Way) -> bytes:
        if way.filter != structs.FILTER_NONE:
            scratch: bytearray | None = getattr(self._local, "scratch", None)
            if scratch is None:
                scratch = self._local.scratch = bytearray(self._chunk_size)
            planes = memoryview(scratch)[: len(data)]
            _native.planes_split(data, planes, way.width, way.filter)
            data = planes
        if way.literals:
            literals: Callable[[memoryview, int], bytes] | None = getattr(self._local, "literals", None)
            if literals is None:
                literals = self._local.literals = _native.literal_compressor()
            return literals(data, len(data) // way.width)
        compress: Callable[[memoryview], bytes] | None = getattr(self._local, "compress", None)
        if compress is None:
            compress = self._local.compress = self._compressor()
        return compress(data)

    def _compressor(self) -> Callable[[memoryview], bytes]:
        if self._codec == structs.ZSTD:
            return zstandard.ZstdCompressor(
                level=self._level, write_checksum=False, write_content_size=True, write_dict_id=False
            ).compress
        if self._level < _LZ4_HIGH:
            return lambda data: lz4.block.compress(data, mode="default", store_size=False)
        level = self._level
        return lambda data: lz4.block.compress(
            data, mode="high_compression", compression=level, store_size=False
        )


def _sample(data: memoryview, width: int) -> memoryview:
    if len(data) <= width * _SAMPLE_PLANE:
        return data
    piece = width * _SAMPLE_PLANE // _SAMPLE_PIECES
    step = (len(data) - piece) // (_SAMPLE_PIECES - 1) & ~7  # on element boundaries
    return memoryview(b"".join(data[i * step :][:piece] for i in range(_SAMPLE_PIECES)))
