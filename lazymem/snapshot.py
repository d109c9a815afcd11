# SPDX-License-Identifier: Apache-2.0
"""`open`: a snapshot, or a container read in place, as a mapping of names to numpy arrays."""

from __future__ import annotations

import contextlib
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .carried import CarriedFile, CarriedFiles, DirectoryFiles, OriginFiles
from .catalog import ArrayInfo, Catalog, DirectoryCatalog, IndexCatalog
from .containers.base import Directory
from .errors import ArrayNotFound, OptionError, SnapshotChanged
from .format.reader import load_index
from .opener import LocationOpener, location_of
from .options import OpenOptions, StoreOptions
from .recognizer import recognize
from .region import Region, Span, Stats
from .store import locations
from .store.base import Blob

StrPath = str | os.PathLike[str]


class Snapshot(Mapping[str, NDArray[Any]]):
    """An open snapshot: a mapping of names to numpy arrays that are read when they are touched.

    Looking up an array reads nothing. Touching one of its elements populates the chunk that holds it,
    while the touching thread waits. Arrays keep the memory alive when the Snapshot is gone.
    Threads may share it. A context manager: leaving the block closes it.
    """

    def __init__(
        self, url: str, catalog: Catalog, region: Region, blobs: tuple[Blob, ...], digest: str | None,
        reference: Reference, files: CarriedFiles,
    ) -> None:  # fmt: skip
        self._url = url
        self._files = files
        self._reference = reference
        self._catalog = catalog
        self._region = region
        self._blobs = blobs
        self._digest = digest

    # ---- what it is ----

    @property
    def url(self) -> str:
        """The path or URL it was opened by; without what is secret in it."""
        return self._url

    @property
    def format(self) -> str:
        """ "lzm", or the container's: "safetensors", "safetensors-sharded", "gguf", "npy", "npz",
        "raw"."""
        return self._catalog.format

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The user's metadata, JSON-able; empty if there is none."""
        return self._catalog.metadata

    @property
    def digest(self) -> str | None:
        """SHA-256 over the content (FORMAT.md, *Digest*) in hexadecimal; None for containers."""
        return self._digest

    @property
    def mode(self) -> str:
        """ "r" or "c"."""
        return self._region.mode

    @property
    def backend(self) -> str:
        """How memory is filled: "uffd", "uffd-user", "map" or "eager"."""
        return self._region.backend

    @property
    def install(self) -> str:
        """How chunks are put in place: "copy", "move", or "none" where no chunk is."""
        return self._region.install if self.backend.startswith("uffd") else "none"

    @property
    def nbytes(self) -> int:
        """Bytes of the region: all arrays, and what lies between them."""
        return self._region.nbytes

    @property
    def chunk_size(self) -> int:
        """Bytes populated at once."""
        return self._region.chunk_size

    @property
    def chunk_count(self) -> int:
        return self._region.chunk_count

    @property
    def closed(self) -> bool:
        return self._region.closed

    def info(self, name: str) -> ArrayInfo:
        """Dtype, shape, order, size and place of an array. Raises `ArrayNotFound`."""
        if not isinstance(name, str):
            raise ArrayNotFound(
                f"{self._url}: arrays are found by name, a string, and {name!r} is none; "
                "list(snapshot) has the names",
                url=self._url,
                name=str(name),
            )
        try:
            return self._catalog.info(name)
        except KeyError:
            raise ArrayNotFound(
                f"{self._url}: has no array {name!r}{_hint(name, self._catalog)}", url=self._url, name=name
            ) from None

    # ---- memory ----

    @property
    def buffer(self) -> memoryview:
        """The whole region, bytes; read-only in mode "r". Keeps the region alive."""
        return self._region.root().data

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The array, shown in place: its dtype and shape, nothing read, nothing copied.

        Writing to it is an error in mode "r" and private in mode "c". A touch whose bytes cannot be
        had ends in SIGBUS, after a line on stderr that says why; `prefetch` raises instead.
        Raises `ArrayNotFound`, `SnapshotClosed`.
        """
        info = self.info(name)
        root = self._region.root()
        return _shape(info, root[info.offset : info.offset + info.nbytes])

    def __iter__(self) -> Iterator[str]:
        return iter(self._catalog.names)

    def __len__(self) -> int:
        return len(self._catalog.names)

    def __contains__(self, name: object) -> bool:
        return name in self._catalog.names

    # Arrays have no single truth value to compare by, so two snapshots are equal if they are one.
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    # ---- populate ----

    def prefetch(self, names: str | Iterable[str] | None = None, *, wait: bool = False) -> None:
        """Populate arrays (all, if no names are given) before they are touched.

        Returns at once, or with `wait=True` when everything is in place; the GIL is free meanwhile, and
        Ctrl-C is noticed. Touches by other threads go first. What failed before is tried again.
        Raises `ArrayNotFound`, `SnapshotClosed`, and with `wait=True` `ChunkCorrupt`, `ReadError` and
        `SnapshotChanged`.
        """
        self._region.prefetch(self._spans(names), wait=wait)

    def _spans(self, names: str | Iterable[str] | None) -> list[Span]:
        if names is None:
            return [(0, self._region.chunk_count)] if self._region.nbytes else []
        wanted = [names] if isinstance(names, str) else names
        spans: list[Span] = []
        for name in wanted:
            info = self.info(name)
            for first, count in self._region.spans(info.offset, info.nbytes):
                # Small neighbours share chunks: one span for what touches the one before.
                if spans and spans[-1][0] <= first <= spans[-1][0] + spans[-1][1]:
                    before = spans[-1][0]
                    count = max(first + count, before + spans[-1][1]) - before
                    spans[-1] = (before, count)
                else:
                    spans.append((first, count))
        return spans

    def read(self, name: str) -> NDArray[Any]:
        """A copy of an array in memory of its own, writable. Blocks with the GIL released.

        Populates the array first, so the bytes are then in memory twice until the region goes.
        Raises what `prefetch(wait=True)` raises.
        """
        info = self.info(name)
        self._region.prefetch(self._region.spans(info.offset, info.nbytes), wait=True)
        data = np.empty(info.nbytes, np.uint8)
        self._region.read_into(info.offset, data)
        return _shape(info, data)

    @property
    def files(self) -> Mapping[str, CarriedFile]:
        """The files that the snapshot was built from (a model's configuration, tokenizer, weights ...), by
        name; for a container read in place its own, and all in a model's folder, which is listed now."""
        return self._files.list()

    def read_file(self, name: str) -> bytes:
        """The bytes of one of `files`, of at most 256 MiB, checked by its SHA-256 where that is known.

        Blocks. Of a snapshot only the chunks that hold the file are read; of a folder opened in place the
        file is opened now. Raises `SnapshotNotFound` (no such file), `UnsupportedFormat` (too large, or
        one whose bytes would have to be compressed again), `SnapshotClosed`, and what `read` raises.
        """
        self._region.root()  # raises if it is closed
        return self._files.read(name, self._read_content)

    def _read_content(self, offset: int, length: int) -> bytes:
        self._region.prefetch(self._region.spans(offset, length), wait=True)
        data = np.empty(length, np.uint8)
        self._region.read_into(offset, data)
        return data.tobytes()

    def handle(self, name: str) -> ArrayHandle:
        """A small picklable stand-in for an array, for workers in other processes. Raises `ArrayNotFound`."""
        info = self.info(name)
        return ArrayHandle(self._reference.check(), name, info.dtype, info.shape)

    # ---- look ----

    def stats(self) -> Stats:
        """Counters since open. Raises `SnapshotClosed`."""
        return self._region.stats()

    def chunk_states(self) -> bytes:
        """One byte a chunk: 0 absent, 1 loading, 2 present, 3 failed, 4 poisoned. Zeros are present."""
        return self._region.states()

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.backend
        return (
            f"<lazymem.Snapshot {self._url!r}: {len(self)} arrays, {self.nbytes} bytes, "
            f"mode {self.mode!r}, {state}>"
        )

    # ---- lifetime ----

    def __reduce__(self) -> tuple[Any, ...]:
        """By reference: location, version and options, never data and never secrets; opened again there.

        Changes made in mode "c" stay in this process.
        """
        return _reopen, (self._reference.check(),)

    def close(self) -> None:
        """Give memory and descriptors back. Idempotent; may wait for chunks in flight.

        Raises `BufferError` while arrays, or views of them, are alive: the snapshot then stays open.
        """
        self._region.close()
        for blob in self._blobs:
            blob.close()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self.close()
        else:
            # The traceback holds the block's arrays; the error is what the caller needs to see.
            with contextlib.suppress(BufferError):
                self.close()


@dataclass(frozen=True, slots=True)
class Reference:
    """Which snapshot, which version of it, and how it is opened: what a pickle carries of one.

    identity: of each file; of a local file what is the same on every machine that sees it.
    keywords: of `open`, without secrets: the other side finds those in its own environment.
    """

    location: str
    identity: tuple[str, ...]
    keywords: Mapping[str, Any]

    def check(self) -> Reference:
        """Itself. Raises `TypeError` where the URL carries credentials, which must not be passed on."""
        if locations.has_secrets(self.location):
            raise TypeError(
                f"{locations.display(self.location)}: is opened by a URL with credentials in it, which a "
                "pickle must not carry; open it by a URL without (storage_options={'headers': ...}, or s3://)"
            )
        return self

    def key(self) -> str:
        """Equal for references to the same memory."""
        return repr((self.location, self.identity, sorted(self.keywords.items())))


def _identity_of(blob: Blob, digest: str | None) -> str:
    fd = blob.fileno()
    if fd is None:
        return blob.identity
    if digest is not None:
        return digest
    info = os.fstat(fd)
    return f"{info.st_size}-{info.st_mtime_ns}"


def _reopen(reference: Reference) -> Snapshot:
    """The snapshot that was pickled. Raises as `open`, and `SnapshotChanged` if it is another by now."""
    snapshot = open(reference.location, **reference.keywords)
    if snapshot._reference.identity != reference.identity:
        snapshot.close()
        raise SnapshotChanged(
            f"{snapshot.url}: was changed after this reference to it was made; make a new one",
            url=snapshot.url,
        )
    return snapshot


#: Snapshots that handles have opened in this process, the least recently used first. Kept open, since a
#: worker gets a new handle with each task, and would else load the same chunks again.
_opened: OrderedDict[str, Snapshot] = OrderedDict()
_OPENED_MAX: Final = 8


def _open_shared(reference: Reference) -> Snapshot:
    key = reference.key()
    snapshot = _opened.pop(key, None)
    if snapshot is None or snapshot.closed:
        snapshot = _reopen(reference)
    _opened[key] = snapshot
    while len(_opened) > _OPENED_MAX:
        with contextlib.suppress(KeyError):  # another thread was faster
            _opened.popitem(last=False)  # its arrays keep it alive for as long as they are used
    return snapshot


class ArrayHandle:
    """A stand-in for one array of a snapshot that pickles to a few hundred bytes.

    Indexing it opens the snapshot, once a process, and shows the array in place: only chunks that are
    touched are read. Has what numpy-like consumers ask for, so that `dask.array.from_array` and friends
    take it. Made by `Snapshot.handle`. Opening raises as `lazymem.open`, and `SnapshotChanged`.
    """

    def __init__(self, reference: Reference, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._reference = reference
        self.name = name
        self.dtype = dtype
        self.shape = shape

    @property
    def url(self) -> str:
        """Path or URL of the snapshot."""
        return self._reference.location

    @property
    def identity(self) -> tuple[str, ...]:
        """The version of the snapshot's file, or files."""
        return self._reference.identity

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def open(self) -> NDArray[Any]:
        """The array, shown in place. The snapshot stays open in this process for the next handle."""
        return _open_shared(self._reference)[self.name]

    def __getitem__(self, key: Any) -> Any:
        return self.open()[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        array = self.open()
        if dtype is not None and np.dtype(dtype) != array.dtype:
            if copy is False:
                raise ValueError(f"{self.name}: cannot be shown as {np.dtype(dtype)} without a copy")
            return array.astype(dtype)
        return array.copy() if copy else array

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"{self.name}: has no dimensions, and so no length")
        return self.shape[0]

    def __dask_tokenize__(self) -> tuple[str, str]:
        return self._reference.key(), self.name

    def __repr__(self) -> str:
        url = locations.display(self.url) if locations.scheme_of(self.url) else self.url
        return f"<lazymem.ArrayHandle {self.name!r} of {url!r}: {self.dtype}{list(self.shape)}>"


def _shape(info: ArrayInfo, data: NDArray[np.uint8]) -> NDArray[Any]:
    order: Any = info.order
    return np.ndarray(info.shape, info.dtype, buffer=data, order=order)


def _hint(name: str, catalog: Catalog) -> str:
    import difflib  # only for the message

    names = catalog.names
    if len(names) > 10_000:
        return f" among {len(names)}; `lazymem ls` lists them"
    close = difflib.get_close_matches(name, names, 3)
    if close:
        return "; did you mean " + " or ".join(repr(other) for other in close) + "?"
    return f" among {len(names)}; `lazymem ls` lists them"


def open(
    source: StrPath,
    *,
    mode: str = "r",
    backend: str | None = None,
    install: str | None = None,
    threads: int | None = None,
    chunk_size: int | None = None,
    readahead: int | None = None,
    as_format: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    cache: StrPath | bool | None = None,
) -> Snapshot:
    """Open a snapshot, or another format's file, as memory. Reads its index and no more.

    source: a path or URL (s3://, http://, https://): a snapshot (.lzm), .safetensors (a file, a folder
        of shards or their model.safetensors.index.json), .gguf, .npy, .npz (stored members), or any other
        file, whose bytes are the array "data". Content decides, not the suffix.
    mode: "r", writing is an error; "c", copy-on-write: changes stay in this process's memory.
    backend, install, threads, chunk_size, readahead: see `lazymem.options.OpenOptions`; left out,
        the environment decides (LAZYMEM_BACKEND, LAZYMEM_INSTALL, LAZYMEM_THREADS).
    as_format: read a container as "raw", "npy", "npz", "gguf" or "safetensors" instead of finding out.
    storage_options: how a URL is reached, see `lazymem.options.StoreOptions`; what is left out is found
        as boto3 finds it: environment, configuration files, instance roles.
    cache: keep what is read from URLs on disk: a directory; True: LAZYMEM_CACHE_DIR, else
        ~/.cache/lazymem; False: no; None: only if LAZYMEM_CACHE_DIR is set.

    A remote object costs one request to open, or two (a large index; a container's header), each touch
    of a new chunk one more. Every request is for the version that was opened; if the object is replaced,
    reading raises `SnapshotChanged`. Uncompressed local files are mapped and share the page cache: their
    bytes are not checked when they are touched (`verify` does it, or backend="uffd" for snapshots).
    Everything else is.
    Raises `SnapshotNotFound`, `AccessDenied`, `FormatError`, `UnsupportedFormat`, `ReadError`,
    `BackendUnavailable`, `OutOfMemory`, `OptionError`.
    """
    options = OpenOptions.from_environment(
        mode=mode,
        backend=backend,
        install=install,
        threads=threads,
        chunk_size=chunk_size,
        readahead=readahead,
    )
    store = StoreOptions.from_environment(storage_options, cache=cache)
    location = location_of(source)
    with contextlib.ExitStack() as stack:
        url, catalog, blobs, digest, files = _load(location, options, store, as_format, stack)
        region = Region.open(url, catalog, blobs, options)
        stack.pop_all()
    public = store.public()
    if cache is None and "cache" not in (storage_options or {}):
        public.pop("cache", None)  # a directory of this machine; the other side has an environment of its own
    keywords = {
        "mode": mode, "backend": backend, "install": install, "threads": threads, "chunk_size": chunk_size,
        "readahead": readahead, "as_format": as_format, "storage_options": public or None,
    }  # fmt: skip
    reference = Reference(
        location if locations.scheme_of(location) else os.path.abspath(locations.local_path(location)),
        tuple(_identity_of(blob, digest) for blob in blobs),
        {name: value for name, value in keywords.items() if value is not None},
    )
    return Snapshot(url, catalog, region, blobs, digest, reference, files)


def _load(
    location: str, options: OpenOptions, store: StoreOptions, as_format: str | None,
    stack: contextlib.ExitStack,
) -> tuple[str, Catalog, tuple[Blob, ...], str | None, CarriedFiles]:  # fmt: skip
    opener = LocationOpener(store)
    found = recognize(location, opener, as_format=as_format)
    stack.callback(found.close)
    if isinstance(found, Directory):
        catalog = DirectoryCatalog(found, options.chunk_size)
        url = locations.display(location)
        return url, catalog, tuple(found.files), None, DirectoryFiles(url, found, opener)
    index = load_index(found)
    return found.url, IndexCatalog(index), (found,), index.digest.hex(), OriginFiles(index)


def open_array(source: StrPath, name: str | None = None, **options: Any) -> NDArray[Any]:
    """One array of `source`, shown in place; the array keeps the region alive.

    name: which; may be left out if there is only one. options: as for `open`. Raises as `open`, and
    `ArrayNotFound`.
    """
    snapshot = open(source, **options)
    if name is None:
        if len(snapshot) != 1:
            names = ", ".join(repr(other) for other in list(snapshot)[:5])
            raise OptionError(
                f"{snapshot.url}: holds {len(snapshot)} arrays ({names} ...); say which one by name="
            )
        name = next(iter(snapshot))
    return snapshot[name]
