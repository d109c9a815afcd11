# SPDX-License-Identifier: Apache-2.0
"""The mapped range: which way it is filled, who keeps it alive, when it may go.

Guarantees:
- Memory that an array (or any view of one) shows is never unmapped: views hold the root array, the root
  holds a lease (memory.py), the lease holds the core's region. `close` refuses while anybody but the region
  itself holds the root. (A count of references cannot be interrupted half-way; sets of weak references can.)
- No call into the core runs on a region that is gone: the core counts its calls, and a handle that is
  closed says so.

There is no lock here, on purpose: a signal handler or a finalizer may run any of these methods in the
middle of another one, in the same thread, and may raise there.
"""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import _native, ways
from ._native import NativeError, NativeRegion, RegionSpec
from .catalog import ArrayTables, Catalog, Layout
from .errors import BackendUnavailable, OptionError, SnapshotClosed
from .fetcher.client import RemoteBlob
from .memory import Lease, Memory, cannot_open, forget
from .options import LOCAL_READAHEAD, REMOTE_READAHEAD, OpenOptions, StoreOptions
from .store.base import Blob

logger = logging.getLogger("lazymem")

#: Codes that say that a way is not to be had, so that "auto" goes on to the next one. Not among them is what
#: every way needs: memory, descriptors, threads. The next one would lack it too, and "eager" most of all.
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
        errno.EFBIG,  # of the memfd that "sigsegv" lays chunks into, which counts as a file
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EBUSY,
    )
} | {_native.E_FEATURE}


class _State(Enum):
    OPEN = 0
    CLOSING = 1
    CLOSED = 2


class Region(Memory):
    """A range of memory that shows a layout. Made by `Region.open`."""

    def __init__(
        self, native: NativeRegion, url: str, catalog: Catalog, nbytes: int, blobs: Sequence[Blob], mode: str,
        fork: str,
    ) -> None:  # fmt: skip
        super().__init__(native, url, catalog, nbytes, blobs, mode, fork)
        self._state = _State.OPEN
        self._lease = Lease(native, url, catalog, nbytes, blobs, mode, fork)
        self._root = np.asarray(self._lease)
        self._idle_references = sys.getrefcount(self._root)

    # ---- open ----

    @classmethod
    def open(
        cls, url: str, catalog: Catalog, blobs: Sequence[Blob], options: OpenOptions,
        attach: Callable[[Layout], NativeRegion] | None = None,
    ) -> Region:  # fmt: skip
        """Map what the catalog lays out over `blobs`, which the caller keeps open.

        attach: brings the memory from elsewhere, where a pager serves it.
        Blocks only where the backend is "eager", which reads everything.
        Raises `BackendUnavailable`, `OutOfMemory`; with "eager" also `ChunkCorrupt` and `ReadError`.
        """
        fds = [_descriptor(blob) for blob in blobs]
        layout = catalog.layout(fds)
        if attach is not None and layout.content_size > 0:
            native = attach(layout)
        elif (
            layout.content_size == 0
            or options.backend == "map"
            or (options.backend == "auto" and options.install == "auto" and layout.pieces is not None)
        ):
            native = cls._open_map(url, layout, options)
        else:
            native = cls._open_faulting(url, layout, catalog.tables(), blobs, fds, options)
        region = cls(native, url, catalog, layout.content_size, blobs, options.mode, options.fork)
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
                f"{url}: is compressed, converted, a layer, or not a local file, and backend 'map' shows "
                "only plain bytes of one local file; use backend 'auto'"
            )
        try:
            return NativeRegion.open_map(
                max(layout.content_size, 1),
                pieces,
                writable=options.mode == "c",
                dropped=options.fork == "drop",
            )
        except NativeError as error:
            raise cannot_open(url, layout, error) from error

    @classmethod
    def _open_faulting(
        cls, url: str, layout: Layout, tables: ArrayTables, blobs: Sequence[Blob], fds: list[int],
        options: OpenOptions,
    ) -> NativeRegion:  # fmt: skip
        wanted = (
            ("uffd", "uffd-user", "sigsegv", "eager") if options.backend == "auto" else (options.backend,)
        )
        refusals: list[str] = []
        for backend in wanted:
            try:
                return NativeRegion.open(_spec(backend, url, layout, tables, blobs, fds, options))
            except NativeError as error:
                if error.code == _native.E_FEATURE and options.install == "move":
                    raise BackendUnavailable(
                        f"{url}: install='move' needs userfaultfd, chunks of whole huge pages (2 MiB; these "
                        f"have {layout.chunk_size} bytes) and Linux 6.8; leave it out, and chunks are copied"
                    ) from error
                if error.code not in _REFUSALS:
                    raise cannot_open(url, layout, error) from error
                refusals.append(f"{backend}: {_why(error)}")
                logger.info("%s: backend %s is not to be had: %s", url, backend, error)
        why = ways.refusal(options.backend) or f"{'; '.join(refusals)}; `lazymem doctor` says more"
        advice = "" if options.backend == "auto" else ". backend='auto' takes the best that there is"
        raise BackendUnavailable(f"{url}: backend {options.backend!r} is not to be had here: {why}{advice}")

    # ---- lifetime ----

    def _check_open(self) -> None:
        self._check_home()
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

    def close(self) -> None:
        """Give the memory back. Idempotent. Blocks until chunks in flight are done.

        Waiting `prefetch` calls of other threads end with `SnapshotClosed`. Raises `BufferError`
        while an array, or a view of one, is alive.
        """
        if self._state is _State.CLOSED:
            return
        if self._is_elsewhere():
            self._state = _State.CLOSED  # there is nothing to give back
            return
        self._state = _State.CLOSING
        if sys.getrefcount(self._root) > self._idle_references:
            self._state = _State.OPEN
            raise BufferError(
                f"{self.url}: arrays that show this snapshot are still alive; drop them (del) and "
                "their views before close()"
            )
        forget(self._lease)
        self._native.close()
        self._state = _State.CLOSED


def open_stock(url: str, catalog: Catalog, blobs: Sequence[Blob], options: OpenOptions) -> NativeRegion:
    """Memory for a pager's clients: chunks are decoded into it when one of them touches it, nobody here may.

    Raises `BackendUnavailable`, `OutOfMemory`; `OptionError` where there are no bytes.
    """
    fds = [_descriptor(blob) for blob in blobs]
    layout = catalog.layout(fds)
    if layout.content_size == 0:
        raise OptionError(f"{url}: has no bytes, so a pager has nothing of it to serve; leave it out")
    try:
        return NativeRegion.open(_spec("stock", url, layout, catalog.tables(), blobs, fds, options))
    except NativeError as error:
        raise cannot_open(url, layout, error) from error


def _spec(
    backend: str, url: str, layout: Layout, tables: ArrayTables, blobs: Sequence[Blob], fds: Sequence[int],
    options: OpenOptions,
) -> RegionSpec:  # fmt: skip
    remote = [blob for blob in blobs if isinstance(blob, RemoteBlob)]
    store = remote[0].options if remote else StoreOptions()
    return RegionSpec(
        url=url,
        content_size=layout.content_size,
        chunk_size=layout.chunk_size,
        runs=layout.runs.tobytes(),
        records=layout.records().tobytes(),
        fds=fds,
        source_sizes=[blob.size for blob in blobs],
        backend=backend,
        install=options.install if "uffd" in backend or options.backend == "sigsegv" else "auto",
        writable=options.mode == "c",
        dropped=options.fork == "drop",
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


def _why(refused: NativeError) -> str:
    if refused.code == -errno.EFBIG:
        return f"{refused}: what it shows chunks from counts as a file, so raise the limit (ulimit -f)"
    return str(refused)


def _descriptor(blob: Blob) -> int:
    """-1 for a blob that is not a local file."""
    fd = blob.fileno()
    return -1 if fd is None else fd


def _readahead(options: OpenOptions, layout: Layout, *, is_remote: bool) -> int:
    """Chunks: what was asked for, else so many bytes, in chunks."""
    if options.readahead is not None:
        return options.readahead
    return max(1, (REMOTE_READAHEAD if is_remote else LOCAL_READAHEAD) // layout.chunk_size)
