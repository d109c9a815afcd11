# SPDX-License-Identifier: Apache-2.0
"""The cache's directory: found or made, and fit to be believed.

A piece's checksum finds damage, not malice: whoever can write into the directory can put bytes there that
we would show as the snapshot's. So all files lie in a sub-directory, `v1`, that only we or root can write
to, and are reached through a descriptor of it, whose owner and mode were looked at: nobody who owns a
directory further up can put another in its place.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import Final

from ..errors import OptionError

_LAYOUT: Final = "v1"
_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

_KEEP_FREE_PARTS: Final = 20
_KEEP_FREE_MOST: Final = 4 << 30


def _unfit(path: str, found: str, advice: str) -> OptionError:
    return OptionError(f"the cache directory {path} {found}; {advice}, or choose another directory")


def _check(fd: int, path: str, *, shared: bool) -> None:
    """Refuse a directory that somebody else could write to."""
    info = os.fstat(fd)
    if info.st_uid not in (os.geteuid(), 0):
        raise _unfit(path, f"belongs to another user (id {info.st_uid})", "make it yours (chown)")
    # In a sticky directory such as /tmp others can add names, but not replace ours.
    harmless = shared and info.st_mode & stat.S_ISVTX
    if info.st_mode & 0o022 and not harmless:
        mode = stat.S_IMODE(info.st_mode)
        raise _unfit(path, f"may be written to by others (mode {mode:o})", f"`chmod go-w {path}`")


def open_directory(path: str, *, create: bool) -> int | None:
    """A descriptor of the directory that holds the objects; None if it is not there and not to be made.

    Raises `OptionError` if it is not fit, OSError if it cannot be made.
    """
    if create:
        os.makedirs(path, mode=0o700, exist_ok=True)
    try:
        outer = os.open(path, _FLAGS)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise _unfit(path, "is not a directory", "remove it") from None
    try:
        _check(outer, path, shared=True)
        if create:
            with suppress(FileExistsError):
                os.mkdir(_LAYOUT, 0o700, dir_fd=outer)
        inner_path = os.path.join(path, _LAYOUT)
        try:
            inner = os.open(_LAYOUT, _FLAGS | os.O_NOFOLLOW, dir_fd=outer)
        except FileNotFoundError:
            return None
        except NotADirectoryError:  # also for a symbolic link
            raise _unfit(inner_path, "is not a directory", "remove it") from None
        try:
            _check(inner, inner_path, shared=False)
        except OptionError:
            os.close(inner)
            raise
        return inner
    finally:
        os.close(outer)


def spare_bytes(fd: int) -> int:
    """How much may still be written: a twentieth of the filesystem, at most 4 GiB, is left to others."""
    space = os.statvfs(fd)
    keep = min(_KEEP_FREE_MOST, space.f_blocks * space.f_frsize // _KEEP_FREE_PARTS)
    return space.f_bavail * space.f_frsize - keep
