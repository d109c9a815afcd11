# SPDX-License-Identifier: Apache-2.0
"""Openers for tests of what takes one: the real one, and one whose files look like remote objects."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from lazymem.containers import detect
from lazymem.containers.base import Directory
from lazymem.errors import SnapshotNotFound
from lazymem.opener import LocationOpener
from lazymem.options import StoreOptions
from lazymem.store import locations
from lazymem.store.base import Blob, Entries

#: What a remote blob fetches when it is opened.
TAIL = 64 << 10


def local() -> LocationOpener:
    return LocationOpener(StoreOptions())


def open_container(path: str | os.PathLike[str], *, as_format: str | None = None) -> Directory:
    return detect.open_container(os.fspath(path), local(), as_format=as_format)


class FakeRemote:
    """Blob and request counter: as a remote object is, its last bytes come with the first request."""

    def __init__(self, opener: FakeOpener, url: str, data: bytes) -> None:
        self._opener = opener
        self._data = data
        self.url = url
        self.size = len(data)
        self.identity = f'"{len(data)}"'
        self.closed = False
        opener.requested(url, max(0, self.size - TAIL), min(self.size, TAIL))

    def read(self, offset: int, length: int) -> bytes:
        assert not self.closed
        assert 0 <= offset <= offset + length <= self.size
        if length and offset < self.size - TAIL:
            self._opener.requested(self.url, offset, length)
        return self._data[offset : offset + length]

    def read_into(self, offset: int, out: memoryview) -> None:
        out[:] = self.read(offset, len(out))

    def has_changed(self) -> bool:
        return False

    def fileno(self) -> None:
        return None

    def close(self) -> None:
        self.closed = True


class FakeOpener:
    """The files of `folder` under URLs mem://<path>. requests: (name, offset, length) of each."""

    def __init__(self, folder: Path, *, lists: bool = True) -> None:
        self._folder = folder
        self._lists = lists
        self._lock = threading.Lock()
        self.requests: list[tuple[str, int, int]] = []
        self.blobs: list[FakeRemote] = []
        self.listed = 0

    def url(self, name: str) -> str:
        return f"mem://{name}"

    def requested(self, url: str, offset: int, length: int) -> None:
        with self._lock:
            self.requests.append((url.removeprefix("mem://"), offset, length))

    def open(self, location: str) -> Blob:
        path = self._folder / location.removeprefix("mem://")
        if not path.is_file():
            raise SnapshotNotFound(f"{location}: there is no such object", url=location)
        blob = FakeRemote(self, location, path.read_bytes())
        with self._lock:
            self.blobs.append(blob)
        return blob

    def is_folder(self, location: str) -> bool:
        return location.endswith("/")

    def entries(self, folder: str) -> Entries:
        assert self._lists, "nothing was to be listed"
        self.listed += 1
        path = self._folder / folder.removeprefix("mem://")
        return Entries(sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir()), [])

    def leads_out(self, location: str, folder: str) -> bool:
        return False

    def join(self, folder: str, name: str) -> str:
        return locations.join(folder, name)

    def parent(self, location: str) -> str:
        return locations.parent(location)
