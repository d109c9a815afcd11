# SPDX-License-Identifier: Apache-2.0
"""`build`: makes a snapshot file of arrays, containers, streams or another snapshot.

Sources and destination may lie in any store. Owns which destination may be replaced.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Final, cast

from ..containers.base import Directory
from ..destination import Destination
from ..errors import BuildError, FormatError, OptionError
from ..format.reader import SnapshotReader, open_snapshot
from ..format.reuse import BaseChunks
from ..format.writer import SnapshotWriter, metadata_section
from ..opener import LocationOpener, location_of
from ..options import DEFAULT_CHUNK_SIZE, BuildOptions, StoreOptions
from ..recognizer import recognize
from ..store import locations
from ..store.base import Opener
from .containers import ContainerSource, combine
from .sources import ArraySource, SnapshotSource, Source, StreamSource, file_name_of

#: Bytes between two calls of `progress`.
_PROGRESS_STEP: Final = 1 << 20

StrPath = str | os.PathLike[str]
Progress = Callable[[int, int | None], None]
BuildSource = StrPath | Mapping[str, Any] | Sequence[StrPath] | BinaryIO


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What `build` made. path: or URL, free of secrets. Sizes in bytes.

    arrays: with views, without hidden ones. content_bytes: of the region that shows the snapshot.
    source_bytes: of what went in.
    chunks: all of them; zero_chunks take no bytes, raw_chunks did not shrink,
        shared_chunks lie in the base. digest: hexadecimal.
    exact: `extract` gives back the very files that went in, or none did; else reason says why not.
    left_out: what lies in a model folder and was not taken: files that hold the same weights once more, links
        that lead out of it, to a folder or nowhere, pipes, names that cannot be printed.
    """

    path: str
    arrays: int
    content_bytes: int
    source_bytes: int
    file_bytes: int
    chunks: int
    zero_chunks: int
    raw_chunks: int
    digest: str
    exact: bool
    reason: str | None
    seconds: float
    left_out: tuple[str, ...] = ()
    shared_chunks: int = 0


def build(
    source: BuildSource,
    destination: StrPath,
    *,
    codec: str = "zstd",
    level: int | None = None,
    chunk_size: int | None = None,
    base: StrPath | None = None,
    planes: bool | None = None,
    threads: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    array_metadata: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Build the snapshot `destination`, a path or URL, from `source`, and say what was built.

    source: a mapping of names to arrays, of which those that lie in the memory of an earlier one take no
        bytes again; the path or URL of a container (.npy, .npz, .gguf, .safetensors, .pt, an index of
        shards), of a snapshot, or of any other file, whose bytes become the array "data"; of a model folder,
        all of which goes in (weights, configuration, tokenizer ...), but not hidden files, the same weights
        in further formats, nor links out of it (except to the weights, and in Hugging Face's cache); a list
        of such, folders then for their weights only; a binary file object; or "-" for standard input.
    codec, level, chunk_size, planes, threads: see `BuildOptions`. chunk_size=None: the base's, else 2 MiB.
    base: a snapshot, local like the destination or in the same bucket. The result is a layer, which stores
        only chunks that the base (or what that stands on) has nowhere, and needs the base, unchanged, to be
        opened: under a relative name if it lies beside the destination or below, else where it is now.
        What neither has, or only at other chunk boundaries, is stored as ever. At most 16 files one below the
        other.
    metadata, array_metadata: JSON, kept with what the source says, over which they win.
    overwrite: whether to replace an existing destination: None, if it is a snapshot or empty; True,
        any regular file; False, none (in object stores: If-None-Match). Source and destination may be
        one file, but a container that `extract` could not give back exactly is never replaced.
    storage_options: how stores are reached, see `lazymem.options.StoreOptions`; boto3's environment
        variables and files count too. No cache on disk is used: a build reads everything once.
    progress: called with (bytes done, bytes in all or None).

    Blocks. Needs memory for (5 threads + 6) chunks, 64 bytes per stored chunk and 150 per one of the base,
    and some 100 MiB for each end that is remote, whatever the size of the source; only arrays of a mapping
    are in memory already. The destination appears, synced or uploaded in full, when everything is written;
    a build that fails or is interrupted leaves nothing that looks like one, and no parts of an upload.

    Raises `BuildError`, `AccessDenied`, `OptionError`, `UnsupportedDtype`, and what reading the
    source raises: `SnapshotNotFound`, `FormatError`, `ReadError`, `ChunkCorrupt`.
    """
    started = time.monotonic()
    size = DEFAULT_CHUNK_SIZE if chunk_size is None else chunk_size
    options = BuildOptions(codec, level, size, planes, threads)
    store_options = StoreOptions.from_environment(storage_options, cache=False)
    target = Destination(location_of(destination, "the destination"), store_options, overwrite)
    metadata_section(metadata or {}, array_metadata or {})  # refuse it before the work, not after
    with ExitStack() as stack:
        opener = LocationOpener(store_options)
        shared = None
        if base is not None:
            shared = _open_base(location_of(base, "the base"), target, opener, stack)
            if chunk_size not in (None, shared.chunk_size):
                raise OptionError(
                    f"chunk_size is {chunk_size}, but the base has chunks of {shared.chunk_size} bytes; "
                    "leave it out"
                )
            options = replace(options, chunk_size=shared.chunk_size)
        opened = _open_source(source, opener)
        stack.callback(opened.close)
        unknown = set(array_metadata or {}) - set(opened.names)
        if unknown:
            raise OptionError(f"array_metadata names {min(unknown)!r}, which the source does not have")
        target.check_replaced()
        file = stack.enter_context(target.writer()).file
        writer = stack.enter_context(SnapshotWriter(file, options, created_by=_created_by(), base=shared))
        offsets, own_metadata = _copy(opened, writer, progress)
        for name, values in (array_metadata or {}).items():
            own_metadata[name] = {**own_metadata.get(name, {}), **values}
        origin, extents = opened.origin(offsets) or (None, None)
        result = writer.finish(
            metadata={**opened.metadata, **(metadata or {})},
            array_metadata=own_metadata,
            origin=origin,
            extents=extents,
        )
        exact = origin is None or origin.exact
        reason = None if origin is None else origin.reason
        if not exact and isinstance(opened, ContainerSource):
            _check_source_stays(target, opened, reason)
        target.check_replaced()
        arrays, source_bytes = len(opened.names), opened.source_bytes
    return BuildReport(
        path=target.url,
        arrays=arrays,
        content_bytes=result.content_bytes,
        source_bytes=source_bytes,
        file_bytes=result.file_bytes,
        chunks=result.chunks,
        zero_chunks=result.zero_chunks,
        raw_chunks=result.raw_chunks,
        digest=result.digest.hex(),
        exact=exact,
        reason=reason,
        seconds=time.monotonic() - started,
        left_out=opened.left_out if isinstance(opened, ContainerSource) else (),
        shared_chunks=result.shared_chunks,
    )


def _open_base(location: str, target: Destination, opener: Opener, stack: ExitStack) -> BaseChunks:
    """The chunks of the base at `location`; its files stay open as long as `stack`, so that all of them are
    the ones that are named. Raises `OptionError` where a layer at the target cannot stand on it."""
    blob = open_snapshot(location, opener)
    if blob is None:
        url = locations.display(location)
        raise FormatError(
            f"{url}: is not a snapshot, and only a snapshot can be a base; build one first", url=url
        )
    stack.callback(blob.close)
    if locations.has_secrets(location):
        raise OptionError(f"{blob.url}: is named with credentials, which must not be written into a layer")
    reader = SnapshotReader(blob, opener)
    stack.callback(reader.close)
    if target.is_one_of([blob, *reader.bases]):
        raise OptionError(
            f"{target.url}: is the base, or what that stands on, and cannot be replaced by a layer"
        )
    return BaseChunks(reader, target.url)


def _check_source_stays(target: Destination, source: ContainerSource, reason: str | None) -> None:
    """Refuse to replace a file by a snapshot from which it could not be had again."""
    if target.is_one_of(source.files):
        raise BuildError(
            f"{target.url}: is the source, and could not be given back byte for byte ({reason}); "
            "choose another name"
        )


def _copy(
    source: Source, writer: SnapshotWriter, progress: Progress | None
) -> tuple[dict[str, int], dict[str, Mapping[str, Any]]]:
    """Feed all items to the writer: where each array went, and the metadata that came with it."""
    offsets: dict[str, int] = {}
    metadata: dict[str, Mapping[str, Any]] = {}
    done = reported = 0
    with closing(source.items()) as items:
        for item in items:
            if item.shape is None:
                offsets[item.name] = writer.add_stream(item.name)
            else:
                offsets[item.name] = writer.add_array(
                    item.name, item.dtype, item.shape, item.order, hidden=item.hidden, phase=item.phase
                )
            if item.metadata:
                metadata[item.name] = item.metadata
            for piece in item.pieces:
                if isinstance(piece, int):
                    writer.skip(piece)
                    done += piece
                else:
                    writer.write(piece)
                    done += len(piece)
                if progress is not None and done - reported >= _PROGRESS_STEP:
                    progress(done, source.total_bytes)
                    reported = done
    for view in source.views:
        writer.add_view(view)
        if view.metadata:
            metadata[view.name] = view.metadata
    if progress is not None:
        progress(done, done)
    return offsets, metadata


def _open_source(source: BuildSource, opener: Opener) -> Source:
    if isinstance(source, Mapping):
        return ArraySource(source)
    if isinstance(source, str) and source == "-":
        if sys.stdin is None:
            raise BuildError("standard input is closed; pipe the bytes in, or name a file")
        return StreamSource(sys.stdin.buffer, file_name="data", close=False)
    if isinstance(source, (str, os.PathLike)):
        return _open_location(location_of(source, "the source"), opener)
    if hasattr(source, "read"):
        return StreamSource(cast(BinaryIO, source), file_name=file_name_of(source, "data"), close=False)
    paths = list(source) if isinstance(source, (list, tuple)) else []
    if paths and all(isinstance(path, (str, os.PathLike)) for path in paths):
        return _open_locations([location_of(path, "a source") for path in paths], opener)
    raise OptionError(
        f"the source is a {type(source).__name__}; give a mapping of names to arrays, a path or "
        "URL, a list of them, or a file object open in mode 'rb'"
    )


def _open_location(location: str, opener: Opener) -> Source:
    if _is_stream(location):
        return StreamSource(open(location, "rb"), file_name="data", close=True)
    found = recognize(location, opener, whole=True)
    if isinstance(found, Directory):
        return ContainerSource(found)
    try:
        return SnapshotSource(found, opener)
    except BaseException:
        found.close()
        raise


def _is_stream(location: str) -> bool:
    """Whether it is a pipe or a character device, such as a shell's <(command)."""
    if locations.scheme_of(location) is not None:
        return False
    try:
        mode = os.stat(location).st_mode
    except (OSError, ValueError):
        return False  # opening it says what is wrong
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _open_locations(sources: list[str], opener: Opener) -> Source:
    directories: list[Directory] = []
    try:
        for location in sources:
            if location == "-":
                raise OptionError("standard input ('-') is among several sources; build it alone")
            found = recognize(location, opener)
            if not isinstance(found, Directory):
                found.close()
                raise BuildError(f"{found.url}: is a snapshot; a snapshot can only be built from alone")
            directories.append(found)
        return ContainerSource(combine(directories))
    except BaseException:
        for directory in directories:
            directory.close()
        raise


def _created_by() -> str:
    import importlib.metadata  # slow to import, and only a build needs it

    try:
        return f"lazymem {importlib.metadata.version('lazymem')}"
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "lazymem"
