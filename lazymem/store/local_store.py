# SPDX-License-Identifier: Apache-2.0
"""Local files behind the contract of a store. What is local is mostly read through `LocalBlob` directly."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager

from ..errors import AccessDenied, ReadError, SnapshotNotFound
from . import locations
from .base import Attempt, Opened, Reader, Writer
from .checks import changed, check_asked, deliver
from .local import AtomicFile, LocalBlob


class LocalStore:
    """Implements `store.base.Store` over paths and file:// URLs."""

    def reader(self, url: str) -> Reader:
        return LocalReader(locations.local_path(url))

    def writer(self, url: str, *, overwrite: bool = True) -> AbstractContextManager[Writer]:
        return AtomicFile(locations.local_path(url), overwrite)

    def list(self, url: str) -> Iterator[str]:
        path = locations.local_path(url)
        try:
            with os.scandir(path) as entries:
                names = [entry.name + "/" if entry.is_dir() else entry.name for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            raise SnapshotNotFound(f"{path}: there is no such folder; check the path", url=path) from None
        except PermissionError:
            raise AccessDenied(f"{path}: may not be listed with your rights", url=path) from None
        except OSError as error:
            raise ReadError(f"{path}: cannot be listed ({error.strerror})", url=path) from error
        return iter(sorted(names))

    def __repr__(self) -> str:
        return "LocalStore()"


class LocalReader:
    """Implements `store.base.Reader`. Keeps no descriptor: a replaced file is noticed like an object."""

    client = "local"

    def __init__(self, path: str) -> None:
        self._path = path

    @property
    def url(self) -> str:
        return self._path

    def open(self, tail: int, *, timeout: float, attempt: Attempt | None = None) -> Opened:
        with LocalBlob(self._path) as blob:
            length = min(tail, blob.size)
            return Opened(blob.size, blob.identity, blob.read(blob.size - length, length))

    def read_into(
        self, offset: int, out: memoryview, opened: Opened, attempt: Attempt, *, timeout: float
    ) -> None:
        check_asked(self._path, offset, len(out), opened)
        with LocalBlob(self._path) as blob:
            data = blob.read(offset, len(out)) if blob.identity == opened.identity else b""
            if blob.identity != opened.identity or blob.has_changed():
                raise changed(self._path, "another file has its name, or it was written to")
        deliver(self._path, data, out, attempt)

    def close(self) -> None:
        """Nothing is kept."""

    def __repr__(self) -> str:
        return f"LocalReader({self._path!r})"
