# SPDX-License-Identifier: Apache-2.0
"""The bases of a layer, opened and checked.

A base that is not the very file that the layer was built on is refused when the layer is opened: its
chunks would lie elsewhere, or hold something else.
"""

from __future__ import annotations

from contextlib import ExitStack

from ..errors import FormatError, SnapshotChanged, SnapshotNotFound
from ..store.base import Blob, Opener
from . import structs
from .index import SnapshotIndex, parse_tail
from .layers import Base, resolve


def open_bases(index: SnapshotIndex, opener: Opener) -> tuple[Blob, ...]:
    """The files behind the records' sources 1, 2, ..., each checked; none for what is no layer.

    One request each where they are remote. The caller closes them. Raises `SnapshotNotFound`,
    `SnapshotChanged`, `FormatError`, and what opening a file raises.
    """
    with ExitStack() as stack:
        blobs = []
        for base in index.sources:
            location = resolve(index.url, base)
            try:
                blob = opener.open(location)
            except SnapshotNotFound as error:
                raise SnapshotNotFound(
                    f"{index.url}: is a layer, and its base {base.url!r} is not there ({error}): put it "
                    "back, or open a snapshot that was built without --base",
                    url=index.url,
                ) from error
            stack.callback(blob.close)
            _check(index.url, base, blob)
            blobs.append(blob)
        stack.pop_all()
    return tuple(blobs)


def _check(layer: str, base: Base, blob: Blob) -> None:
    try:
        is_same = describe(base.url, blob) == base
    except FormatError:
        is_same = False
    if not is_same:
        raise SnapshotChanged(
            f"{layer}: is a layer on {base.url!r}, and {blob.url} is not the file that it was built on "
            "(another size, digest or index): put that back, or build the layer anew",
            url=layer,
        )


def describe(name: str, blob: Blob) -> Base:
    """The file as section SRCS has it. Reads its tail, which comes with opening."""
    length = min(blob.size, structs.TAIL.size)
    tail = parse_tail(blob.url, blob.read(blob.size - length, length), blob.read, blob.size)
    return Base(name, tail["digest"].hex(), blob.size, f"{tail['index_checksum']:016x}")
