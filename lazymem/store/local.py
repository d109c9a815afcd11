# SPDX-License-Identifier: Apache-2.0
"""Local files: a `Blob` to read one, an `AtomicFile` to write one that appears whole or not at all.

Relies on: O_TMPFILE files vanish with their last descriptor, however the process ends (open(2));
link(2) fails with EEXIST and rename(2) replaces, both atomically.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

from ..errors import AccessDenied, BuildError, ReadError, SnapshotChanged, SnapshotNotFound

if TYPE_CHECKING:
    from typing_extensions import Buffer

StrPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_MAX_IO: Final = 1 << 30  # Linux moves at most 0x7ffff000 bytes in one call
_BUFFER_SIZE: Final = 1 << 20

_KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def _kind(mode: int) -> str:
    return next((name for test, name in _KINDS if test(mode)), "not a regular file")


def _identity(info: os.stat_result) -> str:
    return f"{info.st_dev:x}-{info.st_ino:x}-{info.st_size:x}-{info.st_mtime_ns:x}"


class LocalBlob:
    """A regular file opened for reading; implements `store.base.Blob`. Threads may share it.

    path: the absolute path, taken when the file was opened. url: the path as the caller gave it.
    """

    def __init__(self, path: StrPath) -> None:
        self._fd = -1  # so that __del__ works if open fails
        self._url = os.fsdecode(path)
        if not self._url:
            raise SnapshotNotFound("the path is empty; name a file or a folder", url=self._url)
        self.path = os.path.abspath(self._url)
        try:
            # Without O_NONBLOCK the open of a named pipe waits for a writer.
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SnapshotNotFound(
                f"{self._url}: there is no such file; check the path", url=self._url
            ) from error
        except PermissionError as error:
            raise AccessDenied(
                f"{self._url}: may not be read with your rights; check its mode and its directory's",
                url=self._url,
            ) from error
        except OSError as error:
            raise ReadError(f"{self._url}: cannot be opened ({error.strerror})", url=self._url) from error
        except ValueError as error:  # a NUL byte in the path
            raise SnapshotNotFound(f"{self._url!r}: is not a path ({error})", url=self._url) from None
        info = os.fstat(fd)
        self._fd, self._file = fd, (info.st_dev, info.st_ino)
        if not stat.S_ISREG(info.st_mode):
            self.close()
            advice = "name a file in it" if stat.S_ISDIR(info.st_mode) else "copy its content to one first"
            raise ReadError(
                f"{self._url}: is {_kind(info.st_mode)}, not a regular file; {advice}", url=self._url
            )
        self._size = info.st_size
        self._identity = _identity(info)

    @property
    def url(self) -> str:
        return self._url

    @property
    def size(self) -> int:
        return self._size

    @property
    def identity(self) -> str:
        return self._identity

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; blocks.

        Raises `ReadError` if they are not there, `SnapshotChanged` if that is because the file was
        changed after it was opened.
        """
        if offset < 0 or length < 0 or offset > self._size - length:
            raise ReadError(
                f"{self._url}: bytes {offset} to {offset + length} were asked for, but the file has "
                f"{self._size}; it is cut short or damaged",
                url=self._url,
            )
        fd = self.fileno()
        parts: list[bytes] = []
        position, end = offset, offset + length
        while position < end:
            try:
                part = os.pread(fd, min(end - position, _MAX_IO), position)
            except OSError as error:
                raise ReadError(
                    f"{self._url}: reading {end - position} bytes at {position} failed ({error.strerror})",
                    url=self._url,
                ) from error
            if not part:
                self._raise_short(position, end)
            parts.append(part)
            position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, out: memoryview) -> None:
        """As `read`; for callers that do not know what kind of blob they have."""
        out[:] = self.read(offset, len(out))

    def _raise_short(self, position: int, end: int) -> None:
        if self.has_changed():
            raise SnapshotChanged(
                f"{self._url}: was changed while it was open (it now ends at byte {position}); open it again",
                url=self._url,
            )
        raise ReadError(
            f"{self._url}: ended at byte {position}, though bytes up to {end} were asked for", url=self._url
        )

    def has_changed(self) -> bool:
        """Whether it was written to since it was opened.

        Raises `ReadError` if the descriptor does not lead to it any more: numbers are closed and used again
        by whoever closes "all" descriptors, and what is under them then says nothing of the file.
        """
        fd = self.fileno()
        info = None
        with contextlib.suppress(OSError):
            info = os.fstat(fd)
        if info is None or (info.st_dev, info.st_ino) != self._file:
            raise ReadError(
                f"{self._url}: its descriptors were closed by this process, so it cannot be read; open it "
                "again",
                url=self._url,
            )
        return _identity(info) != self._identity

    def fileno(self) -> int:
        if self._fd < 0:
            raise ReadError(f"{self._url}: is closed; open it again", url=self._url)
        return self._fd

    def close(
        self, _close: Callable[[int], None] = os.close, _stat: Callable[[int], os.stat_result] = os.fstat,
        suppress: Any = contextlib.suppress,
    ) -> None:  # fmt: skip
        # Defaults: __del__ may come at interpreter exit, when this module's names are gone already.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):  # the application has closed all descriptors
                info = _stat(fd)
                if (info.st_dev, info.st_ino) == self._file:  # else the number is somebody else's by now
                    _close(fd)

    def __enter__(self) -> LocalBlob:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LocalBlob({self._url!r})"


_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _failed(path: str, position: int, error: OSError) -> BuildError:
    advice = "make room and try again" if error.errno in _FULL else "nothing was left behind"
    return BuildError(f"{path}: writing failed after {position} bytes ({error.strerror}); {advice}")


class _Sink(io.RawIOBase):
    """Writes to a descriptor that it does not own, and counts; errors become sentences."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path
        self.position = 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self.position = os.lseek(self._fd, offset, whence)
        return self.position

    def tell(self) -> int:
        return self.position

    def write(self, data: Buffer, /) -> int:
        try:
            written = os.write(self._fd, memoryview(data)[:_MAX_IO])
        except OSError as error:
            raise _failed(self._path, self.position, error) from error
        self.position += written
        return written


# A filesystem that lacks O_TMPFILE says EOPNOTSUPP, a kernel that does says EISDIR or ENOENT.
_NO_TMPFILE: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)


class AtomicFile:
    """A file being written that gets its name only when it is whole and synced.

        with AtomicFile(path) as target:
            target.file.write(...)

    Until the block ends without an exception nothing stands under `path`, and what stood there
    before stays. Where the filesystem has O_TMPFILE, not even SIGKILL leaves anything behind, but between the
    two system calls that replace a file: then a link to the new one, whole, called `.NAME.*.partial`.
    A symbolic link stays one: the file that it leads to is replaced. Who may read a replaced file may
    read the new one. Raises `BuildError`, or `AccessDenied`; also for a `path` that is no regular file,
    and, with overwrite=False, for one that exists.
    """

    file: BinaryIO

    def __init__(self, path: StrPath, overwrite: bool = True) -> None:
        self._fd = self._directory = -1  # so that _discard works wherever this fails
        self._partial: str | None = None  # the temporary name, from before it exists
        self._sink: _Sink | None = None
        self.path = os.fsdecode(path)
        self._overwrite = overwrite
        if not self.path:
            raise BuildError("the path is empty; name the file to write")
        try:
            real = os.path.realpath(self.path)
        except ValueError as error:  # a NUL byte in the path
            raise BuildError(f"{self.path!r}: is not a path ({error})") from None
        directory, self._name = os.path.split(real)
        self._where = directory if os.path.islink(self.path) else os.path.dirname(self.path) or "."
        if self.path.endswith("/") or not self._name or os.path.isdir(self.path):
            raise BuildError(f"{self.path}: is a directory; give the name of a file in it")
        if not overwrite and os.path.lexists(self.path):
            raise self._exists()
        try:
            replaced = self._replaced()
            self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._open(0o666 if replaced is None else 0o600)  # 0666: the umask decides
            if replaced is not None:
                with contextlib.suppress(OSError):  # only root may give files away
                    os.fchown(self._fd, replaced.st_uid, replaced.st_gid)
                os.fchmod(self._fd, replaced.st_mode & 0o777)
        except BuildError:
            raise
        except OSError as error:
            self._discard()
            raise self._refused(error) from error
        self._sink = _Sink(self._fd, self.path)
        self.file = cast(BinaryIO, io.BufferedWriter(self._sink, _BUFFER_SIZE))

    def _replaced(self) -> os.stat_result | None:
        """What stands under the path now; anything but a regular file is refused."""
        try:
            info = os.stat(self.path)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(info.st_mode):
            raise BuildError(f"{self.path}: is {_kind(info.st_mode)}; name a regular file, or a new one")
        return info

    def _open(self, mode: int) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            self._fd = os.open(".", flags | os.O_TMPFILE, mode, dir_fd=self._directory)
            if os.path.exists(self._link):
                return
            os.close(self._fd)  # no /proc here, so it could never get a name
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        self._partial = self._partial_name()
        self._fd = os.open(self._partial, flags | os.O_CREAT | os.O_EXCL, mode, dir_fd=self._directory)

    @property
    def _link(self) -> str:
        return f"/proc/self/fd/{self._fd}"

    def _partial_name(self) -> str:
        # A name has at most 255 bytes; the target's may need all of them.
        stem = os.fsencode(self._name)[:200].decode(errors="ignore")
        return f".{stem}.{secrets.token_hex(6)}.partial"

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc_type is None:
                self._commit()
        finally:
            self._discard()

    def __del__(self) -> None:
        self._discard()

    def _commit(self) -> None:
        try:
            self.file.flush()
            os.fsync(self._fd)
            self._publish()
            os.fsync(self._directory)
        except BuildError:
            raise
        except FileExistsError as error:
            raise self._exists() from error
        except OSError as error:
            raise self._refused(error) from error

    def _publish(self) -> None:
        here = self._directory
        if not self._overwrite and self._partial is not None:  # link(2), since rename(2) would replace
            os.link(self._partial, self._name, src_dir_fd=here, dst_dir_fd=here)
            return
        if self._partial is None:
            try:
                # Mostly nothing is there to be replaced, and then no moment has another name in it.
                os.link(self._link, self._name, dst_dir_fd=here)
                return
            except FileExistsError:
                if not self._overwrite:
                    raise
            self._partial = self._partial_name()
            os.link(self._link, self._partial, dst_dir_fd=here)
        self._replaced()  # again: hours may have passed
        os.rename(self._partial, self._name, src_dir_fd=here, dst_dir_fd=here)
        self._partial = None

    def _discard(self) -> None:
        """Give back descriptors and the temporary name; idempotent."""
        if self._sink is not None:
            # Else the buffer is flushed when it is collected, to whatever file has the number by then.
            self._sink.close()
        if self._partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._partial, dir_fd=self._directory)
            self._partial = None
        for fd in (self._fd, self._directory):
            if fd >= 0:
                os.close(fd)
        self._fd = self._directory = -1

    def _exists(self) -> BuildError:
        return BuildError(f"{self.path}: exists already; choose another name or allow overwriting")

    def _refused(self, error: OSError) -> BuildError | AccessDenied:
        where = self._where
        if isinstance(error, PermissionError):
            return AccessDenied(
                f"{self.path}: may not be written; you have no rights to create files in {where}",
                url=self.path,
            )
        reason = {
            errno.ENOENT: f"the directory {where} does not exist; create it first",
            errno.ENOTDIR: f"{where} is not a directory",
            errno.EISDIR: "is a directory; give the name of a file in it",
            errno.ELOOP: "is a symbolic link that leads back to itself; remove it",
            errno.EROFS: "the filesystem is mounted read-only; choose another place",
        }.get(error.errno or 0)
        if reason is None:
            return _failed(self.path, self._sink.position if self._sink is not None else 0, error)
        return BuildError(f"{self.path}: {reason}")
