# SPDX-License-Identifier: Apache-2.0
"""Validity of the big tables RUNS, CHNK, ARRS, NAME and SHAP. Owns every check on their numbers.

A snapshot may have millions of rows, so the checks are numpy expressions. All columns are unsigned;
each sum is preceded by the comparison that keeps it from wrapping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from . import structs
from .sections import damaged, unsupported

_Mask = NDArray[np.bool_]


_IS_PLANE_WIDTH: Final = np.array([width in structs.PLANE_WIDTHS for width in range(256)])


def _first(mask: _Mask) -> int | None:
    """Row of the first True, or None."""
    if not len(mask):
        return None
    row = int(mask.argmax())
    return row if mask[row] else None


def check_runs(url: str, runs: NDArray[np.void], record_count: int, chunk_count: int) -> None:
    """Runs follow one another, cover all chunks, and use the records in order, each once."""
    field = "section RUNS"
    count = runs["count"]
    row = _first((count < 1) | (count > chunk_count))
    if row is not None:
        raise damaged(url, field, f"has run {row} of {count[row]} chunks, where there are {chunk_count}")
    # No wrap: fewer than 2^40 rows fit into any file, and no count exceeds 2^30.
    ends = np.cumsum(count, dtype=np.uint64)
    begins = ends - count
    row = _first(runs["first_chunk"] != begins)
    if row is not None:
        raise damaged(url, field, f"has run {row} at chunk {runs['first_chunk'][row]}, not {begins[row]}")
    total = int(ends[-1]) if len(ends) else 0
    if total != chunk_count:
        raise damaged(url, field, f"covers {total} chunks, where the content has {chunk_count}")
    stored = runs[runs["first_record"] != structs.ZERO_RUN]
    ends = np.cumsum(stored["count"], dtype=np.uint64)
    row = _first(stored["first_record"] != ends - stored["count"])
    if row is not None:
        raise damaged(url, field, f"uses record {stored['first_record'][row]} out of order")
    used = int(ends[-1]) if len(ends) else 0
    if used != record_count:
        raise damaged(url, field, f"uses {used} records, where section CHNK has {record_count}")


def check_records(
    url: str, records: NDArray[np.void], chunk_size: int, last_length: int, ends: Sequence[int]
) -> None:
    """Each record decodes to a chunk of known size from bytes between the head and the end of its source.

    last_length: uncompressed length of the chunk that the last record holds. ends: of the stored chunks, in
    this file and in each of its bases.
    """
    field = "section CHNK"
    if not len(records):
        return
    lengths = np.full(len(records), chunk_size, np.uint32)
    lengths[-1] = last_length
    stored, codec, kind = records["stored_length"], records["codec"], records["filter"]
    row = _first(codec > structs.ZSTD)
    if row is not None:
        raise unsupported(url, f"{field} record {row}", f"has codec {codec[row]}")
    row = _first(kind > structs.FILTER_FLOAT_PLANES)
    if row is not None:
        raise unsupported(url, f"{field} record {row}", f"has filter {kind[row]}")

    def refuse(mask: _Mask, what: str) -> None:
        row = _first(mask)
        if row is not None:
            raise damaged(url, f"{field} record {row}", f"{what} ({records[row].item()})")

    refuse(records["flags"] != 0, "has flags that no file may have")
    source = records["source"]
    refuse(source >= len(ends), "names a source that section SRCS lacks")
    refuse((records["reserved0"] != 0) | (records["reserved1"] != 0), "has reserved bytes that are not zero")
    planes = kind != structs.FILTER_NONE
    refuse(planes & ~_IS_PLANE_WIDTH[records["width"]], "has an impossible plane width")
    refuse(~planes & (records["width"] != 0), "has a plane width but no planes")
    refuse((stored < 1) | (stored > lengths), "has an impossible stored_length")
    raw = codec == structs.RAW
    refuse(raw & (stored != lengths), "is raw but not of its chunk's length")
    refuse(raw & planes, "is raw but has byte planes")
    offset, end = records["offset"], np.array(ends, np.uint64)[source]
    refuse((offset < structs.HEAD.size) | (offset > end), "lies outside the file's chunks")
    # offset <= end < 2^63 and stored < 2^32, so the sum does not wrap.
    refuse(offset + stored > end, "reaches beyond the file's chunks")
    for number in range(len(ends)):
        rows = np.flatnonzero(source == number) if len(ends) > 1 else slice(None)
        _check_disjoint(url, field, offset[rows], (offset + stored)[rows])


def _check_disjoint(url: str, field: str, begin: NDArray[np.uint64], end: NDArray[np.uint64]) -> None:
    """Two records name the same stored bytes, or disjoint ones."""
    if np.all(begin[1:] >= end[:-1]):  # what the writer makes; spares the sort
        return
    order = np.lexsort((end, begin))
    begin, end = begin[order], end[order]
    same = (begin[1:] == begin[:-1]) & (end[1:] == end[:-1])
    row = _first(~same & (begin[1:] < end[:-1]))
    if row is not None:
        raise damaged(url, f"{field} record {order[row + 1]}", f"overlaps record {order[row]}")


def check_arrays(
    url: str,
    arrays: NDArray[np.void],
    shapes: NDArray[np.uint64],
    itemsizes: NDArray[np.uint64],
    name_bytes: int,
    content_size: int,
) -> None:
    """Every array lies in the content, after the one before, and its size is what its shape says."""
    field = "section ARRS"

    def refuse(mask: _Mask, what: str) -> None:
        row = _first(mask)
        if row is not None:
            raise damaged(url, f"{field} row {row}", f"{what} ({arrays[row].item()})")

    refuse(arrays["dtype"] >= len(itemsizes), "has a dtype that section DTYP lacks")
    refuse(arrays["ndim"] > structs.MAX_NDIM, f"has more than {structs.MAX_NDIM} dimensions")
    refuse(arrays["flags"] > (structs.FORTRAN | structs.HIDDEN), "has unknown flags")
    refuse(arrays["reserved"] != np.void(bytes(6)), "has reserved bytes that are not zero")
    _check_packed(url, field, arrays["name_offset"], arrays["name_length"], name_bytes, "NAME")
    refuse(arrays["name_length"] > structs.MAX_NAME, "has too long a name")
    _check_packed(url, field, arrays["shape_offset"], arrays["ndim"], len(shapes), "SHAP")

    offset, nbytes = arrays["offset"], arrays["nbytes"]
    refuse(offset > content_size, "begins beyond the content")
    refuse(nbytes > content_size - np.minimum(offset, np.uint64(content_size)), "reaches beyond the content")
    overlap = _first(offset[1:] < (offset + nbytes)[:-1])
    if overlap is not None:
        raise damaged(url, f"{field} row {overlap + 1}", "begins before the array before it ends")
    refuse(_wrong_sizes(arrays, shapes, itemsizes), "has nbytes that are not shape times item size")


def _check_packed(
    url: str,
    field: str,
    begin: NDArray[np.uint32],
    length: NDArray[np.unsignedinteger[Any]],
    total: int,
    section: str,
) -> None:
    """Pieces of NAME or SHAP follow in the order of ARRS without gap, so none can be read twice."""
    ends = np.cumsum(length, dtype=np.uint64)
    row = _first(begin != ends - length.astype(np.uint64))
    if row is not None:
        raise damaged(url, f"{field} row {row}", f"does not follow the row before in section {section}")
    used = int(ends[-1]) if len(ends) else 0
    if used != total:
        raise damaged(url, f"section {section}", f"has {total} entries, of which the arrays use {used}")


def _wrong_sizes(
    arrays: NDArray[np.void], shapes: NDArray[np.uint64], itemsizes: NDArray[np.uint64]
) -> _Mask:
    """Rows whose nbytes is not the product of shape and item size, or whose product is absurd.

    numpy multiplies the non-zero dimensions of empty arrays too, so those are held to the limit.
    """
    wrong = np.zeros(len(arrays), np.bool_)
    ndims = arrays["ndim"]
    for ndim in np.flatnonzero(np.bincount(ndims)).tolist():  # np.unique would import numpy.ma
        rows = np.flatnonzero(ndims == ndim)
        index = arrays["shape_offset"][rows].astype(np.int64)[:, None] + np.arange(ndim)
        dims = shapes[index]
        item = itemsizes[arrays["dtype"][rows]]
        # Rounding is 1e-14 of the product: far from 2^64, where the exact one would wrap.
        with np.errstate(over="ignore"):
            size = np.maximum(dims, 1).astype(np.float64).prod(axis=1) * np.maximum(item, 1)
            exact = dims.prod(axis=1, dtype=np.uint64) * item
        wrong[rows] = (size > structs.MAX_ELEMENTS_BYTES) | (exact != arrays["nbytes"][rows])
    return wrong


def split_names(url: str, arrays: NDArray[np.void], blob: bytes) -> list[str]:
    """The arrays' names in their order, each valid UTF-8 and none twice."""
    ends = np.cumsum(arrays["name_length"], dtype=np.uint64).tolist()
    begins = [0, *ends][:-1]
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
