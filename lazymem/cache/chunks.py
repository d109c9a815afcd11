# SPDX-License-Identifier: Apache-2.0
"""`ChunkCache`: pieces of objects in files, shared by processes, bounded in size.

    <directory>/v1/<key of an object>/<offset>-<length>      one piece (piece.py)
    <directory>/v1/usage, prune.lock                         (usage.py)

A piece is written under a temporary name and renamed, so that another process sees all of it or nothing;
it is never changed afterwards. Nothing is synced: what a power cut tears, the checksum finds.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final, TypeVar

from ..errors import OptionError
from . import piece, sweep
from .directory import open_directory, spare_bytes
from .usage import Usage, try_lock

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")

_log = logging.getLogger("lazymem.cache")

_PRUNE_LOCK: Final = "prune.lock"
_FRESH: Final = 3600.0  # seconds; a use is noted at most once in these: each note is a write to the disk
_ADVICE: Final = "go on without it, make room (`lazymem cache prune`), or choose another directory"


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """What is in a cache. bytes: on the disk; oldest, newest: last use of a piece, in Unix time."""

    directory: str
    objects: int
    pieces: int
    bytes: int
    max_bytes: int
    oldest: float | None
    newest: float | None
    temporaries: int


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a prune removed, and what is left."""

    directory: str
    removed: int
    removed_bytes: int
    pieces: int
    bytes: int


@dataclass(frozen=True, slots=True)
class CacheCounters:
    """What one `ChunkCache` did so far.

    damaged: files found that were not what they should be, and removed. skipped: pieces not kept for lack
    of room. failed: reads and writes that the system refused.
    """

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    written: int = 0
    skipped: int = 0
    failed: int = 0


class ChunkCache:
    """Pieces of objects on the disk. Threads may share it, and any number of processes the directory.

    directory: made at the first write; raises `OptionError` if somebody else may write to it.
    max_bytes: what all pieces together may take; the longest unused ones make room for new ones.
    """

    def __init__(self, directory: str, max_bytes: int) -> None:
        self._fd: int | None = None  # so that __del__ works if the rest fails
        self.directory = os.path.abspath(directory)
        self.max_bytes = max_bytes
        self._usage = Usage()
        self._lock = threading.Lock()
        self._counts = dict.fromkeys((one.name for one in fields(CacheCounters)), 0)
        self._warned: set[str] = set()
        try:
            self._fd = open_directory(self.directory, create=False)
        except OptionError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
            reason = error.strerror if isinstance(error, OSError) else error
            raise OptionError(
                f"the cache directory {self.directory} cannot be opened ({reason}); choose another directory"
            ) from error

    @staticmethod
    def object_key(url: str, identity: str, size: int) -> str:
        """The name of one version of one object; url: what names it among all stores and endpoints."""
        parts = (url.encode(errors="surrogateescape"), identity.encode(errors="surrogateescape"))
        text = b"".join(b"%d:%b" % (len(part), part) for part in parts) + b"%d" % size
        return hashlib.blake2b(text, digest_size=piece.KEY_SIZE).hexdigest()

    def read_into(self, key: str, offset: int, out: memoryview) -> bool:
        """Fill `out` with the piece of just that offset and length.

        True only if all of it is there and matches its checksum. Otherwise `out` may hold anything. Never
        raises for what it finds on the disk, never waits for anything but the disk.
        """
        out = out.cast("B")
        directory = self._find()
        if directory is None or not len(out):
            self._count("misses")
            return False
        path = f"{key}/{piece.name_of(offset, len(out))}"
        try:
            fd = os.open(path, os.O_RDONLY | piece.SAFE, dir_fd=directory)
        except FileNotFoundError:
            self._count("misses")
            return False
        except OSError:  # too many open files; or a symbolic link, a socket
            self._count("misses", "failed")
            self._remove_unfit(directory, path)
            return False
        good = False
        try:
            info = os.fstat(fd)
            good = piece.is_whole_file(info, len(out)) and piece.read(fd, key, offset, out)
            if good and abs(time.time() - info.st_mtime) > _FRESH:
                with suppress(OSError):  # a read-only filesystem; or the file is root's
                    os.utime(fd)
        except OSError:
            self._count("failed")
        finally:
            os.close(fd)
        if good:
            self._count("hits")
        else:
            self._count("misses", "damaged")
            self._unlink(directory, path, piece.HEADER_SIZE + len(out))
        return good

    def write(self, key: str, offset: int, data: Buffer) -> None:
        """Keep a piece, in place of what was kept for it. Never raises for trouble with the disk.

        Now and then it makes room first, which takes as long as a walk over the whole cache.
        """
        view = memoryview(data).cast("B")
        if not len(view):
            return
        header = piece.make_header(key, offset, len(view), digest := piece.digest_of(view))
        name = piece.name_of(offset, len(view))
        try:
            for last in (False, True):
                try:
                    directory = self._open(again=last)
                    if not self._has(directory, key, offset, len(view), digest):
                        self._write(directory, key, name, header, view)
                    return
                except FileNotFoundError:
                    # The directory was removed while we had it open: make it again, once.
                    if last:
                        raise
        except OSError as error:
            self._count("failed")
            self._warn(error.strerror or str(error))
        except OptionError as error:
            self._count("failed")
            self._warn(str(error), whole=True)

    def discard(self, key: str, offset: int, length: int) -> None:
        """Forget a piece, if it is there: its bytes were found to be wrong."""
        directory = self._find()
        if directory is not None:
            path = f"{key}/{piece.name_of(offset, length)}"
            self._unlink(directory, path, piece.HEADER_SIZE + length)

    def info(self) -> CacheInfo:
        """Walk over the cache and say what is in it. Raises OSError, `OptionError`."""
        census = self._visit(sweep.count) or sweep.Census()
        return CacheInfo(
            self.directory, census.objects, census.pieces, census.bytes, self.max_bytes,
            census.oldest, census.newest, census.temporaries,
        )  # fmt: skip

    def prune(self, max_bytes: int | None = None) -> PruneReport:
        """Remove temporary files that were left behind, and pieces until `max_bytes` are left; 0: all.

        Default: the cache's own limit. Processes that use the cache meanwhile just miss. Raises OSError,
        `OptionError`.
        """
        limit = self.max_bytes if max_bytes is None else max_bytes
        if limit < 0:
            raise OptionError(f"max_bytes is {limit}; it must be 0 or more")
        found = self._visit(lambda fd: self._clean(fd, limit, all_temporaries=limit == 0))
        census, removed = found or (sweep.Census(), sweep.Removed())
        return PruneReport(self.directory, removed.files, removed.bytes, census.pieces, census.bytes)

    def counters(self) -> CacheCounters:
        """What this object did so far."""
        with self._lock:
            return CacheCounters(**self._counts)

    def close(self, _close: Callable[[int], None] = os.close) -> None:
        """Idempotent. No other call may be at work."""
        fd, self._fd = self._fd, None
        if fd is not None:
            _close(fd)

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ChunkCache({self.directory!r}, {self.max_bytes})"

    def _visit(self, work: Callable[[int], T]) -> T | None:
        """`work` on the directory that is there now; None if there is none, or it is removed meanwhile."""
        fd = open_directory(self.directory, create=False)
        if fd is None:
            return None
        try:
            return work(fd)
        except FileNotFoundError:
            return None
        finally:
            os.close(fd)

    def _find(self) -> int | None:
        """The directory, also if another process has made it only by now; never raises."""
        if self._fd is not None:
            return self._fd
        with self._lock, suppress(OSError, OptionError):
            if self._fd is None:
                self._fd = open_directory(self.directory, create=False)
        return self._fd

    def _open(self, *, again: bool) -> int:
        """The directory, made if need be; again: not the one that is open. Raises OSError, `OptionError`."""
        with self._lock:
            if self._fd is None or again:
                fd = open_directory(self.directory, create=True)
                if fd is None:
                    raise FileNotFoundError("it was removed while it was made")
                if self._fd is None:
                    self._fd = fd
                else:
                    # The number stays: other threads may be about to use it.
                    os.dup2(fd, self._fd, inheritable=False)
                    os.close(fd)
                    self._usage.forget()
            return self._fd

    def _has(self, directory: int, key: str, offset: int, length: int, digest: int) -> bool:
        """Whether just these bytes are kept already: another process that wanted them was faster."""
        path = f"{key}/{piece.name_of(offset, length)}"
        try:
            fd = os.open(path, os.O_RDONLY | piece.SAFE, dir_fd=directory)
        except OSError:
            return False
        try:
            return piece.read_digest(fd, key, offset, length) == digest
        except OSError:
            return False
        finally:
            os.close(fd)

    def _write(self, directory: int, key: str, name: str, header: bytes, view: memoryview) -> None:
        size = piece.disk_usage(len(header) + len(view))
        if size > self.max_bytes:
            self._count("skipped")
            return
        if spare_bytes(directory) < size:
            self._count("skipped")
            self._warn("its filesystem is nearly full")
            return
        if not self._reserve(directory, size):
            self._count("skipped")
            return
        temporary = f"{key}/{piece.temporary_of(name)}"
        published = False
        try:
            fd = self._create(directory, key, temporary)
            try:
                try:
                    piece.write(fd, header, view)
                finally:
                    os.close(fd)
                os.rename(temporary, f"{key}/{name}", src_dir_fd=directory, dst_dir_fd=directory)
                published = True
            finally:
                if not published:
                    with suppress(OSError):
                        os.unlink(temporary, dir_fd=directory)
        finally:
            if not published:
                with suppress(OSError):
                    self._usage.add(directory, -size)
        self._count("written")

    def _create(self, directory: int, key: str, temporary: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | piece.SAFE
        for _ in range(3):
            with suppress(FileExistsError):
                os.mkdir(key, 0o700, dir_fd=directory)
            with suppress(FileNotFoundError):  # a prune has just removed it, since it was empty
                return os.open(temporary, flags, 0o600, dir_fd=directory)
        raise FileNotFoundError("its directories vanish while they are used")

    def _reserve(self, directory: int, size: int) -> bool:
        """Count `size` bytes as kept, making room if need be; False if there is none to be had."""
        total = self._usage.add(directory, size)
        if total is not None and total <= self.max_bytes:
            return True
        with try_lock(directory, _PRUNE_LOCK) as lock:
            if lock is not None:
                # Taken off meanwhile, because the sweep cannot find what is not written yet.
                self._usage.add(directory, -size)
                self._clean(directory, min(self.max_bytes * 9 // 10, self.max_bytes - size))
                total = self._usage.add(directory, size)
        # While another process makes room, writers may run a little ahead of it.
        allowed = self.max_bytes if lock is not None else self.max_bytes + self.max_bytes // 10
        if total is None or total <= allowed:
            return True
        self._usage.add(directory, -size)
        return False

    def _clean(
        self, directory: int, limit: int, *, all_temporaries: bool = False
    ) -> tuple[sweep.Census, sweep.Removed]:
        before = self._usage.load(directory)
        census, removed = sweep.clean(directory, limit, all_temporaries=all_temporaries)
        self._usage.settle(directory, before, census.bytes)
        return census, removed

    def _unlink(self, directory: int, path: str, size: int) -> None:
        with suppress(OSError):
            os.unlink(path, dir_fd=directory)
            self._usage.add(directory, -piece.disk_usage(size))

    def _remove_unfit(self, directory: int, path: str) -> None:
        """Remove what stands under a piece's name if it is no regular file."""
        with suppress(OSError):
            info = os.stat(path, dir_fd=directory, follow_symlinks=False)
            if not piece.is_whole_file(info, info.st_size - piece.HEADER_SIZE):
                os.unlink(path, dir_fd=directory)

    def _count(self, *names: str) -> None:
        with self._lock:
            for name in names:
                self._counts[name] += 1

    def _warn(self, reason: str, *, whole: bool = False) -> None:
        """Say it once; the cache goes on trying."""
        with self._lock:
            if reason in self._warned or len(self._warned) > 8:
                return
            self._warned.add(reason)
        sentence = reason if whole else f"the cache {self.directory} takes nothing more ({reason}); {_ADVICE}"
        _log.warning("%s", sentence)
