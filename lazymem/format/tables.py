# SPDX-License-Identifier: Apache-2.0
"""Validity of the tables RUNS, CHNK, ARRS, NAME, SHAP and EXTN: asks the core (_native/index.c), and puts
what it finds into the one sentence for a damaged file. Owns the names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .._native import index as native
from ..errors import FormatError
from . import structs
from .origin import Origin
from .sections import damaged, unsupported


def _refuse(url: str, section: str, fault: native.Fault | None, table: structs.Table, raw: bytes) -> None:
    if fault is None:
        return
    field, what = f"section {section}", fault.what
    if fault.row is not None:
        row = table.unpack(raw[fault.row * table.size : (fault.row + 1) * table.size])
        field, what = f"{field} row {fault.row}", f"{what} ({row})"
    raise (unsupported if fault.is_newer else damaged)(url, field, what)


def check_runs(url: str, runs: bytes, record_count: int, chunk_count: int) -> None:
    """Runs follow one another, cover all chunks, and use the records in order, each once."""
    _refuse(url, "RUNS", native.check_runs(runs, chunk_count, record_count), structs.RUN, runs)


def check_records(
    url: str, raw: bytes, records: NDArray[np.void], chunk_size: int, last_length: int, ends: Sequence[int]
) -> None:
    """Each record decodes to a chunk of known size from bytes between the head and the end of its source.

    raw: the bytes of `records`. last_length: uncompressed length of the chunk that the last record holds.
    ends: of the stored chunks, in this file and in each of its bases.
    """
    fault, in_order = native.check_records(raw, chunk_size, last_length, ends)
    _refuse(url, "CHNK", fault, structs.CHUNK, raw)
    if in_order:  # what the writer makes; spares the sort
        return
    for source in range(len(ends)):
        rows = np.flatnonzero(records["source"] == source)
        begin, length = records["offset"][rows], records["stored_length"][rows]
        _check_disjoint(url, rows, begin, begin + length)


def _check_disjoint(
    url: str, rows: NDArray[np.int64], begin: NDArray[np.uint64], end: NDArray[np.uint64]
) -> None:
    """Two records name the same stored bytes, or disjoint ones."""
    order = np.lexsort((end, begin))
    rows, begin, end = rows[order], begin[order], end[order]
    same = (begin[1:] == begin[:-1]) & (end[1:] == end[:-1])
    overlaps = np.flatnonzero(~same & (begin[1:] < end[:-1]))
    if len(overlaps):
        at = int(overlaps[0])
        raise damaged(url, f"section CHNK row {rows[at + 1]}", f"overlaps row {rows[at]}")


def check_arrays(
    url: str, arrays: bytes, shapes: bytes, item_sizes: Sequence[int], name_bytes: int, content_size: int
) -> None:
    """Every array lies in the content, after the one before, and its size is what its shape says."""
    fault = native.check_arrays(arrays, shapes, item_sizes, name_bytes, content_size)
    _refuse(url, "ARRS", fault, structs.ARRAY, arrays)


def check_extents(url: str, origin: Origin | None, extents: bytes, content_size: int) -> None:
    """Hold EXTN against CONT: ranges, order, and, for an exact container, full coverage."""
    if origin is None:
        if extents:
            raise damaged(url, "section EXTN", "is there but section CONT is not")
        return
    members = [
        (number, member.file_offset, member.stored_length)
        for number, file in enumerate(origin.files)
        for member in file.deflated
    ]
    sizes = [file.size for file in origin.files]
    fault = native.check_extents(extents, members, sizes, content_size, origin.exact)
    _refuse(url, "EXTN", fault, structs.EXTENT, extents)


def split_names(url: str, arrays: NDArray[np.void], blob: bytes) -> list[str]:
    """The arrays' names in their order, each valid UTF-8 and none twice. arrays: checked."""
    begins = arrays["name_offset"].tolist()  # they follow one another: `check_arrays`
    ends = [*begins[1:], len(blob)] if begins else []
    if blob.isascii():  # one decode for all
        text = blob.decode("ascii")
        names = [text[a:b] for a, b in zip(begins, ends, strict=True)]
    else:
        names = []
        for row, (a, b) in enumerate(zip(begins, ends, strict=True)):
            try:
                names.append(blob[a:b].decode("utf-8"))
            except UnicodeDecodeError:
                raise damaged(url, f"section NAME, row {row}", f"is not UTF-8 ({blob[a:b][:40]!r})") from None
    if len(set(names)) != len(names):
        raise _duplicate(url, names)
    return names


def _duplicate(url: str, names: list[str]) -> FormatError:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return damaged(url, "section NAME", f"has the name {name[:200]!r} twice")
        seen.add(name)
    raise AssertionError("called without a duplicate")
