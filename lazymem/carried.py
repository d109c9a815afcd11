# SPDX-License-Identifier: Apache-2.0
"""The files behind an open snapshot: those it was built from, or those of the folder it is read from.

Says which there are and where their bytes lie. Reads nothing before it is asked; whatever the name, it
leads nowhere out of the folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from .containers.base import Directory
from .containers.folder import list_files, location_in
from .errors import FormatError, OptionError, SnapshotNotFound, UnsupportedFormat
from .format.index import SnapshotIndex
from .format.origin import unsafe_name
from .store import locations
from .store.base import Blob, Opener

#: Bytes of a file that is read at once.
MAX_READ: Final = 256 << 20

#: Content range (offset, length) -> its bytes, checked.
ReadContent = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class CarriedFile:
    """A file by name, relative to its folder. size in bytes, sha256 in hexadecimal; None: not known.

    To know them of a folder read in place, each of its files would have to be opened.
    """

    name: str
    size: int | None
    sha256: str | None = None


class CarriedFiles(Protocol):
    """Names -> files of one snapshot or container."""

    def list(self) -> Mapping[str, CarriedFile]:
        """All of them. A remote folder is listed now: one request and one for each sub-folder."""

    def read(self, name: str, content: ReadContent) -> bytes:
        """The file's bytes. content: reads from the region, where they are in it."""


class OriginFiles:
    """The files that a snapshot was built from, out of its content."""

    def __init__(self, index: SnapshotIndex) -> None:
        self._index = index
        origin = index.container
        self._files = {
            file.name: (number, file) for number, file in enumerate(origin.files if origin else ())
        }

    def list(self) -> Mapping[str, CarriedFile]:
        return {name: CarriedFile(name, file.size, file.sha256) for name, (_, file) in self._files.items()}

    def read(self, name: str, content: ReadContent) -> bytes:
        index = self._index
        if name not in self._files:
            raise _no_file(index.url, name, self._files)
        number, file = self._files[name]
        if file.deflated or (index.container is not None and not index.container.exact):
            raise UnsupportedFormat(
                f"{index.url}: the file {name!r} was compressed, and its arrays are kept without; "
                "`lazymem extract` puts it together again, if it can be had byte for byte",
                url=index.url,
                field=name,
            )
        _check_size(index.url, name, file.size)
        first, last = np.searchsorted(index.extents["file"], [number, number + 1]).tolist()
        own = index.extents[first:last]
        pairs = zip(own["content_offset"].tolist(), own["length"].tolist(), strict=True)
        data = b"".join([content(offset, length) for offset, length in pairs])
        if file.sha256 is not None and hashlib.sha256(data).hexdigest() != file.sha256:
            raise FormatError(
                f"{index.url}: the file {name!r} has another SHA-256 than the one that went in; the snapshot "
                "is damaged: run `lazymem verify`, and get it again",
                url=index.url,
                field=name,
            )
        return data


class DirectoryFiles:
    """The files of a container read in place, and whatever lies in its folder if that is the model."""

    def __init__(self, url: str, directory: Directory, opener: Opener) -> None:
        self._url = url
        self._directory = directory
        self._opener = opener

    def list(self) -> Mapping[str, CarriedFile]:
        directory = self._directory
        files = {
            name: CarriedFile(name, blob.size)
            for name, blob in zip(directory.file_names, directory.files, strict=True)
        }
        for name, content in directory.extra_files.items():
            files[name] = CarriedFile(name, len(content))
        if directory.folder is not None:
            try:
                names = list_files(directory.folder, self._opener)
            except OptionError:  # http: only what was asked for by name is known
                names = []
            for name in sorted(names):
                if unsafe_name(name) is None:
                    files.setdefault(name, CarriedFile(name, None))
        return files

    def read(self, name: str, content: ReadContent) -> bytes:
        directory = self._directory
        if name in directory.extra_files:
            return directory.extra_files[name]
        if name in directory.file_names:
            return self._read(name, directory.files[list(directory.file_names).index(name)])
        if directory.folder is None or unsafe_name(name) is not None:
            raise _no_file(self._url, name, directory.file_names)
        with closing(self._opener.open(location_in(directory.folder, name, self._opener))) as blob:
            return self._read(name, blob)

    def _read(self, name: str, blob: Blob) -> bytes:
        _check_size(self._url, name, blob.size)
        return blob.read(0, blob.size)


def _check_size(url: str, name: str, size: int) -> None:
    if size > MAX_READ:
        raise UnsupportedFormat(
            f"{url}: the file {name!r} has {size} bytes, and files of up to {MAX_READ} are read at once; "
            "take its arrays, or `lazymem extract` it",
            url=url,
            field=name,
        )


def _no_file(url: str, name: str, names: object) -> SnapshotNotFound:
    known = [str(other) for other in names] if isinstance(names, (list, tuple, dict)) else []
    shown = ", ".join(repr(other) for other in known[:5]) + (", ..." if len(known) > 5 else "")
    return SnapshotNotFound(
        f"{url}: has no file {str(name)[:200]!r} (it has {shown or 'none'}); "
        "list(snapshot.files) has the names",
        url=locations.display(url),
    )
