# SPDX-License-Identifier: Apache-2.0
"""The exception tree: every error lazymem raises on purpose.

Each class is ours *and* the builtin a caller would already be catching, carries what was found as
attributes, and ends its sentence with what to do. This module imports nothing of lazymem.
`EXPLANATIONS` is the one table of all of them; it follows here, and stands in the README.

"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Final, NamedTuple


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


class PagerUnavailable(LazymemError, OSError):
    """The pager does not answer, or does not serve the caller."""


class OutOfMemory(LazymemError, MemoryError):
    """The address space, or the memory for the tables, is not to be had."""


class BuildError(LazymemError, OSError):
    """A snapshot could not be written; nothing was left behind."""


class OptionError(LazymemError, ValueError):
    """An option or environment variable has a value that lazymem does not accept."""


class Explanation(NamedTuple):
    """One row of the table. codes: the failures of the C core (LM_E_* of lazymem.h) that end in `kind`."""

    kind: type[LazymemError]
    cause: str
    remedy: str
    codes: tuple[str, ...] = ()


#: Every error, what it comes of and what to do; in Markdown.
EXPLANATIONS: Final = (
    Explanation(SnapshotNotFound, "no such path, bucket or key", "check it", ("GONE",)),
    Explanation(
        AccessDenied, "no right to read or write it; no credentials, wrong or expired ones",
        "as the message says", ("DENIED",),
    ),
    Explanation(
        FormatError,
        "the file breaks its format, or is called `.lzm` and is no snapshot; names file and field",
        "get the file again",
    ),
    Explanation(
        UnsupportedFormat,
        "a newer version, an unknown feature, a compressed npz in place, "
        "a pickle that wants more than tensors",
        "as the message says",
    ),
    Explanation(
        ChunkCorrupt, "stored bytes do not match their checksum", "`lazymem verify`, copy the file again",
        ("CHECKSUM", "DECODE", "RECORD"),
    ),
    Explanation(
        ReadError,
        "I/O error, short file, no descriptors, no threads; a store that does not deliver within `timeout`; "
        "memory that a fork or closed descriptors have made unreachable",
        "as the message says", ("SHORT", "CODEC", "STORE", "FETCHER", "LOST", "MOVED"),
    ),
    Explanation(
        SnapshotChanged,
        "the file or object was changed while open, or after it was pickled; a layer's base is another file",
        "open it again; put the base back", ("CHANGED",),
    ),
    Explanation(SnapshotClosed, "used after `close()`", "open it again", ("CLOSED",)),
    Explanation(ArrayNotFound, "no array of that name", "`lazymem ls`"),
    Explanation(UnsupportedDtype, "object arrays and the like", "convert"),
    Explanation(
        BackendUnavailable, "the way asked for is not to be had", "`lazymem doctor`", ("FEATURE",)
    ),
    Explanation(
        PagerUnavailable, "no pager listens there, or it does not serve you", "`lazymem pager serve`"
    ),
    Explanation(
        OutOfMemory, "no address space, no memory for tables or threads",
        "`ulimit -v`, `vm.max_map_count`",
    ),
    Explanation(
        BuildError, "the file cannot be written, or may not be replaced; nothing is left behind",
        "as the message says",
    ),
    Explanation(OptionError, "an option's value", "as the message says", ("OPTION",)),
)  # fmt: skip

#: What a failure of the core is raised as, by its name without LM_E_. FULL is waited for, not raised.
OF_CODE: Final[Mapping[str, type[LazymemError]]] = {
    code: explanation.kind for explanation in EXPLANATIONS for code in explanation.codes
}


def table() -> str:
    """`EXPLANATIONS` in Markdown."""
    rows = ["| error | also a | cause | what to do |", "|---|---|---|---|"]
    for kind, cause, remedy, _ in EXPLANATIONS:
        rows.append(f"| `{kind.__name__}` | {kind.__bases__[-1].__name__} | {cause} | {remedy} |")
    return "\n".join(rows)


__doc__ = f"{__doc__}{table()}\n"
