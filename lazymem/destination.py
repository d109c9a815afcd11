# SPDX-License-Identifier: Apache-2.0
"""Where `build` and `copy` write: a path or a URL, whole or not at all, and never over somebody's data."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import AbstractContextManager, closing
from urllib.parse import urlsplit

from .errors import AccessDenied, BuildError, OptionError, SnapshotNotFound
from .format.reader import has_magic
from .opener import LocationOpener
from .options import StoreOptions
from .store import locations
from .store.base import Blob, Writer
from .store.local import AtomicFile, LocalBlob


class Destination:
    """A file or an object to be written.

    overwrite: whether to replace what is there: None, if it is a snapshot or empty; True, anything; False,
    nothing, also if it came to exist meanwhile. Raises `OptionError` for what cannot be one, `BuildError`
    for a store that is read-only, such as http. Nothing is sent yet.
    """

    def __init__(self, location: str, options: StoreOptions, overwrite: bool | None) -> None:
        if location == "-":
            raise OptionError("the destination is '-', but it is always a file; name one (`./-`, say)")
        self._remote = locations.scheme_of(location) is not None
        self._location = location if self._remote else locations.local_path(location)
        self._options = options
        self._overwrite = overwrite
        self._upload: AbstractContextManager[Writer] | None = None
        if self._remote:
            if location.endswith("/"):
                raise OptionError(f"{self.url}: is a folder; give the name of an object in it")
            from .store.remote import store_for  # local work never loads it

            self._upload = store_for(location, options).writer(location, overwrite=overwrite is not False)

    @property
    def url(self) -> str:
        """As the user would write it; free of secrets."""
        return locations.display(self._location)

    def writer(self) -> AbstractContextManager[Writer]:
        """What is written in its block appears, whole, when the block ends without an exception. Once.

        Raises `BuildError`, `AccessDenied`, `OptionError`.
        """
        return self._upload or AtomicFile(self._location, self._overwrite is not False)

    def check_replaced(self) -> None:
        """Raise `BuildError` if it is somebody's data, unless the caller said what to do with that.

        To be asked before the work, to spare it, and after it: hours may have passed.
        """
        if self._overwrite is not None:
            return
        blob = self._open()
        if blob is None:
            return
        with closing(blob):
            if blob.size and not has_magic(blob):
                raise BuildError(
                    f"{self.url}: exists and is not a snapshot; choose another name, or pass overwrite=True "
                    "(--overwrite) to replace it"
                )

    def _open(self) -> Blob | None:
        """What is there now; None: nothing to lose, or nothing that `writer` would not refuse."""
        if not self._remote:
            return LocalBlob(self._location) if self._stat() is not None else None
        try:
            return LocationOpener(self._options).open(self._location)
        except SnapshotNotFound:
            return None
        except AccessDenied as error:
            raise AccessDenied(
                f"{self.url}: may not be read with your rights, so nobody can tell what would be replaced; "
                "pass overwrite=False (--if-none-match) to write only if nothing is there, or overwrite=True "
                "(--overwrite)",
                url=self.url,
            ) from error

    def _stat(self) -> os.stat_result | None:
        try:
            info = os.stat(self._location)
        except (OSError, ValueError):
            return None
        return info if stat.S_ISREG(info.st_mode) else None

    def is_one_of(self, blobs: Iterable[Blob]) -> bool:
        """Whether it is the file or object that one of `blobs`, opened with the same options, reads."""
        if self._remote:
            own = _comparable(self.url)
            return any(_comparable(blob.url) == own for blob in blobs if locations.scheme_of(blob.url))
        info = self._stat()
        fds = [blob.fileno() for blob in blobs]
        return info is not None and any(fd is not None and os.path.samestat(os.fstat(fd), info) for fd in fds)


def _comparable(url: str) -> tuple[str, ...]:
    """One spelling of a URL: schemes and hosts have no case, and a port may go without saying."""
    scheme = locations.scheme_of(url) or ""
    if scheme not in ("http", "https"):
        return scheme, url.partition("://")[2]
    parts = urlsplit(url)
    return scheme, parts.hostname or "", str(parts.port or {"http": 80, "https": 443}[scheme]), parts.path
