# SPDX-License-Identifier: Apache-2.0
"""A file name as a snapshot: the one place where this package opens something."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Final

from .. import snapshot as snapshots
from ..errors import BackendUnavailable, SnapshotNotFound
from ..options import OpenOptions
from ..snapshot import Snapshot
from . import arguments
from .errors import both_kinds

#: safetensors' metadata in a snapshot or index may have values that its own files cannot: numbers, objects.
Metadata = dict[str, str] | None

#: Lists that get the URL of each file as it is opened: see `installation`.
watchers: list[list[str]] = []

#: Ways to fill memory that do not map the file, the best first.
_WITHOUT_MAPPING: Final = ("uffd", "uffd-user", "sigsegv", "eager")


def open_weights(
    filename: str | os.PathLike[str],
    backend: str,
    storage_options: Mapping[str, Any] | None,
    cache: str | os.PathLike[str] | bool | None,
) -> Snapshot:
    """Open a file, folder, index or URL copy-on-write.

    backend "mmap": as `lazymem.open` chooses: a plain local file is mapped. "pread": never mapped, read
    chunk by chunk when touched (as a network mount needs it); where userfaultfd is not to be had, at once.
    Raises as `lazymem.open`; what safetensors would raise `SafetensorError` for is one.
    """
    keywords: dict[str, Any] = {"mode": "c", "storage_options": storage_options, "cache": cache}
    with both_kinds(filename):
        if "\0" in os.fspath(filename):
            raise SnapshotNotFound("no path has a NUL in it", url=os.fspath(filename))
        # What the environment asks for goes before what the name of a backend implies.
        if backend == arguments.PREAD and OpenOptions.from_environment(mode="c").backend == "auto":
            snapshot = _open_unmapped(filename, keywords)
        else:
            snapshot = snapshots.open(filename, **keywords)
        if snapshot.format == "raw":
            # Not recognized as anything: say what is wrong with it as the file it should be.
            snapshot.close()
            snapshot = snapshots.open(filename, as_format="safetensors", **keywords)
        for opened in watchers:
            opened.append(snapshot.url)
        return snapshot


def _open_unmapped(filename: str | os.PathLike[str], keywords: dict[str, Any]) -> Snapshot:
    for way in _WITHOUT_MAPPING[:-1]:
        try:
            return snapshots.open(filename, backend=way, **keywords)
        except BackendUnavailable:
            continue
    return snapshots.open(filename, backend=_WITHOUT_MAPPING[-1], **keywords)


def metadata_of(snapshot: Snapshot) -> Metadata:
    """The file's own metadata, strings all; None if there is none."""
    found = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in snapshot.metadata.items()
    }
    return found or None
