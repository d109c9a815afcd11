# SPDX-License-Identifier: Apache-2.0
"""Where a location leads: a path to the local store, a URL to the fetcher."""

from __future__ import annotations

import os

from .errors import OptionError
from .options import StoreOptions
from .store import locations
from .store.base import Blob
from .store.local import LocalBlob


class LocationOpener:
    """Implements `store.base.Opener`: paths are opened here, URLs by the fetcher."""

    def __init__(self, options: StoreOptions) -> None:
        self.options = options

    def open(self, location: str) -> Blob:
        if locations.scheme_of(location) is None:
            return LocalBlob(locations.local_path(location))
        from .fetcher.client import RemoteBlob  # local work never loads it

        return RemoteBlob(location, self.options)

    def is_folder(self, location: str) -> bool:
        if locations.scheme_of(location) is None:
            return os.path.isdir(locations.local_path(location))
        return location.endswith("/")

    def entries(self, folder: str) -> list[str]:
        if locations.scheme_of(folder) is None:
            with os.scandir(locations.local_path(folder)) as found:
                # A link to a folder could lead anywhere, round in circles too; files of a cache are links.
                return sorted(
                    entry.name + ("/" if entry.is_dir() else "")
                    for entry in found
                    if entry.is_dir(follow_symlinks=False) or entry.is_file()
                )
        from .store.remote import store_for

        return list(store_for(folder, self.options).list(folder))

    def join(self, folder: str, name: str) -> str:
        return locations.join(folder, name)

    def parent(self, location: str) -> str:
        return locations.parent(location)


def location_of(source: str | os.PathLike[str], what: str = "source") -> str:
    """A path or URL as text. Raises `OptionError` for anything else."""
    location = os.fspath(source) if isinstance(source, (str, os.PathLike)) else source
    if not isinstance(location, str):
        raise OptionError(f"{what} is {location!r}; it must be a str or a path of one")
    return location
