# SPDX-License-Identifier: Apache-2.0
"""The mapped range: which way it is filled, who keeps it alive, when it may go.

Guarantees:
- Memory that an array (or any view of one) shows is never unmapped: views hold the root array, the root
  holds a lease, the lease holds the core's region. `close` refuses while anybody but the region itself
  holds the root. (A count of references cannot be interrupted half-way; sets of weak references can.)
- No call into the core runs on a region that is gone: the core counts its calls, and a handle that is
  closed says so.

There is no lock here, on purpose: a signal handler or a finalizer may run any of these methods in the
middle of another one, in the same thread, and may raise there.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import _native
from ._native import NativeError, NativeRegion, RegionSpec
from .catalog import ArrayTables, Catalog, Layout
from .errors import (
    BackendUnavailable,
    ChunkCorrupt,
    LazymemError,
    OutOfMemory,
    ReadError,
    SnapshotChanged,
    SnapshotClosed,
)
from .fetcher.client import RemoteBlob, store_error
from .options import DEFAULT_READAHEAD, MIB, OpenOptions, StoreOptions
from .store.base import Blob

logger = logging.getLogger("lazymem")

Span = tuple[int, int]  # first chunk, count

#: How long one call into the core may wait: the time until Ctrl-C is noticed.
_WAIT_MS: Final = 50

#: Bytes to run ahead of a sequential scan of a remote object.
_REMOTE_READAHEAD: Final = 32 * MIB

#: Codes that come with a sentence of the store's, or of the fetcher's.
_STORE_CODES: Final = (
    _native.E_STORE,
    _native.E_GONE,
    _native.E_DENIED,
    _native.E_CHANGED,
    _native.E_OPTION,
    _native.E_FETCHER,
)

_REFUSALS: Final = {
    -number
    for number in (
        errno.EPERM,
        errno.EACCES,
        errno.ENOSYS,
        errno.ENOENT,
        errno.ENODEV,
        errno.ENXIO,
        errno.EINVAL,
        errno.EOPNOTSUPP,
    )
} | {_native.E_FEATURE}


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of one snapshot since it was opened. Bytes and seconds, summed over all threads.

    faults: messages from the kernel (several threads, or pages, of one chunk may each send one).
    chunks_populated: by touch (chunks_demand) and by prefetch or read-ahead (chunks_prefetch).
    bytes_populated: memory; bytes_read: stored bytes, in `requests` reads of the source.
    read_, check_, decode_, install_seconds: where the time of populating went.
    moved_chunks: populated by UFFDIO_MOVE. latency: demand faults by time from message to memory;
    bucket b counts those of 2^b to 2^(b+1) nanoseconds.
    Plain mappings are served by the kernel, which does not tell: all zero.
    """

    faults: int
    chunks_populated: int
    chunks_demand: int
    chunks_prefetch: int
    chunks_failed: int
    bytes_populated: int
    bytes_read: int
    requests: int
    read_seconds: float
    check_seconds: float
    decode_seconds: float
    install_seconds: float
    moved_chunks: int
    latency: tuple[int, ...]

    def latency_percentile(self, percent: float) -> float:
        """Upper bound, in seconds, of the bucket that holds this percentile; 0.0 without faults."""
        total = sum(self.latency)
        seen = 0
        for bucket, count in enumerate(self.latency):
            seen += count
            if total and seen >= total * percent / 100:
                return float(2 ** (bucket + 1)) / 1e9
        return 0.0


class _Lease:
    """What numpy takes the memory from, and the base that keeps the region alive."""

    def __init__(self, native: NativeRegion, nbytes: int, readonly: bool) -> None:
        self._native = native
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (native.address, readonly),
        }


class _State(Enum):
    OPEN = 0
    CLOSING = 1
    CLOSED = 2


class Region:
    """A range of memory that shows a layout. Made by `Region.open`."""

    def __init__(
        self, native: NativeRegion, url: str, catalog: Catalog, nbytes: int, blobs: Sequence[Blob], mode: str
    ) -> None:
        self.url = url
        self.nbytes = nbytes
        self.mode = mode
        self._catalog = catalog
        self.backend = native.backend
        self.install = native.install
        self.chunk_size = native.chunk_size
        self.chunk_count = native.chunk_count
        self._native = native
        self._blobs = blobs
        self._state = _State.OPEN
        self._root = np.asarray(_Lease(native, nbytes, readonly=mode == "r"))
        self._idle_references = sys.getrefcount(self._root)

    # ---- open ----

    @classmethod
    def open(cls, url: str, catalog: Catalog, blobs: Sequence[Blob], options: OpenOptions) -> Region:
        """Map what the catalog lays out over `blobs`, which the caller keeps open.

        Blocks only where the backend is "eager", which reads everything.
        Raises `BackendUnavailable`, `OutOfMemory`; with "eager" also `ChunkCorrupt` and `ReadError`.
        """
        fds = [_descriptor(blob) for blob in blobs]
        layout = catalog.layout(fds)
        if (
            layout.content_size == 0
            or options.backend == "map"
            or (options.backend == "auto" and options.install == "auto" and layout.pieces is not None)
        ):
            native = cls._open_map(url, layout, options)
        else:
            native = cls._open_faulting(url, layout, catalog.tables(), blobs, fds, options)
        region = cls(native, url, catalog, layout.content_size, blobs, options.mode)
        try:
            region.check_unchanged()  # from here on the core looks, too
        except BaseException:
            region.close()
            raise
        if native.backend == "eager":
            try:
                region.prefetch([(0, region.chunk_count)], wait=True)
                native.seal()
            except BaseException:
                region.close()
                raise
        logger.debug("%s: %d bytes shown by backend %s", url, region.nbytes, region.backend)
        return region

    @classmethod
    def _open_map(cls, url: str, layout: Layout, options: OpenOptions) -> NativeRegion:
        pieces = () if layout.content_size == 0 else layout.pieces
        if pieces is None:
            raise BackendUnavailable(
                f"{url}: is compressed, converted, or not a local file, and backend 'map' shows only plain "
                "bytes of local files; use backend 'auto'"
            )
        try:
            return NativeRegion.open_map(max(layout.content_size, 1), pieces, writable=options.mode == "c")
        except NativeError as error:
            raise _cannot_open(url, layout, error) from error

    @classmethod
    def _open_faulting(
        cls, url: str, layout: Layout, tables: ArrayTables, blobs: Sequence[Blob], fds: list[int],
        options: OpenOptions,
    ) -> NativeRegion:  # fmt: skip
        wanted = ("uffd", "uffd-user", "eager") if options.backend == "auto" else (options.backend,)
        refusals: list[str] = []
        remote = [blob for blob in blobs if isinstance(blob, RemoteBlob)]
        store = remote[0].options if remote else StoreOptions()
        for backend in wanted:
            spec = RegionSpec(
                url=url,
                content_size=layout.content_size,
                chunk_size=layout.chunk_size,
                runs=layout.runs.tobytes(),
                records=layout.records.tobytes(),
                fds=fds,
                source_sizes=[blob.size for blob in blobs],
                backend=backend,
                install="auto" if backend == "eager" else options.install,
                writable=options.mode == "c",
                threads=options.threads or 0,
                readahead=_readahead(options, layout, is_remote=bool(remote)),
                sources=[blob.source for blob in remote],
                coalesce_gap=store.coalesce_gap,
                coalesce_size=store.coalesce_size,
                fetch_timeout_ms=int(store.timeout * 1000),
                array_offsets=tables.offsets.tobytes(),
                array_lengths=tables.lengths.tobytes(),
                name_offsets=tables.name_offsets.tobytes() if len(tables.offsets) else b"",
                names=tables.names,
                **_strips(layout),
            )
            try:
                return NativeRegion.open(spec)
            except NativeError as error:
                if error.code == _native.E_FEATURE and options.install == "move":
                    raise BackendUnavailable(
                        f"{url}: install='move' needs chunks of whole huge pages (2 MiB; these have "
                        f"{layout.chunk_size} bytes) and Linux 6.8; leave it out, and chunks are copied"
                    ) from error
                if error.code not in _REFUSALS:
                    raise _cannot_open(url, layout, error) from error
                refusals.append(str(error))
                logger.info("%s: backend %s is not to be had: %s", url, backend, error)
        raise BackendUnavailable(
            f"{url}: backend {options.backend!r} is not to be had here ({', '.join(refusals)}); `lazymem "
            "doctor` says what to change, backend='auto' takes the best that there is"
        )

    # ---- lifetime ----

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """The core's codes as exceptions that name file, chunk and array."""
        try:
            yield
        except NativeError as error:
            raise self._translate(error) from error

    def _check_open(self) -> None:
        if self._state is not _State.OPEN:
            raise SnapshotClosed(f"{self.url}: is closed; open it again")

    @property
    def closed(self) -> bool:
        return self._state is _State.CLOSED

    def root(self) -> NDArray[np.uint8]:
        """All bytes of the region as one array, read-only in mode "r". Keeps the region alive."""
        # In this order: either close() sees the reference, or this sees that it is closing.
        root = self._root
        self._check_open()
        return root

    def check_unchanged(self) -> None:
        """Raises `SnapshotChanged` if a local file was written to since it was opened.

        Of a plain mapping nothing else would tell: it shows what the file holds now.
        """
        if any(map(_was_written, self._blobs)):
            raise SnapshotChanged(
                f"{self.url}: was written to while it was open, so its arrays are not what they were; open "
                "it again",
                url=self.url,
            )

    def close(self) -> None:
        """Give the memory back. Idempotent. Blocks until chunks in flight are done.

        Waiting `prefetch` calls of other threads end with `SnapshotClosed`. Raises `BufferError`
        while an array, or a view of one, is alive.
        """
        if self._state is _State.CLOSED:
            return
        self._state = _State.CLOSING
        if sys.getrefcount(self._root) > self._idle_references:
            self._state = _State.OPEN
            raise BufferError(
                f"{self.url}: arrays that show this snapshot are still alive; drop them (del) and "
                "their views before close()"
            )
        self._native.close()
        self._state = _State.CLOSED

    # ---- populate ----

    def prefetch(
        self, spans: Sequence[Span], *, wait: bool, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Populate chunks before they are touched. Without `wait` errors show at the next touch.

        progress: called with (bytes in place, bytes in all) while it waits, and at the end.
        Releases the GIL. Raises `ChunkCorrupt`, `ReadError`, `SnapshotChanged`, `SnapshotClosed`.
        """
        process = os.getpid()
        with self._errors():
            self._queue(spans, urgent=wait)
            if not wait:
                return
            done, total = 0, sum(count for _, count in spans)
            for first, count in spans:
                for there in self._wait(first, count, process):
                    if progress is not None:
                        progress((done + there) * self.chunk_size, total * self.chunk_size)
                done += count
            if self.backend == "map":
                self.check_unchanged()

    def _queue(self, spans: Sequence[Span], *, urgent: bool) -> None:
        # What is waited for goes before what is not, all of it, as far as there is room.
        queued = self._native.prefetch(spans, urgent=urgent)
        while queued < len(spans):
            time.sleep(_WAIT_MS / 1000)  # full: 16,384 spans are waiting
            queued += self._native.prefetch(spans[queued:], urgent=urgent)

    def _wait(self, first: int, count: int, process: int) -> Iterator[int]:
        """Wait, and say now and then how many chunks are in place. process: the one that queued the span."""
        done, cursor = False, first
        while not done:
            if os.getpid() != process:  # a signal handler has forked: the queue stayed with the parent
                process = os.getpid()
                self._queue([(first, count)], urgent=True)
            done, cursor = self._native.wait(first, count, cursor, _WAIT_MS)
            yield min(cursor - first, count)

    def evict(self, spans: Sequence[Span]) -> None:
        """Give the memory of chunks back; touched again they are populated anew, without what was written."""
        with self._errors():
            for first, count in spans:
                self._native.evict(first, count)

    def read_into(self, offset: int, out: NDArray[np.uint8]) -> None:
        """Copy bytes out of the region, without holding the GIL; populate the range first."""
        with self._errors():
            self._native.read_into(offset, out)

    def spans(self, offset: int, nbytes: int) -> list[Span]:
        """The chunks that hold these bytes: one span, or none for no bytes."""
        if nbytes == 0:
            return []
        first = offset // self.chunk_size
        return [(first, (offset + nbytes - 1) // self.chunk_size + 1 - first)]

    # ---- look ----

    def states(self) -> bytes:
        """One byte a chunk: `_native.STATE_*`. Chunks of zeros count as present."""
        with self._errors():
            return self._native.states(0, self.chunk_count)

    def stats(self) -> Stats:
        with self._errors():
            raw = self._native.stats()
        return Stats(
            faults=raw.faults,
            chunks_populated=raw.chunks_demand + raw.chunks_prefetch,
            chunks_demand=raw.chunks_demand,
            chunks_prefetch=raw.chunks_prefetch,
            chunks_failed=raw.chunks_failed,
            bytes_populated=raw.bytes_populated,
            bytes_read=raw.bytes_read,
            requests=raw.reads,
            read_seconds=raw.read_ns / 1e9,
            check_seconds=raw.check_ns / 1e9,
            decode_seconds=raw.decode_ns / 1e9,
            install_seconds=raw.install_ns / 1e9,
            moved_chunks=raw.moved_chunks,
            latency=tuple(raw.latency),
        )

    def _translate(self, error: NativeError) -> LazymemError:
        if error.code == _native.E_CLOSED:
            return SnapshotClosed(f"{self.url}: was closed meanwhile; open it again")
        if error.code == _native.E_MOVED:
            return ReadError(
                f"{self.url}: a part of its memory was unmapped or moved by this process (munmap, mmap, "
                "mremap), so it cannot be read there; open it again",
                url=self.url,
            )
        if error.chunk is None:
            return _cannot_open(self.url, None, error)
        return self._chunk_error(error, error.chunk)

    def _chunk_error(self, error: NativeError, chunk: int) -> LazymemError:
        begin = chunk * self.chunk_size
        array = self._catalog.name_at(begin, begin + self.chunk_size)
        where = f"chunk {chunk}" + (f" (array {array!r})" if array is not None else "")
        if any(blob.has_changed() for blob in self._blobs):
            return SnapshotChanged(
                f"{self.url}: was changed while it was open, {where} cannot be read ({error}); open it again",
                url=self.url,
            )
        if error.code in _STORE_CODES:
            said = str(error).removeprefix(f"{self.url}: ")
            found = store_error(self.url, error.code, f"{self.url}: {where} cannot be read: {said}")
            if isinstance(found, ReadError):
                found.chunk, found.array = chunk, array
            return found
        kinds: dict[int, type[ChunkCorrupt] | type[ReadError]] = {
            _native.E_CHECKSUM: ChunkCorrupt,
            _native.E_DECODE: ChunkCorrupt,
            _native.E_RECORD: ChunkCorrupt,
        }
        return kinds.get(error.code, ReadError)(
            f"{self.url}: {where} cannot be read: {error}; `lazymem verify` lists all bad chunks",
            url=self.url,
            chunk=chunk,
            array=array,
        )


def _strips(layout: Layout) -> dict[str, Any]:
    stock = layout.stock
    if layout.strips is None or stock is None or not len(layout.strips):
        return {}
    return {
        "strips": layout.strips.tobytes(),
        "stock_size": stock.content_size,
        "stock_chunk_size": stock.chunk_size,
        "stock_runs": stock.runs.tobytes(),
    }


def _was_written(blob: Blob) -> bool:
    try:
        return blob.fileno() is not None and blob.has_changed()
    except OSError:  # the application has closed all descriptors; the mapping stays
        return False


def _descriptor(blob: Blob) -> int:
    """-1 for a blob that is not a local file."""
    fd = blob.fileno()
    return -1 if fd is None else fd


def _readahead(options: OpenOptions, layout: Layout, *, is_remote: bool) -> int:
    """Chunks: what was asked for; else, over a network, as many as keep several requests under way."""
    if options.readahead is not None:
        return options.readahead
    return max(DEFAULT_READAHEAD, _REMOTE_READAHEAD // layout.chunk_size if is_remote else 0)


def _cannot_open(url: str, layout: Layout | None, error: NativeError) -> LazymemError:
    if error.code == -errno.ENOMEM:
        size = f"{layout.content_size} bytes" if layout is not None else "the request"
        return OutOfMemory(
            f"{url}: there is no room for {size} in this process's address space: see `ulimit -v`, and "
            "vm.max_map_count if it has very many mappings"
        )
    if error.code in (-errno.EMFILE, -errno.ENFILE):
        return ReadError(f"{url}: no descriptor is free; raise the limit (ulimit -n)", url=url)
    if error.code == -errno.EAGAIN:
        return ReadError(f"{url}: no thread can be started; raise the limit (ulimit -u)", url=url)
    return ReadError(f"{url}: cannot be shown in memory: {error}", url=url)
