# SPDX-License-Identifier: Apache-2.0
"""Where a location leads: a path to the local store, a URL to the fetcher."""

from __future__ import annotations

import os
import re
from typing import Final

from .errors import OptionError
from .options import StoreOptions
from .store import locations
from .store.base import Blob, Entries
from .store.local import LocalBlob

#: Hugging Face's cache: files of snapshots/REVISION are links to blobs/HASH, both in one models--NAME
#: (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
_CACHED_MODEL: Final = re.compile(r"(.*/models--[^/]+)/snapshots/[^/]+(/|$)", re.DOTALL)


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

    def entries(self, folder: str) -> Entries:
        if locations.scheme_of(folder) is not None:
            from .store.remote import store_for

            return Entries(list(store_for(folder, self.options).list(folder)), [])
        names, others = [], []
        with os.scandir(locations.local_path(folder)) as found:
            for entry in found:
                # A link to a folder could lead anywhere, round in circles too; files of a cache are links.
                if entry.is_dir(follow_symlinks=False):
                    names.append(entry.name + "/")
                elif _is_file(entry):
                    names.append(entry.name)
                else:
                    others.append(entry.name)
        return Entries(sorted(names), sorted(others))

    def leads_out(self, location: str, folder: str) -> bool:
        if locations.scheme_of(location) is not None:
            return False
        path, root = locations.local_path(location), os.path.realpath(locations.local_path(folder))
        if not os.path.islink(path):
            return False
        allowed = [root]
        if cached := _CACHED_MODEL.match(root):
            allowed.append(cached[1] + "/blobs")
        target = os.path.realpath(path)
        return not any(target.startswith(part.rstrip("/") + "/") for part in allowed)

    def join(self, folder: str, name: str) -> str:
        return locations.join(folder, name)

    def parent(self, location: str) -> str:
        return locations.parent(location)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself, or into a folder that may not be entered
        return False


def location_of(source: str | os.PathLike[str], what: str = "source") -> str:
    """A path or URL as text. Raises `OptionError` for anything else."""
    location = os.fspath(source) if isinstance(source, (str, os.PathLike)) else source
    if not isinstance(location, str):
        raise OptionError(f"{what} is {location!r}; it must be a str or a path of one")
    return location
