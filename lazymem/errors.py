# SPDX-License-Identifier: Apache-2.0
"""The exception tree: every error lazymem raises on purpose.

Each class is ours *and* the builtin a caller would already be catching, carries what was found as
attributes, and ends its sentence with what to do. This module imports nothing of lazymem.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar


class LazymemError(Exception):
    """Base of every error that lazymem raises on purpose."""

    _keywords: ClassVar[tuple[str, ...]] = ()  # what __init__ wants beside the message

    def __reduce__(self) -> tuple[Any, ...]:
        # The builtin way calls the class with `args` alone, which lack what is given by keyword.
        given = {name: getattr(self, name) for name in self._keywords}
        return functools.partial(type(self), **given), self.args, self.__dict__


class SnapshotNotFound(LazymemError, FileNotFoundError):
    """Nothing lies under the given path or URL."""

    _keywords = ("url",)

    def __init__(self, message: str, *, url: str) -> None:
        super().__init__(message)
        self.url = url


class AccessDenied(LazymemError, PermissionError):
    """The path or URL exists but may not be read or written with the caller's rights."""

    _keywords = ("url",)

    def __init__(self, message: str, *, url: str) -> None:
        super().__init__(message)
        self.url = url


class FormatError(LazymemError, ValueError):
    """A snapshot file or a container breaks its own format.

    ``url`` names the file, ``field`` the field, section, array or member that is wrong.
    """

    _keywords = ("url", "field")

    def __init__(self, message: str, *, url: str, field: str | None = None) -> None:
        super().__init__(message)
        self.url = url
        self.field = field


class UnsupportedFormat(FormatError):
    """A well-formed file that needs a version or a feature this lazymem does not have."""


class ChunkCorrupt(LazymemError, OSError):
    """The stored bytes of a chunk do not match their checksum, or do not decode to its size.

    ``chunk`` is the chunk's index, ``array`` the name of the first array that it holds.
    """

    _keywords = ("url", "chunk", "array")

    def __init__(self, message: str, *, url: str, chunk: int, array: str | None = None) -> None:
        super().__init__(message)
        self.url = url
        self.chunk = chunk
        self.array = array


class ReadError(LazymemError, OSError):
    """The store did not deliver the bytes of a chunk: I/O error, short file, source gone."""

    _keywords = ("url", "chunk", "array")

    def __init__(self, message: str, *, url: str, chunk: int | None = None, array: str | None = None) -> None:
        super().__init__(message)
        self.url = url
        self.chunk = chunk
        self.array = array


class SnapshotChanged(LazymemError, OSError):
    """The file under the path is no longer the one that was opened."""

    _keywords = ("url",)

    def __init__(self, message: str, *, url: str) -> None:
        super().__init__(message)
        self.url = url


class SnapshotClosed(LazymemError, ValueError):
    """The snapshot was used after, or during, its ``close()``."""


class ArrayNotFound(LazymemError, KeyError):
    """The snapshot has no array of that name."""

    _keywords = ("url", "name")

    def __init__(self, message: str, *, url: str, name: str) -> None:
        super().__init__(message)
        self.url = url
        self.name = name

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class UnsupportedDtype(LazymemError, TypeError):
    """The dtype has no fixed size in bytes, or no meaning outside this process."""


class BackendUnavailable(LazymemError, OSError):
    """The requested way of resolving page faults is not to be had on this machine."""


class OutOfMemory(LazymemError, MemoryError):
    """The address space, or the memory for the tables, is not to be had."""


class BuildError(LazymemError, OSError):
    """A snapshot could not be written; nothing was left behind."""


class OptionError(LazymemError, ValueError):
    """An option or environment variable has a value that lazymem does not accept."""
