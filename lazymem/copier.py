# SPDX-License-Identifier: Apache-2.0
"""`copy`: one file or object from any store to any other, byte for byte, without decompressing.

Reads ahead in parallel, writes in order, in bounded memory. The stored bytes of a snapshot are held against
their checksums as they pass, so that damage is not carried on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from .destination import Destination
from .errors import FormatError, OptionError, SnapshotChanged
from .format.index import SnapshotIndex
from .format.layers import resolve
from .format.reader import SnapshotReader, has_magic
from .opener import LocationOpener, location_of
from .options import StoreOptions
from .store import locations
from .store.ahead import PIECE, AheadBlob
from .store.base import Blob

StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What `copy` did. size: bytes. checked: stored chunks that match their checksum; None: no snapshot,
    or not asked for. bases: what a layer needs where the copy lies, as it names them; not copied."""

    source: str
    destination: str
    size: int
    checked: int | None
    seconds: float
    bases: tuple[str, ...] = ()


def copy(
    source: StrPath,
    destination: StrPath,
    *,
    overwrite: bool | None = None,
    verify: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    destination_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> CopyReport:
    """Copy one file or object, of whatever format, between stores or within one.

    source, destination: paths or URLs. A destination that is a folder gets a file of the source's name.
    overwrite: whether to replace an existing destination: None, if it is a snapshot or empty; True,
        anything; False, nothing (in object stores: If-None-Match).
    verify: hold every stored chunk of a snapshot against its checksum.
    storage_options: how stores are reached, as for `open`. destination_options: the same for the
        destination, if that needs others.
    progress: called with (bytes done, bytes in all).

    Blocks. Needs some 100 MiB for each end that is remote, whatever the size. The destination appears,
    synced or uploaded in full, when everything is written; else nothing of it is left. Raises `BuildError`,
    `AccessDenied`, `OptionError`, `SnapshotNotFound`, `SnapshotChanged`, `ReadError`, and for a damaged
    snapshot `FormatError` or `ChunkCorrupt`.

    Of a layer only the layer itself is copied (and its own chunks checked): it needs its base under the same
    name there. One whose base cannot be named from there, because it lies in another store, is refused
    (`OptionError`); `build` makes a whole snapshot of it. With verify=False nothing of this is looked at.
    """
    started = time.monotonic()
    location, target_location = location_of(source), location_of(destination, "the destination")
    options = StoreOptions.from_environment(storage_options, cache=False)
    target_options = options
    if destination_options is not None:
        target_options = StoreOptions.from_environment(destination_options, cache=False)
    opener = LocationOpener(options)
    url = locations.display(location)
    if location == "-":
        raise OptionError("the source is '-', but one file is copied; `lazymem build` takes standard input")
    if opener.is_folder(location):
        raise OptionError(f"{url}: is a folder, and one file is copied at a time; name it")
    if opener.is_folder(target_location):
        target_location = opener.join(target_location, locations.name_of(location))
    target = Destination(target_location, target_options, overwrite)
    with ExitStack() as stack:
        blob = opener.open(location)
        stack.callback(blob.close)
        if target_options == options and target.is_one_of([blob]):
            raise OptionError(f"{url}: is the source and the destination; there is nothing to copy")
        target.check_replaced()
        reader = SnapshotReader(blob) if verify and has_magic(blob) else None
        bases = () if reader is None else _bases_from(target.url, reader.index)
        file = stack.enter_context(target.writer()).file
        ahead: Blob = blob
        if blob.fileno() is None:
            ahead = stack.enter_context(AheadBlob(blob, [(0, blob.size)]))
        for offset, length, records in _steps(blob.size, None if reader is None else reader.index):
            data = ahead.read(offset, length)
            for record in records:
                assert reader is not None
                reader.check_stored(record, data)
            file.write(data)
            if progress is not None:
                progress(offset + length, blob.size)
        if blob.has_changed():
            raise SnapshotChanged(f"{url}: was changed while it was copied; copy it again", url=url)
        target.check_replaced()
    checked = None if reader is None else int((reader.index.records["source"] == 0).sum())
    return CopyReport(url, target.url, blob.size, checked, time.monotonic() - started, bases)


def _bases_from(target: str, index: SnapshotIndex) -> tuple[str, ...]:
    """What a layer needs at its new place, as it names it. Raises `OptionError` where that cannot work."""
    for base in index.sources:
        try:
            resolve(target, base)
        except FormatError as error:
            raise OptionError(
                f"{index.url}: is a layer, and its base {base.url!r} cannot be used from {target}, "
                "another store: `lazymem build` makes a whole snapshot of it there"
            ) from error
    return tuple(base.url for base in index.sources)


def _steps(size: int, index: SnapshotIndex | None) -> Iterator[tuple[int, int, list[int]]]:
    """The file front to back: (offset, length, records whose stored bytes these are)."""
    position = 0
    if index is not None:
        offsets, lengths = index.records["offset"], index.records["stored_length"]
        own = np.flatnonzero(index.records["source"] == 0)
        order = own[np.argsort(offsets[own], kind="stable")].tolist()
        # Records may share their bytes (FORMAT.md, *Chunks*); else they lie apart.
        for offset, group in groupby(order, key=lambda record: int(offsets[record])):
            records = list(group)
            length = int(lengths[records[0]])
            yield from _plain(position, offset)
            yield offset, length, records
            position = offset + length
    yield from _plain(position, size)


def _plain(begin: int, end: int) -> Iterator[tuple[int, int, list[int]]]:
    for offset in range(begin, end, PIECE):
        yield offset, min(PIECE, end - offset), []
