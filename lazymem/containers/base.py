# SPDX-License-Identifier: Apache-2.0
"""What a container is: somebody else's file format, read in place.

A container module turns one or more blobs into a `Directory`: which arrays lie where. It reads
headers only, never array bytes, and trusts no number it finds there. This module holds the contract
and the arithmetic that all of them need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from ..errors import FormatError, UnsupportedFormat
from ..store.base import Blob
from ..views import View

MAX_NDIM: Final = 64  # numpy's
_MAX_NBYTES: Final = 2**63 - 1

#: Bytes; beyond most headers, so that one read of a container's head is enough.
HEAD_READ: Final = 64 << 10

NO_METADATA: Final[Mapping[str, Any]] = {}


class ArrayEntry(NamedTuple):
    """One array of a container. (No dataclass: of these there may be 100,000, and time counts.)

    offset and stored_length: the bytes of file number `file` that hold it.
    nbytes: its size in memory; equals stored_length unless `compression` is set.
    compression: None, or "deflate" (a raw deflate stream inside a zip member that begins with
        `skip` bytes of .npy header once decompressed). Whoever decompresses it holds all of the
        member's bytes against member_size and crc32: the array's bytes may not be its last.
    member_size: bytes of the whole member once decompressed; 0 without `compression`.
    crc32: CRC-32 of the same; None without `compression`.
    metadata: what the container says beyond dtype and shape (e.g. {"dtype": "F4"} where numpy can
        only show packed bytes).
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: str  # "C" or "F"
    file: int
    offset: int
    nbytes: int
    stored_length: int
    compression: str | None = None
    skip: int = 0
    member_size: int = 0
    crc32: int | None = None
    metadata: Mapping[str, Any] = NO_METADATA
    hidden: bool = False


@dataclass(frozen=True, slots=True)
class Directory:
    """All arrays of one container, sorted by (file, offset).

    format: "raw", "npy", "npz", "gguf", "safetensors", "torch" or, of shards, "safetensors-sharded".
    files: the blobs, in the order that ArrayEntry.file counts; some may hold no array.
    file_names: for each, its name relative to the container (what `extract` writes).
    metadata: the container's own user metadata (safetensors' __metadata__), JSON-able.
    extra_files: further files that belong to the container byte for byte, such as
        model.safetensors.index.json: name -> content.
    views: more arrays, whose bytes are those of `arrays`. All names, of both, are different.
    folder: the location of the folder that the files lie in, where that is the model; else None.
    left_out: what lies in the folder and was not taken although the whole folder was asked for.
    """

    format: str
    files: Sequence[Blob]
    file_names: Sequence[str]
    arrays: Sequence[ArrayEntry]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    extra_files: Mapping[str, bytes] = field(default_factory=dict)
    views: Sequence[View] = ()
    folder: str | None = None
    left_out: Sequence[str] = ()

    @property
    def names(self) -> list[str]:
        """Of all arrays that are shown, views too."""
        return [entry.name for entry in self.arrays if not entry.hidden] + [view.name for view in self.views]

    def close(self) -> None:
        """Close the blobs; idempotent."""
        for blob in self.files:
            blob.close()


def read_head(blob: Blob) -> bytes:
    """The first bytes, for all who look at them: each read of a remote blob is a request."""
    return blob.read(0, min(HEAD_READ, blob.size))


def damaged(url: str, field: str, found: str) -> FormatError:
    """The error of a container that breaks its own format: what was found in `field`."""
    return FormatError(
        f"{url}: {field} {found}; the file is damaged or cut short, so get it again", url=url, field=field
    )


def unsupported(url: str, field: str, found: str, advice: str) -> UnsupportedFormat:
    """The error of a container that is well-formed but cannot be shown."""
    return UnsupportedFormat(f"{url}: {field} {found}; {advice}", url=url, field=field)


def array_size(shape: Sequence[object], itemsize: int) -> int | None:
    """Bytes of an array of that shape, or None if no array can have it.

    As in numpy, lengths other than zero must give a possible size even where one length is zero.
    """
    if len(shape) > MAX_NDIM:
        return None
    size, empty = itemsize or 1, not itemsize
    for length in shape:
        if type(length) is not int or length < 0:  # a bool is no length
            return None
        if length:
            size *= length
        else:
            empty = True
    if size > _MAX_NBYTES:
        return None
    return 0 if empty else size
