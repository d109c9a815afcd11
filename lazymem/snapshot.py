# SPDX-License-Identifier: Apache-2.0
"""`open`: a snapshot, or a container read in place, as a mapping of names to numpy arrays."""

from __future__ import annotations

import contextlib
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from ._native import NativeRegion
from .carried import CarriedFile, CarriedFiles, DirectoryFiles, OriginFiles
from .catalog import ArrayInfo, Catalog, DirectoryCatalog, IndexCatalog, Layout
from .composition import ComposedCatalog, Part, Recipe, cast_recipes, float_dtype
from .containers.base import Directory
from .errors import ArrayNotFound, OptionError, OutOfMemory, SnapshotChanged
from .format.bases import open_bases
from .format.reader import load_index
from .memory import Span, Stats
from .opener import LocationOpener, location_of
from .options import MIB, OpenOptions, StoreOptions
from .order import model_order
from .progress import Progress, reporting
from .recognizer import recognize
from .region import Region
from .store import locations
from .store.base import Blob
from .views import show

StrPath = str | os.PathLike[str]


class Snapshot(Mapping[str, NDArray[Any]]):
    """An open snapshot: a mapping of names to numpy arrays that are read when they are touched.

    Looking up an array reads nothing. Touching one of its elements populates the chunk that holds it,
    while the touching thread waits. Arrays keep the memory alive when the Snapshot is gone.
    Threads may share it. A context manager: leaving the block closes it.
    """

    def __init__(
        self, url: str, catalog: Catalog, region: Region, blobs: SharedBlobs, digest: str | None,
        reference: Reference | None, files: CarriedFiles, options: OpenOptions,
    ) -> None:  # fmt: skip
        self._url = url
        self._files = files
        self._reference = reference
        self._catalog = catalog
        self._region = region
        self._blobs = blobs
        self._digest = digest
        self._options = options

    # ---- what it is ----

    @property
    def url(self) -> str:
        """The path or URL it was opened by; without what is secret in it."""
        return self._url

    @property
    def format(self) -> str:
        """ "lzm", or the container's: "safetensors", "safetensors-sharded", "torch", "gguf", "npy", "npz",
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
        """How memory is filled: "uffd", "uffd-user", "sigsegv", "map" or "eager"."""
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
        Raises `ArrayNotFound`, `SnapshotClosed`; `SnapshotChanged` where a mapped file was written to.
        """
        info = self.info(name)
        root = self._region.root()
        if self.backend == "map":
            self._region.check_unchanged()
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

    def prefetch(
        self,
        names: str | Iterable[str] | None = None,
        *,
        wait: bool = False,
        order: str = "given",
        progress: Progress | bool | None = None,
    ) -> None:
        """Populate arrays (all, if no names are given) before they are touched.

        Returns at once, or with `wait=True` when everything is in place; the GIL is free meanwhile, and
        Ctrl-C is noticed. Touches by other threads go first. What failed before is tried again.
        order: "given", as the names are given or the arrays lie; "model", as a model needs its weights:
            embeddings, then layer by layer, then the head (see `lazymem.order.model_order`).
        progress: with `wait=True`, called now and then with (bytes in place, bytes in all); True shows a bar
            where standard error is a terminal.
        Raises `ArrayNotFound`, `SnapshotClosed`, `OptionError`, and with `wait=True` `ChunkCorrupt`,
        `ReadError` and `SnapshotChanged`.
        """
        if order not in ("given", "model"):
            raise OptionError(f"order is {order!r}; it must be 'given' or 'model'")
        if progress and not wait:
            raise OptionError("progress is told while prefetch waits; give wait=True, too")
        if order == "model":
            names = model_order(self if names is None else [names] if isinstance(names, str) else names)
        with reporting(progress, "populating") as report:
            self._region.prefetch(self._spans(names), wait=wait, progress=report)

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
        """A copy of an array in memory of its own, contiguous, writable. Blocks with the GIL released.

        Populates the array first, so the bytes are then in memory twice until the region goes.
        Raises what `prefetch(wait=True)` raises.
        """
        info = self.info(name)
        self._region.prefetch(self._region.spans(info.offset, info.nbytes), wait=True)
        data = np.empty(info.nbytes, np.uint8)
        self._region.read_into(info.offset, data)
        array = _shape(info, data)
        if info.strides is None:
            return array
        try:
            return array.copy("C")
        except MemoryError as error:  # a dimension that repeats may be of any length
            raise OutOfMemory(
                f"{self._url}: array {name!r} shows few bytes many times over, and there is no room for a "
                "copy of all; use the array itself"
            ) from error

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
        if isinstance(self._catalog, ComposedCatalog):  # which shows it otherwise, or not at all
            kind, part = np.dtype(np.uint8), Part(None, offset, length)
            recipe = Recipe("file", kind, kind, (length,), (part,) if length else ())
            with self._compose(self._catalog.stock, [recipe], "r") as content:
                return content.read("file").tobytes()
        self._region.prefetch(self._region.spans(offset, length), wait=True)
        data = np.empty(length, np.uint8)
        self._region.read_into(offset, data)
        return data.tobytes()

    def handle(self, name: str) -> ArrayHandle:
        """A small picklable stand-in for an array, for workers in other processes. Raises `ArrayNotFound`."""
        info = self.info(name)
        return ArrayHandle(self._referred(), name, info.dtype, info.shape)

    def _referred(self) -> Reference:
        if self._reference is None:
            raise TypeError(
                f"{self._url}: a composition of arrays does not pickle; pickle the snapshot that it was made "
                "of, and compose it again"
            )
        return self._reference.check()

    def evict(self, names: str | Iterable[str] | None = None) -> None:
        """Give the memory of arrays (all, if no names are given) back; touched again they are read again.

        What was written to them in mode "c" is lost. Arrays that share a chunk with one of them go along.
        With backend "eager" nothing happens, since nothing could bring them back.
        Raises `ArrayNotFound`, `SnapshotClosed`.
        """
        self._region.evict(self._spans(names))

    def walk(
        self, names: Iterable[str] | None = None, *, piece: int = 16 * MIB
    ) -> Iterator[tuple[ArrayInfo, int, NDArray[np.uint8]]]:
        """Arrays (all, if no names are given) as they lie, `piece` bytes at a time, in bounded memory.

        Yields the array's info, the piece's first byte in it, and the bytes, which are populated, and good
        until the next step: then they are given back, while the piece after it is on its way. Only for a
        snapshot in mode "r" that nothing else uses. Blocks. Raises as `prefetch(wait=True)`.
        """
        infos = sorted(map(self.info, self if names is None else names), key=lambda info: info.offset)
        steps = ((info, begin) for info in infos for begin in range(0, info.nbytes, piece))
        region, root, evicted = self._region, self._region.root(), 0
        for step, following in pairwise(chain(steps, [None])):
            assert step is not None  # only the last one is
            info, begin = step
            first, end = info.offset + begin, info.offset + min(begin + piece, info.nbytes)
            region.prefetch(region.spans(first, end - first), wait=True)
            if following is not None:
                after, at = following
                region.prefetch(region.spans(after.offset + at, min(piece, after.nbytes - at)), wait=False)
            yield info, begin, root[first:end]
            # A chunk that the next array begins in stays for it.
            passed = end // region.chunk_size
            first_chunk = min(evicted, first // region.chunk_size)
            region.evict([(first_chunk, max(0, passed - first_chunk))])
            evicted = max(evicted, passed)

    # ---- other arrangements of the same bytes ----

    def compose(self, recipes: Iterable[Recipe], *, mode: str | None = None) -> Snapshot:
        """Arrays made of parts of this snapshot's, in another order or dtype, as lazy as they are.

        Opens a region of its own over the same file or object: no request is made, nothing is read. It
        lives on when this one is closed, does not pickle, and cannot be composed again.
        mode: "r" or "c"; None, as this one.
        Raises `ArrayNotFound`, `UnsupportedDtype`, `OptionError`, and what opening a region raises.
        """
        if isinstance(self._catalog, ComposedCatalog):
            raise OptionError(
                f"{self._url}: shows converted arrays; compose the snapshot opened without dtype="
            )
        wanted = list(recipes)
        for name in {part.array for recipe in wanted for part in recipe.parts}:
            if name is not None:
                self.info(name)
        return self._compose(self._catalog, wanted, mode or self.mode)

    def _compose(self, stock: Catalog, recipes: Iterable[Recipe], mode: str) -> Snapshot:
        backend = "auto" if self._options.backend == "map" else self._options.backend
        options = replace(self._options, mode=mode, backend=backend)
        catalog = ComposedCatalog(stock, recipes)
        blobs = self._blobs.share()
        try:
            region = Region.open(self._url, catalog, blobs, options)
        except BaseException:
            blobs.close()
            raise
        return Snapshot(self._url, catalog, region, blobs, self._digest, None, self._files, options)

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
        return _reopen, (self._referred(),)

    def close(self) -> None:
        """Give memory and descriptors back. Idempotent; may wait for chunks in flight.

        Raises `BufferError` while arrays, or views of them, are alive: the snapshot then stays open.
        """
        self._region.close()
        self._blobs.close()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self.close()
        else:
            # The traceback holds the block's arrays; the error is what the caller needs to see.
            with contextlib.suppress(BufferError):
                self.close()


class SharedBlobs(Sequence[Blob]):
    """What one or more snapshots are read from; closed when the last of them is."""

    def __init__(self, blobs: Sequence[Blob], users: list[int] | None = None) -> None:
        self._blobs = blobs
        self._users = [0] if users is None else users  # one element for each that has not closed
        self._users.append(0)
        self._closed = False

    def share(self) -> SharedBlobs:
        return SharedBlobs(self._blobs, self._users)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._users.pop()
            if len(self._users) == 1:
                for blob in self._blobs:
                    blob.close()

    @overload
    def __getitem__(self, index: int) -> Blob: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Blob]: ...
    def __getitem__(self, index: int | slice) -> Blob | Sequence[Blob]:
        return self._blobs[index]

    def __len__(self) -> int:
        return len(self._blobs)


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
    if snapshot._referred().identity != reference.identity:
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
    return show(data, info.dtype, info.shape, info.strides, info.order)


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
    fork: str = "inherit",
    as_format: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    cache: StrPath | bool | None = None,
    dtype: Any = None,
    pager: StrPath | None = None,
) -> Snapshot:
    """Open a snapshot, or another format's file, as memory. Reads its index and no more.

    source: a path or URL (s3://, http://, https://): a snapshot (.lzm), .safetensors (a file, a folder
        of shards or their model.safetensors.index.json), .gguf, .npy, .npz (stored members), .pt, .pth or
        .bin of torch.save (nothing in it is run), or any other file, whose bytes are the array "data".
        Content decides, not the suffix.
    mode: "r", writing is an error; "c", copy-on-write: changes stay in this process's memory.
    fork: "inherit", child processes get the memory, as lazy as it is here; "drop", they do not.
    backend, install, threads, chunk_size, readahead, fork: see `lazymem.options.OpenOptions`; left out,
        the environment decides (LAZYMEM_BACKEND, LAZYMEM_INSTALL, LAZYMEM_THREADS).
    as_format: read a container as "raw", "npy", "npz", "safetensors", "torch" or "gguf" instead of finding
        out.
    storage_options: how a URL is reached, see `lazymem.options.StoreOptions`; what is left out is found
        as boto3 finds it: environment, configuration files, instance roles.
    cache: keep what is read from URLs on disk: a directory; True: LAZYMEM_CACHE_DIR, else
        ~/.cache/lazymem; False: no; None: only if LAZYMEM_CACHE_DIR is set.

    dtype: show floating-point arrays as "float16", "bfloat16", "float32" or "float64" (a name, or a numpy
        dtype): each chunk is converted when it is first touched. Rounded as numpy's astype does.
    pager: the socket of a `lazymem pager serve`, which then serves the memory: all its clients share one copy
        of what is read, and a debugger may stop this process and look at it. Without a pager for 60 seconds
        (LAZYMEM_PAGER_TIMEOUT) what was not read yet raises SIGBUS when touched.

    A remote object costs one request to open, or two (a large index; a container's header), each touch
    of a new chunk one more. Every request is for the version that was opened; if the object is replaced,
    reading raises `SnapshotChanged`. Uncompressed local files are mapped and share the page cache: their
    bytes are not checked when they are touched (`verify` does it, or backend="uffd" for snapshots).
    Everything else is. A snapshot that is a layer (`build`'s base=) needs its base, which is opened, too, at
    one request more, and must be the very file that it was built on.
    Raises `SnapshotNotFound`, `AccessDenied`, `FormatError`, `UnsupportedFormat`, `ReadError`,
    `SnapshotChanged` (another base), `BackendUnavailable`, `OutOfMemory`, `OptionError`; with a pager
    `PagerUnavailable`.
    """
    options = OpenOptions.from_environment(
        mode=mode,
        backend=backend,
        install=install,
        threads=threads,
        chunk_size=chunk_size,
        readahead=readahead,
        fork=fork,
    )
    location = location_of(source)
    store = StoreOptions.from_environment(
        storage_options, cache=cache, is_local=locations.scheme_of(location) is None
    )
    with contextlib.ExitStack() as stack:
        target = None if dtype is None else float_dtype(dtype)
        url, catalog, blobs, digest, files = load(location, options, store, as_format, stack)
        if target is not None and any(catalog.info(name).dtype != target for name in catalog.names):
            catalog = ComposedCatalog(catalog, cast_recipes(catalog, target))
        attach = None
        if pager is not None:
            attach = _attach(
                os.fspath(pager), location, url, catalog, blobs, options, as_format, storage_options
            )
        region = Region.open(url, catalog, blobs, options, attach)
        stack.pop_all()
    public = store.public()
    if cache is None and "cache" not in (storage_options or {}):
        public.pop("cache", None)  # a directory of this machine; the other side has an environment of its own
    keywords = {
        "mode": mode, "backend": backend, "install": install, "threads": threads, "chunk_size": chunk_size,
        "readahead": readahead, "fork": None if fork == "inherit" else fork, "as_format": as_format,
        "storage_options": public or None,
        "dtype": None if target is None else target.name,
        "pager": None if pager is None else os.path.abspath(pager),
    }  # fmt: skip
    reference = Reference(
        location if locations.scheme_of(location) else os.path.abspath(locations.local_path(location)),
        tuple(_identity_of(blob, digest) for blob in blobs),
        {name: value for name, value in keywords.items() if value is not None},
    )
    return Snapshot(url, catalog, region, SharedBlobs(blobs), digest, reference, files, options)


def _attach(
    pager: str, location: str, url: str, catalog: Catalog, blobs: Sequence[Blob], options: OpenOptions,
    as_format: str | None, storage_options: Mapping[str, Any] | None,
) -> Callable[[Layout], NativeRegion]:  # fmt: skip
    from .paging.client import Client  # few have one

    if isinstance(catalog, ComposedCatalog):
        raise OptionError(f"{url}: a pager serves arrays as they are stored; leave dtype= out, or pager=")
    return Client(
        pager,
        url,
        {
            "url": location
            if locations.scheme_of(location)
            else os.path.abspath(locations.local_path(location)),
            "as_format": as_format,
            "chunk_size": options.chunk_size,
            "storage_options": None if storage_options is None else dict(storage_options),
            "identities": [blob.identity for blob in blobs],
        },
        options,
    ).attach


def load(
    location: str, options: OpenOptions, store: StoreOptions, as_format: str | None,
    stack: contextlib.ExitStack,
) -> tuple[str, Catalog, tuple[Blob, ...], str | None, CarriedFiles]:  # fmt: skip
    """What lies at a location, with its index read: URL, arrays, open files, digest, the files it carries.

    `stack` closes the files. Raises what `open` raises for what it finds there.
    """
    opener = LocationOpener(store)
    found = recognize(location, opener, as_format=as_format)
    stack.callback(found.close)
    if isinstance(found, Directory):
        catalog = DirectoryCatalog(found, options.chunk_size)
        url = locations.display(location)
        return url, catalog, tuple(found.files), None, DirectoryFiles(url, found, opener)
    index = load_index(found)
    bases = open_bases(index, opener)
    for base in bases:
        stack.callback(base.close)
    return found.url, IndexCatalog(index), (found, *bases), index.digest.hex(), OriginFiles(index)


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
