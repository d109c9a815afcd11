# SPDX-License-Identifier: Apache-2.0
"""What can be done with a region's memory for as long as anybody has it: populate, evict, copy out, look; the
core's codes as errors; and which memory of this process is lazy.

An array outlives the `Region` and the `Snapshot` that it came from. What keeps its memory is a `Lease`, the
base of the region's root array; so the lease carries all that it takes to populate, and is found by address.
"""

from __future__ import annotations

import errno
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from . import _native
from ._native import NativeError, NativeRegion
from .catalog import Catalog, Layout
from .errors import (
    OF_CODE,
    ChunkCorrupt,
    LazymemError,
    OutOfMemory,
    ReadError,
    SnapshotChanged,
    SnapshotClosed,
)
from .fetcher.client import store_error
from .latency import percentile
from .options import MIB
from .store.base import Blob

Span = tuple[int, int]  # first chunk, count

#: How long one call into the core may wait: the time until Ctrl-C is noticed.
_WAIT_MS: Final = 50

#: Bytes copied or touched by one call into the core, for the same reason.
_PIECE: Final = 16 * MIB

#: Codes that come with a sentence of the store's, or of the fetcher's.
_STORE_CODES: Final = (
    _native.E_STORE,
    _native.E_GONE,
    _native.E_DENIED,
    _native.E_CHANGED,
    _native.E_OPTION,
    _native.E_FETCHER,
)


#: What to do where a chunk cannot be read, by what the core says.
_REMEDIES: Final = {
    _native.E_SHORT: "get the whole file again",
    _native.E_CODEC: "reinstall lazymem with its dependencies",
    -errno.EIO: "the kernel's log (dmesg) says more; prefetch it again, or copy the file",
    -errno.ENOMEM: "free memory, or raise its limit or vm.max_map_count, and prefetch it again",
    -errno.EFBIG: "raise the limit of file sizes (ulimit -f) and prefetch it again",
    -errno.EMFILE: "raise the limit of descriptors (ulimit -n) and prefetch it again",
}


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of one snapshot since it was opened. Bytes and seconds, summed over all threads.

    faults: messages from the kernel (several threads, or pages, of one chunk may each send one).
    chunks_populated: by touch (chunks_demand) and by prefetch or read-ahead (chunks_prefetch).
    bytes_populated: memory; bytes_read: stored bytes, in `requests` reads of the source.
    read_, check_, decode_, install_seconds: where the time of populating went.
    moved_chunks: populated by UFFDIO_MOVE. latency: demand faults by time from message to memory;
    bucket b counts those of 2^b to 2^(b+1) nanoseconds.
    last_fault: the latest of these on the clock of time.perf_counter_ns: when its message was read, when a
    thread took it up, when its pages were in place. Zeros before the first.
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
    last_fault: tuple[int, int, int]

    def latency_percentile(self, percent: float) -> float:
        """Upper bound, in seconds, of the bucket that holds this percentile; 0.0 without faults."""
        return percentile(self.latency, percent)


class Memory:
    """The memory of a region."""

    def __init__(
        self, native: NativeRegion, url: str, catalog: Catalog, nbytes: int, blobs: Sequence[Blob], mode: str,
        fork: str,
    ) -> None:  # fmt: skip
        self.url = url
        self.nbytes = nbytes
        self.mode = mode
        self.backend = native.backend
        self.install = native.install
        self.chunk_size = native.chunk_size
        self.chunk_count = native.chunk_count
        self._catalog = catalog
        self._native = native
        self._blobs = blobs
        self._home = os.getpid() if fork == "drop" else None  # the one process that has the memory

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """The core's codes as exceptions that name file, chunk and array."""
        self._check_home()
        try:
            yield
        except NativeError as error:
            raise self._translate(error) from error

    def _is_elsewhere(self) -> bool:
        return self._home is not None and os.getpid() != self._home

    def _check_home(self) -> None:
        """A child that has not the memory, and perhaps ran no handlers of fork, must not ask the core."""
        if self._is_elsewhere():
            raise SnapshotClosed(
                f"{self.url}: was opened with fork='drop' by another process, so its memory is not in this "
                "one; open it again here"
            )

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

    # ---- populate ----

    def prefetch(
        self, spans: Sequence[Span], *, wait: bool, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Populate chunks before they are touched. Without `wait` errors show at the next touch.

        progress: called with (bytes in place, bytes in all) while it waits, and at the end.
        Releases the GIL. Raises `ChunkCorrupt`, `ReadError`, `SnapshotChanged`, `SnapshotClosed`.
        """
        asked = self._asked()
        with self._errors():
            self._queue(spans, urgent=wait)
            if not wait:
                return
            done, total = 0, sum(count for _, count in spans)
            for first, count in spans:
                for there in self._wait(first, count, asked):
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

    def _asked(self) -> tuple[int, int]:
        """What makes asking again needful: a signal handler forks, and the queue stays with the parent; or
        another thread evicts what was in place already, or in the queue."""
        return os.getpid(), self._native.evictions

    def _wait(self, first: int, count: int, asked: tuple[int, int]) -> Iterator[int]:
        """Wait, and say now and then how many chunks are in place. asked: `_asked` when they were queued."""
        done, cursor = False, first
        while not done:
            if asked != self._asked():
                asked = self._asked()
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
            for begin in range(0, len(out), _PIECE):
                self._native.read_into(offset + begin, out[begin : begin + _PIECE])

    def populate(self, extents: Sequence[tuple[int, int]]) -> None:
        """Have bytes [begin, end) of the region in memory, all of them, whatever was given back before.

        Raises as `prefetch` with `wait`.
        """
        self.prefetch(self._spans_of(extents), wait=True)
        with self._errors():
            for begin, end in extents:
                for at in range(begin, end, _PIECE):
                    self._native.touch(at, min(_PIECE, end - at))

    def _spans_of(self, extents: Sequence[tuple[int, int]]) -> list[Span]:
        spans: list[Span] = []
        for begin, end in sorted(extents):
            for first, count in self.spans(begin, end - begin):
                if spans and first <= spans[-1][0] + spans[-1][1]:
                    before, there = spans[-1]
                    spans[-1] = (before, max(there, first + count - before))
                else:
                    spans.append((first, count))
        return spans

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

    @property
    def user_only(self) -> bool:
        """A pager serves it, and touches by the kernel are refused."""
        return self._native.user_only

    def array_names(self, begin: int, end: int) -> list[str]:
        """Of arrays with bytes in that range; of those that share bytes, one."""
        tables = self._catalog.tables()
        inside = (tables.offsets < end) & (tables.offsets + tables.lengths > begin)
        ends = tables.name_offsets
        return [
            tables.names[ends[i] : ends[i + 1]].decode("utf-8", "replace")
            for i in np.flatnonzero(inside).tolist()
        ]

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
            last_fault=(raw.last_read_ns, raw.last_begun_ns, raw.last_installed_ns),
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
        if error.code == _native.E_LOST:
            return ReadError(
                f"{self.url}: {error}, a line on stderr has said why; open it again", url=self.url
            )
        if error.chunk is None:
            return cannot_open(self.url, None, error)
        return self._chunk_error(error, error.chunk)

    def _chunk_error(self, error: NativeError, chunk: int) -> LazymemError:
        begin = chunk * self.chunk_size
        array = self._catalog.name_at(begin, begin + self.chunk_size)
        where = f"chunk {chunk}" + (f" (array {array!r})" if array is not None else "")
        try:
            changed = any(blob.has_changed() for blob in self._blobs)
        except ReadError:  # what is read under a closed number says nothing of the file
            return self._closed_under_us(where, chunk, array)
        if changed:
            return SnapshotChanged(
                f"{self.url}: was changed while it was open, {where} cannot be read ({error}); open it again",
                url=self.url,
            )
        if error.code == -errno.EBADF:  # the core has duplicates
            return self._closed_under_us(where, chunk, array)
        if error.code in _STORE_CODES:
            said = str(error).removeprefix(f"{self.url}: ")
            found = store_error(self.url, error.code, f"{self.url}: {where} cannot be read: {said}")
            if isinstance(found, ReadError):
                found.chunk, found.array = chunk, array
            return found
        corrupt = OF_CODE.get(_native.CODES.get(error.code, "")) is ChunkCorrupt
        remedy = _REMEDIES.get(error.code, "prefetch it again, or open it again")
        if corrupt:  # only snapshots have checksums
            remedy = "`lazymem verify` lists all bad chunks"
        return (ChunkCorrupt if corrupt else ReadError)(
            f"{self.url}: {where} cannot be read: {error}; {remedy}",
            url=self.url,
            chunk=chunk,
            array=array,
        )

    def _closed_under_us(self, where: str, chunk: int, array: str | None) -> ReadError:
        return ReadError(
            f"{self.url}: its descriptors were closed by this process, so {where} cannot be read; open it "
            "again",
            url=self.url,
            chunk=chunk,
            array=array,
        )


class Lease(Memory):
    """What numpy takes the memory from, and the base that keeps it."""

    def __init__(
        self, native: NativeRegion, url: str, catalog: Catalog, nbytes: int, blobs: Sequence[Blob], mode: str,
        fork: str,
    ) -> None:  # fmt: skip
        super().__init__(native, url, catalog, nbytes, blobs, mode, fork)
        self.address = native.address
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (native.address, mode == "r"),
        }
        key = id(self)
        _leases[key] = weakref.ref(self, lambda _: _leases.pop(key, None))


#: All that are alive, by id. A plain dict: each use is one step, whatever interrupts it.
_leases: Final[dict[int, weakref.ref[Lease]]] = {}


def forget(lease: Lease) -> None:
    """The memory is about to be given back: other memory may come to lie there."""
    _leases.pop(id(lease), None)


def leases() -> list[Lease]:
    """Of all regions that this process has open, in the order in which they were opened."""
    found = [reference() for reference in list(_leases.values())]
    return [lease for lease in found if lease is not None]


def find(address: int) -> Lease | None:
    """The region that shows the byte at this address."""
    for lease in leases():
        if lease.address <= address < lease.address + lease.nbytes:
            return lease
    return None


def _was_written(blob: Blob) -> bool:
    try:
        return blob.fileno() is not None and blob.has_changed()
    except ReadError:  # the application has closed all descriptors; the mapping stays
        return False


def cannot_open(url: str, layout: Layout | None, error: NativeError) -> LazymemError:
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
    if error.code in (-errno.EBADF, -errno.ENOTTY):  # closed; or other files have their numbers
        return ReadError(
            f"{url}: cannot be shown in memory: this process has closed descriptors of lazymem; close the "
            "snapshots that are open, and open them again",
            url=url,
        )
    return ReadError(f"{url}: cannot be shown in memory: {error}", url=url)
