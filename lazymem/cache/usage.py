# SPDX-License-Identifier: Apache-2.0
"""How much the cache holds, counted by all processes together; and the locks for it.

A walk over a large cache takes seconds, so each process adds what it writes to a number in a small file,
before it writes: whoever is killed leaves the number too high. The next sweep mends that, since it counts
for itself; it may miss what is being written just then, which the sweep after it finds.

No lock is ever waited for. A process that was stopped (SIGSTOP, a debugger) while it held one must not
stop the others.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import xxhash

from .piece import SAFE

_FILE: Final = "usage"
_RECORD: Final = struct.Struct("<QQ")  # bytes, XXH3-64 of them
_MAX: Final = 1 << 62


@contextmanager
def try_lock(directory: int, name: str) -> Iterator[int | None]:
    """A descriptor of the file `name`, locked; None if somebody else has the lock.

    Where the filesystem has no locks everybody gets it: then the number is only about right.
    """
    fd = os.open(name, os.O_RDWR | os.O_CREAT | SAFE, 0o600, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"its {name} is not a regular file")
        busy = False
        with suppress(OSError):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy = True
        yield None if busy else fd
    finally:
        os.close(fd)  # and the lock with it


def _load(fd: int) -> int | None:
    record = os.pread(fd, _RECORD.size + 1, 0)
    if len(record) != _RECORD.size:
        return None
    total, check = _RECORD.unpack(record)
    return total if check == xxhash.xxh3_64_intdigest(record[:8]) and total < _MAX else None


def _store(fd: int, total: int) -> None:
    number = total.to_bytes(8, "little")
    os.pwrite(fd, _RECORD.pack(total, xxhash.xxh3_64_intdigest(number)), 0)
    os.ftruncate(fd, _RECORD.size)


class Usage:
    """One process's view of the number; threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending = 0  # not added yet, because somebody else had the lock
        self._last: int | None = None

    def load(self, directory: int) -> int | None:
        """The number as it stands, or None. Raises OSError."""
        with self._lock, try_lock(directory, _FILE) as fd:
            return None if fd is None else _load(fd)

    def add(self, directory: int, change: int) -> int | None:
        """Add `change` bytes; the number then, or None if nobody has counted yet. Raises OSError."""
        with self._lock, try_lock(directory, _FILE) as fd:
            self._pending += change
            if fd is not None:
                self._last = _load(fd)
                if self._last is not None:
                    self._last = max(0, self._last + self._pending)
                    self._pending = 0
                    _store(fd, self._last)
            return None if self._last is None else max(0, self._last + self._pending)

    def settle(self, directory: int, before: int | None, counted: int) -> None:
        """Replace the number, which was `before` when a sweep began, by what that sweep `counted`.

        What others added meanwhile stays on top, though the sweep may have seen some of it.
        """
        with self._lock, try_lock(directory, _FILE) as fd:
            if fd is None:
                return  # the number stays too high, so that the next write sweeps again
            now = _load(fd)
            if now is not None and before is None:
                return  # somebody else has counted meanwhile
            meanwhile = 0 if now is None or before is None else now - before
            self._last = max(0, counted + meanwhile)
            _store(fd, self._last)

    def forget(self) -> None:
        """The directory is another one now."""
        with self._lock:
            self._pending, self._last = 0, None
