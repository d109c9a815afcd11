# SPDX-License-Identifier: Apache-2.0
"""Walks over the whole cache: what is in it, and removing what was not used for longest.

A piece's modification time is the time of its last use. Two walks instead of a sorted list of all pieces:
there may be millions of them, and a table of minutes is small.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from . import piece

_STALE: Final = 3600.0  # seconds after which nobody is still writing a temporary file
_BUCKET: Final = 60.0


@dataclass(slots=True)
class Census:
    """What a walk found. last_use: bytes by minute."""

    objects: int = 0
    pieces: int = 0
    bytes: int = 0
    temporaries: int = 0
    oldest: float | None = None
    newest: float | None = None
    last_use: dict[int, int] = field(default_factory=dict)

    def add(self, info: os.stat_result) -> None:
        size = piece.disk_usage(info.st_size)
        self.pieces += 1
        self.bytes += size
        self.oldest = info.st_mtime if self.oldest is None else min(self.oldest, info.st_mtime)
        self.newest = info.st_mtime if self.newest is None else max(self.newest, info.st_mtime)
        minute = int(info.st_mtime // _BUCKET)
        self.last_use[minute] = self.last_use.get(minute, 0) + size


@dataclass(slots=True)
class Removed:
    files: int = 0
    bytes: int = 0


def _objects(directory: int) -> Iterator[tuple[str, int]]:
    """Name and descriptor of every object's directory; a descriptor is good until the next one comes."""
    # A descriptor of its own: a duplicate would share its position with another thread's walk.
    listing = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        keys = [name for name in os.listdir(listing) if piece.is_key(name)]
    finally:
        os.close(listing)
    for key in keys:
        try:
            fd = os.open(key, os.O_RDONLY | os.O_DIRECTORY | piece.SAFE, dir_fd=directory)
        except OSError:  # removed meanwhile, or not a directory
            continue
        try:
            yield key, fd
        finally:
            os.close(fd)


def _files(fd: int) -> Iterator[tuple[str, os.stat_result]]:
    """Name and stat of every file of ours in an object's directory."""
    with os.scandir(fd) as entries:
        for entry in entries:
            if piece.is_piece(entry.name) or piece.is_temporary(entry.name):
                with suppress(FileNotFoundError):
                    yield entry.name, entry.stat(follow_symlinks=False)


def _unlink(fd: int, name: str) -> bool:
    try:
        os.unlink(name, dir_fd=fd)
    except OSError:  # somebody else was first, or it is a directory that was planted
        return False
    return True


def count(directory: int) -> Census:
    """What is in the cache; changes nothing."""
    census = Census()
    for _, fd in _objects(directory):
        census.objects += 1
        for name, info in _files(fd):
            if piece.is_temporary(name):
                census.temporaries += 1
            elif stat.S_ISREG(info.st_mode):
                census.add(info)
    return census


def clean(directory: int, limit: int, *, all_temporaries: bool = False) -> tuple[Census, Removed]:
    """Remove what is unfit, then the longest unused pieces until at most `limit` bytes are left.

    all_temporaries: those of writers at work too. Returns what is left and what went.
    """
    census, removed = Census(), Removed()
    now = time.time()
    for key, fd in _objects(directory):
        left = False
        for name, info in _files(fd):
            if piece.is_temporary(name):
                unfit = all_temporaries or abs(now - info.st_mtime) > _STALE
            else:
                unfit = not stat.S_ISREG(info.st_mode)
            if unfit and _unlink(fd, name):
                removed.files += 1
                removed.bytes += piece.disk_usage(info.st_size)
            elif piece.is_temporary(name):
                left = True
                census.temporaries += 1
            else:
                left = True
                census.add(info)
        census.objects += _keep(directory, key, left)
    if census.bytes > limit:
        _remove_oldest(directory, census, removed, limit)
    return census, removed


def _keep(directory: int, key: str, left: bool) -> bool:
    """Remove an object's directory if nothing is left in it; whether it stays."""
    if not left:
        with suppress(OSError):  # a writer has put something there just now
            os.rmdir(key, dir_fd=directory)
            return False
    return True


def _remove_oldest(directory: int, census: Census, removed: Removed, limit: int) -> None:
    excess = census.bytes - limit
    last, before = 0, 0  # everything used before minute `last` goes, and of that minute what is missing still
    for last in sorted(census.last_use):
        if before + census.last_use[last] >= excess:
            break
        before += census.last_use[last]
    part = excess - before
    for key, fd in _objects(directory):
        left = False
        for name, info in _files(fd):
            minute = int(info.st_mtime // _BUCKET)
            goes = piece.is_piece(name) and (minute < last or (minute == last and part > 0))
            if not goes or not _unlink(fd, name):
                left = True
                continue
            size = piece.disk_usage(info.st_size)
            if minute == last:
                part -= size
            removed.files += 1
            removed.bytes += size
            census.pieces -= 1
            census.bytes -= size
        if not _keep(directory, key, left):
            census.objects -= 1
