# SPDX-License-Identifier: Apache-2.0
"""The border to the C core: thin wrappers that check lengths, call, and raise.

Every call releases the GIL (cffi does, in API mode). Nothing above this package touches cffi.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

from . import codecs
from ._core import ffi, lib
from .literals import literal_compressor as literal_compressor

if sys.byteorder != "little":  # records are used as they lie in the file
    raise ImportError("lazymem needs a little-endian machine")

#: Where each codec's C functions come from: a wheel's module, a soname, or "" (not found).
CODEC_SOURCES: Final = codecs.SOURCES

STATE_ABSENT: Final = 0
STATE_LOADING: Final = 1
STATE_PRESENT: Final = 2
STATE_FAILED: Final = 3
STATE_POISONED: Final = 4

BACKENDS: Final = {
    "uffd": 0, "uffd-user": 1, "eager": 2, "map": 3, "sigsegv": 4, "stock": 5, "pager": 6,
}  # fmt: skip
_BACKEND_NAMES: Final = {number: name for name, number in BACKENDS.items()}
INSTALLS: Final = {"auto": 0, "copy": 1, "move": 2}
WAYS: Final = ("device", "syscall", "user-only")
OPERATIONS: Final = ("copy", "zeropage", "wake", "poison", "move")

_OWN_CODES: Final = {
    lib.LM_E_SHORT: "the file ends before the chunk does",
    lib.LM_E_CHECKSUM: "the stored bytes do not match their checksum",
    lib.LM_E_DECODE: "the stored bytes do not decode to the chunk's size",
    lib.LM_E_RECORD: "the chunk's record is not valid",
    lib.LM_E_CODEC: "the decoder for this chunk is not installed",
    lib.LM_E_CLOSED: "the region is closed",
    lib.LM_E_FEATURE: "userfaultfd lacks an operation that is needed",
    lib.LM_E_FULL: "too many ranges are waiting to be populated",
    lib.LM_E_STORE: "the store did not deliver the bytes",
    lib.LM_E_GONE: "nothing lies under the URL",
    lib.LM_E_DENIED: "the store refuses access",
    lib.LM_E_CHANGED: "the object was replaced after it was opened",
    lib.LM_E_OPTION: "the URL or an option cannot be right",
    lib.LM_E_FETCHER: "the fetcher cannot be started or does not answer",
    lib.LM_E_MOVED: "the application has unmapped or moved it",
    lib.LM_E_LOST: "its memory cannot be served any more",
}
#: LM_E_* by number, without the prefix.
CODES: Final[dict[int, str]] = {
    getattr(lib, name): name.removeprefix("LM_E_") for name in dir(lib) if name.startswith("LM_E_")
}
FILTER_PLANES: Final[int] = lib.LM_FILTER_PLANES
FILTER_FLOAT_PLANES: Final[int] = lib.LM_FILTER_FLOAT_PLANES
CHUNK_UNCHECKED: Final[int] = lib.LM_CHUNK_UNCHECKED

#: Floating-point formats by the names of numpy's and ml_dtypes' dtypes (lazymem.h, "casts").
FLOATS: Final[dict[str, int]] = {
    "float16": lib.LM_FLOAT_16,
    "bfloat16": lib.LM_FLOAT_BRAIN,
    "float32": lib.LM_FLOAT_32,
    "float64": lib.LM_FLOAT_64,
    "float8_e4m3fn": lib.LM_FLOAT_8_E4M3FN,
    "float8_e5m2": lib.LM_FLOAT_8_E5M2,
    "float8_e4m3fnuz": lib.LM_FLOAT_8_E4M3FNUZ,
    "float8_e5m2fnuz": lib.LM_FLOAT_8_E5M2FNUZ,
}
CAST_NONE: Final[int] = lib.LM_CAST_NONE
E_SHORT: Final[int] = lib.LM_E_SHORT
E_CHECKSUM: Final[int] = lib.LM_E_CHECKSUM
E_DECODE: Final[int] = lib.LM_E_DECODE
E_RECORD: Final[int] = lib.LM_E_RECORD
E_CODEC: Final[int] = lib.LM_E_CODEC
E_CLOSED: Final[int] = lib.LM_E_CLOSED
E_FEATURE: Final[int] = lib.LM_E_FEATURE
E_STORE: Final[int] = lib.LM_E_STORE
E_GONE: Final[int] = lib.LM_E_GONE
E_DENIED: Final[int] = lib.LM_E_DENIED
E_CHANGED: Final[int] = lib.LM_E_CHANGED
E_OPTION: Final[int] = lib.LM_E_OPTION
E_FETCHER: Final[int] = lib.LM_E_FETCHER
E_FULL: Final[int] = lib.LM_E_FULL
E_LOST: Final[int] = lib.LM_E_LOST
E_MOVED: Final[int] = lib.LM_E_MOVED


class Message:
    """The layout of a structure of lazymem.h that crosses a socket: packs and unpacks it by name."""

    def __init__(self, kind: str) -> None:
        fields: list[tuple[str, Any]] = list(ffi.typeof(kind).fields)
        codes = {"uint64_t": "Q", "uint32_t": "I", "int32_t": "i", "uint16_t": "H"}
        self._struct = struct.Struct("<" + "".join(codes[field.type.cname] for _, field in fields))
        self._names = tuple(name for name, _ in fields)
        self.size = self._struct.size
        if self.size != ffi.sizeof(kind):
            raise ImportError(f"{kind} has holes")

    def pack(self, **values: int) -> bytes:
        """Fields that are left out are 0."""
        if not values.keys() <= set(self._names):
            raise TypeError(f"unknown fields: {values.keys() - set(self._names)}")
        return self._struct.pack(*(values.get(name, 0) for name in self._names))

    def unpack(self, data: Any, offset: int = 0) -> SimpleNamespace:
        """The structure that begins at `offset` of a buffer."""
        return SimpleNamespace(**dict(zip(self._names, self._struct.unpack_from(data, offset), strict=True)))


#: The fetcher's protocol (lazymem.h, "the fetcher").
ASK: Final = Message("lm_ask")
PIECE: Final = Message("lm_piece")
ANSWER: Final = Message("lm_answer")
ASK_KINDS: Final[dict[str, int]] = {
    name: getattr(lib, f"LM_ASK_{name}")
    for name in ("SOURCE", "OPEN", "RANGE", "PROMOTE", "CANCEL", "FORGET", "STATUS")
}
ASK_DEMAND: Final[int] = lib.LM_ASK_DEMAND
ASK_REFETCH: Final[int] = lib.LM_ASK_REFETCH
ANSWER_DONE: Final[int] = lib.LM_ANSWER_DONE
ANSWER_FAILED: Final[int] = lib.LM_ANSWER_FAILED
FETCH_SOCKET: Final[int] = lib.LM_FETCH_SOCKET
FETCH_MEMORY: Final[int] = lib.LM_FETCH_MEMORY
FETCH_MESSAGE_MAX: Final[int] = lib.LM_FETCH_MESSAGE_MAX


class NativeError(Exception):
    """A negative code from the core. `code` is LM_E_* or an errno negated; `chunk` where it is known.

    said: a sentence of the store's, where there is one, else "".
    """

    def __init__(self, code: int, chunk: int | None = None, said: str = "") -> None:
        super().__init__(said or _OWN_CODES.get(code) or os.strerror(-code))
        self.code = code
        self.chunk = chunk
        self.said = said


def _check(code: int) -> int:
    if code < 0:
        raise NativeError(code)
    return code


# ---- bytes ----
#
# Buffers are released as soon as the call is over (`with`): an exception's traceback keeps frames alive,
# and cffi's buffer objects crash when the garbage collector meets one over a memoryview in a cycle.


def bytes_are_zero(data: Any) -> bool:
    """Whether every byte of the buffer is zero."""
    with ffi.from_buffer(data) as view:
        return bool(lib.lm_bytes_are_zero(view, len(view)))


def checksum(data: Any) -> int:
    """XXH3-64 of the buffer."""
    with ffi.from_buffer(data) as view:
        return int(lib.lm_codec_checksum(view, len(view)))


def planes_split(source: Any, target: Any, width: int, kind: int = FILTER_PLANES) -> None:
    """Byte planes of `source` into `target`, of equal length; they must not overlap.

    kind: FILTER_PLANES or FILTER_FLOAT_PLANES.
    """
    _planes(lib.lm_planes_split, source, target, width, kind)


def planes_join(source: Any, target: Any, width: int, kind: int = FILTER_PLANES) -> None:
    """The inverse of `planes_split`."""
    _planes(lib.lm_planes_join, source, target, width, kind)


def _planes(function: Any, source: Any, target: Any, width: int, kind: int) -> None:
    with ffi.from_buffer(source) as given, ffi.from_buffer(target, require_writable=True) as wanted:
        if len(given) != len(wanted):
            raise ValueError(f"source has {len(given)} bytes and target {len(wanted)}")
        _check(function(given, wanted, len(given), width, kind))


def cast(source: Any, target: Any, count: int, code: int) -> None:
    """`count` numbers of `source` into `target`; `code` is that of an lm_strip. Raises `NativeError`."""
    with ffi.from_buffer(source) as given, ffi.from_buffer(target, require_writable=True) as wanted:
        if count < 0 or max(len(given), len(wanted)) < count:
            raise ValueError(f"{count} numbers do not lie in {len(given)} and {len(wanted)} bytes")
        _check(lib.lm_cast(given, wanted, count, code))


class Decoder:
    """Stored bytes -> a chunk's bytes. Use one from one thread at a time."""

    def __init__(self) -> None:
        out = ffi.new("lm_decoder **")
        _check(lib.lm_decoder_new(out))
        self._handle = ffi.gc(out[0], lib.lm_decoder_free)

    def decode(self, record: bytes, stored: Any, out: Any) -> None:
        """Check and decode `stored` into the whole of `out`. Raises `NativeError`."""
        if len(record) != ffi.sizeof("lm_chunk_record"):
            raise ValueError(f"a chunk record has {ffi.sizeof('lm_chunk_record')} bytes, not {len(record)}")
        parsed = ffi.new("lm_chunk_record *")
        ffi.memmove(parsed, record, len(record))
        with ffi.from_buffer(stored) as given, ffi.from_buffer(out, require_writable=True) as wanted:
            if len(given) != parsed.stored_length:
                raise NativeError(E_SHORT)
            _check(lib.lm_decoder_decode(self._handle, parsed, given, wanted, len(wanted)))


# ---- what the machine offers ----


@dataclass(frozen=True, slots=True)
class WayReport:
    """One way to a userfaultfd: errno 0 if it opened, and the operations that worked when tried."""

    name: str
    errno: int
    features: int
    operations: tuple[str, ...]


def probe() -> tuple[WayReport, ...]:
    """Try every way to a userfaultfd on throw-away pages."""
    reports = []
    for way, name in enumerate(WAYS):
        report = ffi.new("lm_way_report *")
        _check(lib.lm_probe_way(way, report))
        worked = tuple(op for bit, op in enumerate(OPERATIONS) if report.can >> bit & 1)
        reports.append(WayReport(name, report.error, report.features, worked))
    return tuple(reports)


def probe_sigsegv() -> int:
    """0 if touches can be served as signals here, else why not: an errno."""
    return -int(lib.lm_probe_sigsegv())


def engine_counts() -> tuple[int, int]:
    """Regions that are open and engine threads that run, in this process."""
    return int(lib.lm_engine_region_count()), int(lib.lm_engine_thread_count())


# ---- the fetcher ----


def fetch_command(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Say how the fetcher is started. The first call of a process counts."""
    strings = [*arguments, *(f"{name}={value}" for name, value in environment.items())]
    block = b"".join(os.fsencode(text) + b"\0" for text in strings)
    _check(lib.lm_fetch_command(block, len(block), len(arguments), len(environment)))


def source_open(text: bytes) -> int:
    """A number for a remote object; `text` is the payload of LM_ASK_SOURCE. Close it."""
    return _check(lib.lm_source_open(text, len(text)))


def source_update(source: int, text: bytes) -> None:
    _check(lib.lm_source_update(source, text, len(text)))


def source_close(source: int, _close: Any = lib.lm_source_close) -> None:
    _close(source)


def fetch_ask(kind: int, source: int, offset: int, length: int, timeout_ms: int) -> int:
    """Ask the fetcher; returns the id to wait for. Raises `NativeError`, with E_FULL: ask again later."""
    out = ffi.new("uint64_t *")
    _check(lib.lm_fetch_ask(kind, source, offset, length, timeout_ms, out))
    return int(out[0])


def fetch_wait(ask: int, timeout_ms: int) -> bool:
    """Whether the answer, good or bad, is there to be taken. Raises `NativeError` if the id means nothing."""
    code = lib.lm_fetch_wait(ask, timeout_ms)
    if code == -errno.ESRCH:
        raise NativeError(code)
    return bool(code)


def fetch_take(ask: int, out: Any) -> tuple[int, str]:
    """The bytes into `out` and how many they are, and the text. Raises `NativeError` with what was said."""
    result = ffi.new("lm_fetch_result *")
    code = lib.lm_fetch_wait(ask, 0)
    with ffi.from_buffer(out, require_writable=True) as view:
        _check(lib.lm_fetch_take(ask, view, len(view), result))
    text = bytes(ffi.buffer(result.text, result.text_length)).decode("utf-8", "replace")
    if code < 0:
        raise NativeError(code, said=text)
    return int(result.length), text


def fetch_drop(ask: int) -> None:
    """Give up a question; harmless if it was taken."""
    lib.lm_fetch_drop(ask)


def fetcher_pid() -> int:
    """Of the fetcher that runs for this process; 0: none does."""
    return int(lib.lm_fetcher_pid())


def fetcher_starts() -> int:
    """Fetchers started in this process so far."""
    return int(lib.lm_fetcher_starts())


# ---- regions ----


@dataclass(frozen=True, slots=True)
class RegionSpec:
    """What a faulting region shows; tables are the records of FORMAT.md, one after another.

    sources: where fds are -1, the numbers that `source_open` gave; the rest: see lazymem.h.
    Array tables: offsets and lengths as uint64, name_offsets as uint32 (one more than arrays).
    strips and stock_*: of a composed region, which records are then the stock's.
    """

    url: str
    content_size: int
    chunk_size: int
    runs: bytes
    records: bytes
    fds: Sequence[int]
    source_sizes: Sequence[int]
    backend: str
    install: str = "auto"
    writable: bool = False
    dropped: bool = False
    threads: int = 0
    readahead: int = 0
    sources: Sequence[int] = ()
    coalesce_gap: int = 0
    coalesce_size: int = 0
    fetch_timeout_ms: int = 0
    array_offsets: bytes = b""
    array_lengths: bytes = b""
    name_offsets: bytes = b""
    names: bytes = b""
    strips: bytes = b""
    stock_size: int = 0
    stock_chunk_size: int = 0
    stock_runs: bytes = b""


@dataclass(frozen=True, slots=True)
class MapPiece:
    """`length` bytes of `fd` at `file_offset`, shown at `region_offset`; both page multiples."""

    region_offset: int
    file_offset: int
    length: int
    fd: int


def _table(kind: str, data: bytes) -> tuple[Any, int]:
    """`data` as an array of `kind`, and its length; raises if it is not a whole number of them."""
    size = ffi.sizeof(kind)
    if len(data) % size:
        raise ValueError(f"{len(data)} bytes are not whole records of {size}")
    return ffi.from_buffer(f"{kind}[]", data), len(data) // size


class NativeRegion:
    """Owner of one lm_region. Safe to use from any thread at any time: after `close` calls raise E_CLOSED.

    user_only: another process serves its memory, and touches by the kernel are refused.
    """

    user_only = False

    def __init__(self, handle: Any) -> None:
        self._handle = ffi.gc(handle, lib.lm_region_free)
        self.address = int(ffi.cast("uintptr_t", lib.lm_region_address(handle)))
        self.size = int(lib.lm_region_size(handle))
        self.chunk_count = int(lib.lm_region_chunk_count(handle))
        self.chunk_size = int(lib.lm_region_chunk_size(handle))
        number = lib.lm_region_backend(handle)
        self.backend = _BACKEND_NAMES[number]
        self.install = {1: "copy", 2: "move"}.get(lib.lm_region_install(handle), "none")
        self.evictions = 0  # calls of `evict` that have ended; two at once may count as one

    @classmethod
    def open(cls, spec: RegionSpec) -> NativeRegion:
        runs, run_count = _table("lm_run", spec.runs)
        records, record_count = _table("lm_chunk_record", spec.records)
        strips, strip_count = _table("lm_strip", spec.strips)
        stock_runs, stock_run_count = _table("lm_run", spec.stock_runs)
        offsets, array_count = _table("uint64_t", spec.array_offsets)
        lengths, length_count = _table("uint64_t", spec.array_lengths)
        name_offsets, name_count = _table("uint32_t", spec.name_offsets)
        if array_count and (
            length_count != array_count
            or name_count != array_count + 1
            or name_offsets[array_count] > len(spec.names)
        ):
            raise ValueError("the array tables differ in length")
        if len(spec.fds) != len(spec.source_sizes) or len(spec.sources) not in (0, len(spec.fds)):
            raise ValueError("each source needs a descriptor or number, and a size")
        keep = [
            ffi.new("int[]", list(spec.fds)),
            ffi.new("uint64_t[]", list(spec.source_sizes)),
            ffi.new("char[]", os.fsencode(spec.url)),
            ffi.from_buffer("char[]", spec.names),
            ffi.new("uint32_t[]", list(spec.sources)) if spec.sources else ffi.NULL,
        ]
        given = ffi.new(
            "lm_region_spec *",
            {
                "content_size": spec.content_size,
                "chunk_size": spec.chunk_size,
                "backend": BACKENDS[spec.backend],
                "install": INSTALLS[spec.install],
                "writable": spec.writable,
                "dropped": spec.dropped,
                "threads": spec.threads,
                "readahead": spec.readahead,
                "runs": runs,
                "run_count": run_count,
                "records": records,
                "record_count": record_count,
                "fds": keep[0],
                "sources": keep[4],
                "coalesce_gap": spec.coalesce_gap,
                "coalesce_size": spec.coalesce_size,
                "fetch_timeout_ms": spec.fetch_timeout_ms,
                "source_sizes": keep[1],
                "source_count": len(spec.fds),
                "url": keep[2],
                "array_count": array_count,
                "array_offsets": offsets,
                "array_lengths": lengths,
                "name_offsets": name_offsets,
                "names": keep[3],
                "strips": strips,
                "strip_count": strip_count,
                "stock_size": spec.stock_size,
                "stock_chunk_size": spec.stock_chunk_size,
                "stock_runs": stock_runs,
                "stock_run_count": stock_run_count,
            },
        )
        out = ffi.new("lm_region **")
        _check(lib.lm_region_open(given, out))
        return cls(out[0])

    @classmethod
    def open_map(
        cls, size: int, pieces: Sequence[MapPiece], *, writable: bool, dropped: bool = False
    ) -> NativeRegion:
        table = ffi.new("lm_map_piece[]", len(pieces))
        for i, piece in enumerate(pieces):
            table[i].region_offset = piece.region_offset
            table[i].file_offset = piece.file_offset
            table[i].length = piece.length
            table[i].fd = piece.fd
        out = ffi.new("lm_region **")
        _check(lib.lm_region_open_map(size, table, len(pieces), writable, dropped, out))
        return cls(out[0])

    @property
    def handle(self) -> Any:
        """For other modules of this package."""
        return self._handle

    def seal(self) -> None:
        _check(lib.lm_region_seal(self._handle))

    def prefetch(self, spans: Sequence[tuple[int, int]], *, urgent: bool) -> int:
        """Queue (first chunk, count) spans, in order; how many of them, the first ones, there was room for.

        urgent: before what is queued already.
        """
        table = ffi.new("lm_chunk_span[]", list(spans))
        return _check(lib.lm_region_prefetch_spans(self._handle, table, len(spans), urgent))

    def wait(self, first: int, count: int, cursor: int, timeout_ms: int) -> tuple[bool, int]:
        """Whether all are present, and how far it got; raises `NativeError` with the chunk that failed."""
        position, chunk = ffi.new("uint64_t *", cursor), ffi.new("uint64_t *")
        code = lib.lm_region_wait(self._handle, first, count, timeout_ms, position, chunk)
        if code < 0:
            failed = None if code == E_CLOSED else int(chunk[0])
            raise NativeError(code, failed, "" if failed is None else self._error_text(failed))
        return bool(code), int(position[0])

    def evict(self, first: int, count: int) -> None:
        """Give the pages of chunks back; touched again they are populated again."""
        _check(lib.lm_region_evict(self._handle, first, count))
        self.evictions += 1

    def _error_text(self, chunk: int) -> str:
        out = ffi.new("char[]", 512)
        if lib.lm_region_error_text(self._handle, chunk, out, len(out)) < 0:
            return ""
        return bytes(ffi.string(out)).decode("utf-8", "replace")

    def read_into(self, offset: int, out: Any) -> None:
        """Copy out of the region, GIL released; the range must be populated."""
        with ffi.from_buffer(out, require_writable=True) as view:
            _check(lib.lm_region_read(self._handle, offset, view, len(view)))

    def touch(self, offset: int, length: int) -> None:
        """Read a byte of each page, GIL released; the range must be populated."""
        _check(lib.lm_region_touch(self._handle, offset, length))

    def states(self, first: int, count: int) -> bytes:
        out = ffi.new("uint8_t[]", count)
        _check(lib.lm_region_states(self._handle, first, count, out))
        return bytes(ffi.buffer(out, count))

    def stats(self) -> Any:
        """An lm_stats structure."""
        out = ffi.new("lm_stats *")
        _check(lib.lm_region_stats(self._handle, out))
        return out

    def close(self) -> None:
        """Unmap and give everything back; waits for chunks in flight. Idempotent."""
        lib.lm_region_close(self._handle)
