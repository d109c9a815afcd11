# SPDX-License-Identifier: Apache-2.0
"""What lies in a snapshot or a container: the lists behind `lazymem ls` and `lazymem info`.

Opens the index, or the container's headers, and nothing else: no memory is mapped, no chunk is read.
Unlike `open`, it also lists compressed members of an .npz.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from .carried import DirectoryFiles
from .catalog import IndexCatalog
from .containers.base import Directory
from .errors import FormatError
from .format.index import SnapshotIndex
from .format.reader import load_index
from .opener import LocationOpener, location_of
from .options import StoreOptions
from .recognizer import recognize
from .store import locations

StrPath = str | os.PathLike[str]
Cache = str | os.PathLike[str] | bool | None


@dataclass(frozen=True, slots=True)
class ListedArray:
    """One array. nbytes: in memory. dtype: as numpy prints it.

    first_chunk, chunks: where it lies in a snapshot; None in a container. chunks is 0 for an empty array.
    stored_bytes: what it takes of a container's file; None in a snapshot, where chunks may be shared.
    view_of: the array whose bytes it shows, which may be a hidden one; None if they are its own. strides: in
    bytes, where its elements do not follow one another.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    order: str
    nbytes: int
    first_chunk: int | None
    chunks: int | None
    stored_bytes: int | None
    compression: str | None
    metadata: Mapping[str, Any]
    view_of: str | None = None
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a container, or one that a snapshot was built from. sha256: hexadecimal, if known."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Origin:
    """What a snapshot was built from. exact: `extract` gives the very files back, else reason: why not."""

    format: str
    exact: bool
    reason: str | None
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, slots=True)
class BaseFile:
    """A file whose chunks a layer uses. url: as the layer names it. digest: of its content, hexadecimal."""

    url: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks of a snapshot. stored + zero = count; codecs and filters count the stored ones.

    shared: those of the stored ones that lie in the bases of a layer. stored_bytes: what the others take in
    the file. ratio: bytes of the arrays over stored_bytes, or 0.0.
    """

    size: int
    count: int
    stored: int
    zero: int
    shared: int
    stored_bytes: int
    ratio: float
    codecs: Mapping[str, int]
    filters: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Summary:
    """A snapshot or a container as a whole. Sizes in bytes.

    arrays: visible ones, of which `views` have no bytes of their own. hidden_arrays: bytes of the original
    file that are in no array, as its header.
    content_bytes: of the memory that shows a snapshot; it, chunks, digest, created_by and container are
    None for containers. files: of a container; a snapshot is one file. other_files: names of what lies
    beside them in a model's folder; of a remote one, whose listing would cost requests, only the index.
    bases: what a layer stands on; not opened here.
    compressed_arrays: those of a container that keep it from being read in place.
    """

    url: str
    format: str
    file_bytes: int
    arrays: int
    views: int
    hidden_arrays: int
    compressed_arrays: int
    array_bytes: int
    content_bytes: int | None
    chunks: Chunks | None
    digest: str | None
    created_by: str | None
    container: Origin | None
    files: tuple[SourceFile, ...]
    metadata: Mapping[str, Any]
    array_metadata: Mapping[str, Mapping[str, Any]]
    other_files: tuple[str, ...] = ()
    bases: tuple[BaseFile, ...] = ()


@contextmanager
def _opened(location: str, opener: LocationOpener) -> Iterator[SnapshotIndex | Directory]:
    with closing(recognize(location, opener)) as found:
        yield found if isinstance(found, Directory) else load_index(found)


def list_arrays(
    source: StrPath, *, storage_options: Mapping[str, Any] | None = None, cache: Cache = None
) -> list[ListedArray]:
    """All arrays of a snapshot or a container, in the order in which they lie.

    source: a path or URL. storage_options, cache: as for `open`. Raises `SnapshotNotFound`,
    `AccessDenied`, `FormatError`, `UnsupportedFormat`, `ReadError`, `OptionError`.
    """
    opener = LocationOpener(StoreOptions.from_environment(storage_options, cache=cache))
    with _opened(location_of(source), opener) as found:
        return _of_directory(found) if isinstance(found, Directory) else _of_index(found)


def _of_index(index: SnapshotIndex) -> list[ListedArray]:
    catalog = IndexCatalog(index)
    rows = []
    for name in catalog.names:
        info = catalog.info(name)
        view = index.views.get(name)
        first = info.offset // index.chunk_size
        last = (info.offset + info.nbytes - 1) // index.chunk_size
        rows.append(
            ListedArray(
                name=name,
                dtype=str(info.dtype),
                shape=info.shape,
                order=info.order,
                nbytes=index.place_of(name).size,
                first_chunk=first,
                chunks=last - first + 1 if info.nbytes else 0,
                stored_bytes=None,
                compression=None,
                metadata=info.metadata,
                view_of=None if view is None else view.array,
                strides=info.strides,
            )
        )
    return rows


def _of_directory(directory: Directory) -> list[ListedArray]:
    return [
        ListedArray(
            name=entry.name,
            dtype=str(entry.dtype),
            shape=entry.shape,
            order=entry.order,
            nbytes=entry.nbytes,
            first_chunk=None,
            chunks=None,
            stored_bytes=entry.stored_length,
            compression=entry.compression,
            metadata=entry.metadata,
        )
        for entry in directory.arrays
        if not entry.hidden
    ] + [
        ListedArray(
            name=view.name,
            dtype=str(view.dtype),
            shape=view.shape,
            order=view.order or "C",
            nbytes=math.prod(view.shape) * view.dtype.itemsize,
            first_chunk=None,
            chunks=None,
            stored_bytes=0,
            compression=None,
            metadata=view.metadata,
            view_of=view.array,
            strides=None if view.order else view.strides,
        )
        for view in directory.views
    ]


def summarize(
    source: StrPath, *, storage_options: Mapping[str, Any] | None = None, cache: Cache = None
) -> Summary:
    """A snapshot or a container as a whole. Takes and raises what `list_arrays` does."""
    location = location_of(source)
    opener = LocationOpener(StoreOptions.from_environment(storage_options, cache=cache))
    with _opened(location, opener) as found:
        if isinstance(found, Directory):
            return _summarize_directory(locations.display(location), found, opener)
        return _summarize_index(found)


def _summarize_index(index: SnapshotIndex) -> Summary:
    facts = index.summary()
    origin = index.container
    return Summary(
        url=index.url,
        format="lzm",
        file_bytes=facts.file_size,
        arrays=facts.arrays,
        views=facts.views,
        hidden_arrays=facts.hidden_arrays,
        compressed_arrays=0,
        array_bytes=facts.array_bytes,
        content_bytes=facts.content_size,
        chunks=Chunks(
            size=facts.chunk_size,
            count=facts.chunks,
            stored=facts.chunks - facts.zero_chunks,
            zero=facts.zero_chunks,
            shared=facts.shared_chunks,
            stored_bytes=facts.stored_bytes,
            ratio=facts.ratio,
            codecs=facts.codecs,
            filters=facts.filters,
        ),
        digest=index.digest.hex(),
        created_by=index.created_by,
        container=None
        if origin is None
        else Origin(
            origin.format,
            origin.exact,
            origin.reason,
            tuple(SourceFile(file.name, file.size, file.sha256) for file in origin.files),
        ),
        files=(),
        metadata=index.metadata,
        array_metadata=index.array_metadata,
        bases=tuple(BaseFile(base.url, base.size, base.digest) for base in index.sources),
    )


def _summarize_directory(url: str, directory: Directory, opener: LocationOpener) -> Summary:
    others = tuple(directory.extra_files)
    if directory.folder is not None and locations.scheme_of(directory.folder) is None:
        with suppress(FormatError):  # a folder with more than a model's files
            listed = DirectoryFiles(url, directory, opener).list()
            others = tuple(name for name in listed if name not in directory.file_names)
    files = tuple(
        SourceFile(name, blob.size, None)
        for name, blob in zip(directory.file_names, directory.files, strict=True)
    )
    return Summary(
        url=url,
        format=directory.format,
        file_bytes=sum(file.size for file in files),
        arrays=len(directory.names),
        views=len(directory.views),
        hidden_arrays=0,
        compressed_arrays=sum(entry.compression is not None for entry in directory.arrays),
        array_bytes=sum(entry.nbytes for entry in directory.arrays),
        content_bytes=None,
        chunks=None,
        digest=None,
        created_by=None,
        container=None,
        files=files,
        metadata=directory.metadata,
        array_metadata={
            **{entry.name: entry.metadata for entry in directory.arrays if entry.metadata},
            **{view.name: view.metadata for view in directory.views if view.metadata},
        },
        other_files=others,
    )
