# SPDX-License-Identifier: Apache-2.0
"""What a location holds: a snapshot, or some container. Opens it once, whatever it turns out to be."""

from __future__ import annotations

from .containers.base import Directory, read_head
from .containers.detect import is_sharded, open_container, read_container
from .format.reader import has_head_magic, has_tail_magic, refuse_suffix
from .store.base import Blob, Opener


def recognize(
    location: str, opener: Opener, *, as_format: str | None = None, whole: bool = False
) -> Blob | Directory:
    """The blob of a snapshot, or the directory of anything else; the caller closes it.

    as_format: take it for that container instead of finding out. whole: of a folder, open all files that
    belong to the model. A remote snapshot costs one request here,
    a container two: its last bytes, which come with opening, and its first, which all that look share.
    Raises `SnapshotNotFound`, `AccessDenied`, `FormatError`, `UnsupportedFormat`, `ReadError`,
    `OptionError`.
    """
    if as_format is not None or is_sharded(location, opener):
        return open_container(location, opener, as_format=as_format, whole=whole)
    blob = opener.open(location)
    try:
        if has_tail_magic(blob):
            return blob
        head = read_head(blob)
        if has_head_magic(head):
            return blob
        refuse_suffix(blob)
        return read_container(blob, head)
    except BaseException:
        blob.close()
        raise
