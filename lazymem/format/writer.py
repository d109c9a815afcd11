# SPDX-License-Identifier: Apache-2.0
"""Writes a snapshot as a stream: head, chunks, cold sections, index, tail.

Owns the order of writing and the memory bound. Never seeks, so the destination may be a pipe, and
never holds more than a few chunks, so the input may be larger than memory.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from .. import _native
from ..dtypes import dtype_to_json, plane_width
from ..errors import BuildError
from ..options import BuildOptions, cpu_count
from ..views import View, problem_of
from . import layout, structs
from .encode import ChunkEncoder, EncodedChunk, SharedChunk
from .index import content_digest
from .origin import Origin
from .reuse import BaseChunks
from .sections import encode_index, encode_json, encode_section
from .views import views_to_json

_RUN: Final = struct.Struct("<QQQ")


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What was written. Sizes in bytes. shared_chunks: those of a base."""

    file_bytes: int
    content_bytes: int
    chunks: int
    zero_chunks: int
    raw_chunks: int
    shared_chunks: int
    digest: bytes


class _Records:
    """RUNS, CHNK and CDIG as they grow: 64 bytes a stored chunk, nothing for a zero one."""

    def __init__(self) -> None:
        self.runs = bytearray()
        self.chunks = bytearray()
        self.digests = bytearray()
        self.count = 0  # of chunks so far, zero ones too
        self.stored = 0
        self.raw = 0
        self.shared = 0
        self._run: tuple[int, int, int] | None = None

    def add_zeros(self, count: int) -> None:
        self._extend(count, structs.ZERO_RUN)

    def add(self, chunk: EncodedChunk | SharedChunk, offset: int) -> None:
        if isinstance(chunk, SharedChunk):
            self.chunks += chunk.record
            self.shared += 1
        else:
            self.chunks += chunk.record(offset)
            self.raw += chunk.codec == structs.RAW
        self.digests += chunk.digest
        self._extend(1, self.stored)
        self.stored += 1

    def _extend(self, count: int, first_record: int) -> None:
        run = self._run
        if run is not None and (run[2] == structs.ZERO_RUN) == (first_record == structs.ZERO_RUN):
            self._run = (run[0], run[1] + count, run[2])
        else:
            self.close_run()
            self._run = (self.count, count, first_record)
        self.count += count

    def close_run(self) -> None:
        if self._run is not None:
            self.runs += _RUN.pack(*self._run)
        self._run = None


class SnapshotWriter:
    """Writes one snapshot to `file`, a binary file object open for writing at its start.

        with SnapshotWriter(file, options) as writer:
            writer.add_array("x", dtype, shape)
            writer.write(data)                  # or skip(n) for n zero bytes; in pieces of any size
            result = writer.finish()

    Memory: with t threads at most 2 t + 2 chunks are in flight and one is being filled, each with
    at most its stored bytes beside it, and each thread has one chunk of scratch; so at most
    (5 t + 6) x chunk_size, plus 64 bytes a stored chunk and the names and shapes of the arrays.
    base: makes the file a layer, which names chunks that the base has instead of storing them.
    Leaving the block stops the threads; it neither finishes nor closes the file.
    """

    def __init__(
        self, file: BinaryIO, options: BuildOptions, *, created_by: str = "lazymem",
        base: BaseChunks | None = None,
    ) -> None:  # fmt: skip
        self._file = file
        self._base = base
        self._created_by = created_by
        self._chunk_size = options.chunk_size
        self._encoder = ChunkEncoder(options, None if base is None else base.find)
        threads = options.threads or cpu_count()
        self._pool = ThreadPoolExecutor(threads, "lazymem-build")
        self._max_in_flight = 2 * threads + 2
        # Chunks on their way, in order: a count of zero chunks, or a future with its buffer.
        self._pending: deque[int | tuple[Future[EncodedChunk | SharedChunk | None], NDArray[np.uint8]]] = (
            deque()
        )
        self._in_flight = 0
        self._free: list[NDArray[np.uint8]] = []
        self._records = _Records()
        self._written = 0

        self._position = 0  # in the content
        self._expected = 0  # where the array being written ends
        self._open_ended = False
        self._buffer: NDArray[np.uint8] | None = None  # None: the chunk is zeros so far
        self._fill = 0
        self._width = 0  # plane width of the array being written
        self._width_bytes: dict[int, int] = {}  # of the chunk being filled

        self._names: dict[str, int] = {}
        self._rows: list[tuple[int, int, int, int]] = []  # offset, dtype, ndim, flags
        self._ends: list[int] = []
        self._views: dict[str, View] = {}
        self._shapes: list[int] = []
        self._dtypes: dict[bytes, int] = {}
        self._dtype_numbers: dict[np.dtype[Any], int] = {}
        self._dtype_json: list[str | list[Any]] = []

        self._put(_head(options.chunk_size, self._version))
        if options.codec == "none":
            self._put(bytes(structs.MAP_ALIGNMENT - self._written))

    def __enter__(self) -> SnapshotWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def _version(self) -> dict[str, int]:
        """Fields of head and tail: the lowest version that knows what the file uses."""
        is_layer = self._base is not None
        return {
            "major": structs.MAJOR,
            "minor": structs.MINOR_LAYERS if is_layer else structs.MINOR,
            "incompatible": structs.LAYERS if is_layer else 0,
        }

    @property
    def file_bytes(self) -> int:
        """Written so far."""
        return self._written

    # ---- content ----

    def add_array(
        self,
        name: str,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        order: str = "C",
        *,
        hidden: bool = False,
        phase: int = 0,
    ) -> int:
        """Begin an array and return its offset in the content; its bytes must follow, all of them.

        order "F": the bytes come in Fortran order. hidden: the container's own bytes. phase: see layout.py.
        Raises `BuildError` for a name that a snapshot cannot have, `UnsupportedDtype` for such a dtype.
        """
        self._check_complete()
        nbytes = dtype.itemsize
        for length in shape:
            nbytes *= length
        offset = layout.place(self._position, nbytes, self._chunk_size, phase)
        if offset + nbytes > structs.MAX_CONTENT:
            raise BuildError(f"array {name!r} would end beyond 2^46 bytes; split the snapshot in several")
        flags = (structs.FORTRAN if order == "F" else 0) | (structs.HIDDEN if hidden else 0)
        self._add_row(name, dtype, shape, offset, flags)
        self._expected = offset + nbytes
        self._ends.append(self._expected)
        self.skip(offset - self._position)
        self._width = plane_width(dtype)
        return offset

    def add_stream(self, name: str) -> int:
        """Begin a one-dimensional uint8 array that is as long as what follows. Nothing may follow it."""
        self._check_complete()
        offset = layout.align_up(self._position, max(self._chunk_size, layout.HUGE_PAGE))
        self._add_row(name, np.dtype(np.uint8), (0,), offset, 0)
        self._open_ended = True
        self.skip(offset - self._position)
        self._width = 0
        return offset

    def _add_row(
        self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int, flags: int
    ) -> None:
        length = self._check_name(name)
        if len(shape) > structs.MAX_NDIM:
            raise BuildError(f"array {name!r} has {len(shape)} dimensions; {structs.MAX_NDIM} is the most")
        number = self._dtype_numbers.get(dtype)
        if number is None:
            # Dtypes that differ in Python ("l" and "q") may be one in the file.
            value = dtype_to_json(dtype, name=name)
            number = self._dtypes.setdefault(encode_json(value), len(self._dtype_json))
            if number == len(self._dtype_json):
                self._dtype_json.append(value)
            self._dtype_numbers[dtype] = number
        self._names[name] = length
        self._rows.append((offset, number, len(shape), flags))
        self._shapes += shape

    def add_view(self, view: View) -> None:
        """Add a name for bytes of an array that was added before. Raises as `add_array`."""
        self._check_name(view.name)
        if view.array not in self._names:
            raise BuildError(f"{view.name!r} is a view of {view.array!r}, and there is no such array")
        self._views[view.name] = view

    def _check_name(self, name: str) -> int:
        """The length of its UTF-8."""
        if name in self._names or name in self._views:
            raise BuildError(f"two arrays are called {name!r}; give each its own name")
        try:
            length = len(name.encode("utf-8"))
        except UnicodeEncodeError:
            raise BuildError(f"array name {name!r} holds lone surrogates; rename the array") from None
        if length > structs.MAX_NAME:
            raise BuildError(
                f"array name {name[:40]!r}... has {length} bytes; {structs.MAX_NAME} is the most"
            )
        return length

    def _check_complete(self) -> None:
        if self._open_ended:
            raise BuildError("nothing can follow an array of unknown length")
        if self._position != self._expected:
            name = next(reversed(self._names))
            raise BuildError(f"array {name!r} ended {self._expected - self._position} bytes early")

    def write(self, data: bytes | bytearray | memoryview | NDArray[np.uint8]) -> None:
        """The next bytes of the array. Copied before the call returns; may wait for the encoders."""
        view = np.frombuffer(data, np.uint8)
        self._advance(len(view))
        while len(view):
            if self._buffer is None:
                self._buffer = self._free.pop() if self._free else np.empty(self._chunk_size, np.uint8)
                self._buffer[: self._fill] = 0
            piece = view[: self._chunk_size - self._fill]
            self._buffer[self._fill : self._fill + len(piece)] = piece
            self._width_bytes[self._width] = self._width_bytes.get(self._width, 0) + len(piece)
            self._fill += len(piece)
            view = view[len(piece) :]
            if self._fill == self._chunk_size:
                self._emit()

    def skip(self, length: int) -> None:
        """The next `length` bytes are zeros. Whole chunks of them cost no time and no memory."""
        self._advance(length)
        if self._fill:
            piece = min(length, self._chunk_size - self._fill)
            if self._buffer is not None:
                self._buffer[self._fill : self._fill + piece] = 0
            self._fill += piece
            length -= piece
            if self._fill == self._chunk_size:
                self._emit()
        chunks, rest = divmod(length, self._chunk_size)
        if chunks:
            self._add_zeros(chunks)
        self._fill += rest

    def _advance(self, length: int) -> None:
        self._position += length
        if self._open_ended:
            if self._position > structs.MAX_CONTENT:
                raise BuildError("the stream is longer than 2^46 bytes; split it in several snapshots")
        elif self._position > self._expected:
            raise BuildError(f"array {next(reversed(self._names))!r} got more bytes than its shape has")

    # ---- chunks ----

    def _emit(self) -> None:
        """The chunk being filled is complete."""
        buffer, length = self._buffer, self._fill
        width = self._dominant_width()
        self._buffer, self._fill, self._width_bytes = None, 0, {}
        if buffer is None:
            self._add_zeros(1)
            return
        while self._in_flight >= self._max_in_flight:
            self._write_oldest()
        future = self._pool.submit(self._encoder.encode, buffer[:length].data, width)
        self._pending.append((future, buffer))
        self._in_flight += 1

    def _dominant_width(self) -> int:
        """Plane width of the numbers that make up at least half of the chunk's array bytes, else 0."""
        total = sum(self._width_bytes.values())
        best = max(self._width_bytes, key=lambda width: self._width_bytes[width], default=0)
        return best if best and 2 * self._width_bytes[best] >= total else 0

    def _add_zeros(self, count: int) -> None:
        if self._pending and isinstance(self._pending[-1], int):
            self._pending[-1] += count
        else:
            self._pending.append(count)

    def _write_oldest(self) -> None:
        entry = self._pending.popleft()
        if isinstance(entry, int):
            self._records.add_zeros(entry)
            return
        future, buffer = entry
        self._in_flight -= 1
        chunk = future.result()
        if chunk is None:
            self._records.add_zeros(1)
        else:
            self._records.add(chunk, self._written)
            if isinstance(chunk, EncodedChunk):
                self._put(chunk.stored)
        self._free.append(buffer)

    def _put(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):  # a raw file object may write less than it was given
            written = self._file.write(view)
            self._written += written
            view = view[written:]

    # ---- the end ----

    def finish(
        self,
        *,
        metadata: Mapping[str, Any] | None = None,
        array_metadata: Mapping[str, Mapping[str, Any]] | None = None,
        origin: Origin | None = None,
        extents: NDArray[np.void] | None = None,
    ) -> WriteResult:
        """Write what is in flight, the cold sections, the index and the tail.

        metadata and array_metadata must be JSON (`BuildError` otherwise).
        """
        if self._open_ended:
            self._expected = self._position
            self._ends.append(self._position)
            self._shapes[-1] = self._position - self._rows[-1][0]
            self._open_ended = False
        self._check_complete()
        content_size = self._position
        if self._fill:
            self._emit()
        while self._pending:
            self._write_oldest()
        self._records.close_run()

        raw = self._array_sections()
        if self._views:
            raw["VIEW"] = self._view_section()
        raw["META"] = metadata_section(metadata or {}, array_metadata or {})
        if origin is not None:
            raw["CONT"] = encode_json(origin.to_json())
            raw["EXTN"] = b"" if extents is None else extents.tobytes()
        records = self._records
        runs = np.frombuffer(records.runs, structs.RUN.dtype)
        digest = content_digest(self._chunk_size, content_size, runs, records.digests, raw)
        raw["RUNS"] = bytes(records.runs)
        raw["CHNK"] = bytes(records.chunks)
        if self._base is not None:
            settled = np.frombuffer(records.chunks, structs.CHUNK.dtype).copy()
            raw["SRCS"] = encode_json([asdict(base) for base in self._base.settle(settled)])
            raw["CHNK"] = settled.tobytes()
            raw["FEAT"] = encode_json([structs.FEATURE_BITS[structs.LAYERS]])
        raw["TOOL"] = encode_json({"created_by": self._created_by})

        # Digests do not compress.
        cold_offset = self._written
        digests = encode_section("CDIG", bytes(records.digests))
        self._put(digests.stored)
        index_offset = self._written
        hot = [encode_section(name, data) for name, data in raw.items()]
        index = encode_index(hot, {cold_offset: digests})
        self._put(index)
        self._put(_tail(self._chunk_size, content_size, index_offset, index, digest, self._version))
        self._file.flush()
        return WriteResult(
            file_bytes=self._written,
            content_bytes=content_size,
            chunks=records.count,
            zero_chunks=records.count - records.stored,
            raw_chunks=records.raw,
            shared_chunks=records.shared,
            digest=digest,
        )

    def _array_sections(self) -> dict[str, bytes]:
        arrays = np.zeros(len(self._rows), structs.ARRAY.dtype)
        if self._rows:
            offset, dtype, ndim, flags = np.array(self._rows, np.uint64).T
            lengths = np.fromiter(self._names.values(), np.uint64, len(self._names))
            if lengths.sum() >= 1 << 32 or ndim.sum() >= 1 << 32:
                raise BuildError("the arrays' names or shapes exceed 2^32; split the snapshot in several")
            arrays["offset"] = offset
            arrays["nbytes"] = np.array(self._ends, np.uint64) - offset
            arrays["name_length"] = lengths
            arrays["name_offset"] = lengths.cumsum() - lengths
            arrays["shape_offset"] = ndim.cumsum() - ndim
            arrays["dtype"], arrays["ndim"], arrays["flags"] = dtype, ndim, flags
        return {
            "ARRS": arrays.tobytes(),
            "NAME": "".join(self._names).encode("utf-8"),
            "SHAP": np.array(self._shapes, "<u8").tobytes(),
            "DTYP": encode_json(self._dtype_json),
        }

    def _view_section(self) -> bytes:
        sizes = {
            name: end - row[0] for name, end, row in zip(self._names, self._ends, self._rows, strict=True)
        }
        for view in self._views.values():
            problem = problem_of(view, sizes[view.array])
            if problem is not None:
                raise BuildError(f"view {view.name!r} {problem}")
        return encode_json(views_to_json(self._views.values()))


def metadata_section(metadata: Mapping[str, Any], array_metadata: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Section META. Raises `BuildError` for what is not JSON."""
    try:
        arrays = {name: dict(value) for name, value in array_metadata.items() if value}
        return encode_json({"metadata": dict(metadata), "arrays": arrays})
    except (TypeError, ValueError, RecursionError) as error:
        raise BuildError(f"the metadata cannot be written as JSON ({error}); use only JSON's types") from None


def _head(chunk_size: int, version: Mapping[str, int]) -> bytes:
    body = structs.HEAD.pack(
        magic=structs.HEAD_MAGIC,
        **version,
        head_size=structs.HEAD.size,
        chunk_size=chunk_size,
    )[:-8]
    return body + _native.checksum(body).to_bytes(8, "little")


def _tail(
    chunk_size: int, content_size: int, index_offset: int, index: bytes, digest: bytes,
    version: Mapping[str, int],
) -> bytes:  # fmt: skip
    body = structs.TAIL.pack(
        magic=structs.TAIL_MAGIC,
        **version,
        tail_size=structs.TAIL.size,
        index_offset=index_offset,
        index_length=len(index),
        index_checksum=_native.checksum(index),
        file_size=index_offset + len(index) + structs.TAIL.size,
        content_size=content_size,
        chunk_size=chunk_size,
        digest=digest,
    )[:-8]
    return body + _native.checksum(body).to_bytes(8, "little")
