# SPDX-License-Identifier: Apache-2.0
"""The border to the rules of an index's tables (lazymem.h): what breaks one, if anything does.

In C because a snapshot is opened with a handful of rows as often as with a million: numpy costs a
microsecond an expression where the table has one row, and Python costs one a row where it has many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from ._core import ffi, lib

#: LM_INDEX_* that are limits or numbers of the format, for the test that holds them against structs.py.
LIMITS: Final = {
    name: int(getattr(lib, f"LM_INDEX_{name}"))
    for name in ("HEAD_SIZE", "MAX_SOURCES", "MAX_NDIM", "MAX_NAME", "MAX_SIZE", "ARRAY_FLAGS")
}


class Fault(NamedTuple):
    """What is wrong: the end of a sentence. row: which, or None: the table as a whole.

    is_newer: a later version may know it; the table is not damaged.
    """

    what: str
    row: int | None
    is_newer: bool


def _found(what: Any, fault: Any) -> Fault | None:
    if what == ffi.NULL:
        return None
    row = None if fault.row == lib.LM_INDEX_WHOLE else int(fault.row)
    return Fault(ffi.string(what).decode("ascii"), row, bool(fault.is_newer))


# Tables come as bytes, one record after another (lazymem.h): whole ones, which callers have checked.


def check_runs(runs: bytes, chunk_count: int, record_count: int) -> Fault | None:
    """Section RUNS: runs follow one another, cover all chunks, use the records in order, each once."""
    table, fault = ffi.from_buffer("lm_run[]", runs), ffi.new("lm_index_fault *")
    return _found(lib.lm_index_check_runs(table, len(table), chunk_count, record_count, fault), fault)


def check_records(
    records: bytes, chunk_size: int, last_length: int, ends: Sequence[int]
) -> tuple[Fault | None, bool]:
    """Section CHNK; and whether the records of each source follow one another, so that none can overlap.

    last_length: of the last record's chunk. ends: where the chunks of each source end.
    """
    table, fault, in_order = (
        ffi.from_buffer("lm_chunk_record[]", records),
        ffi.new("lm_index_fault *"),
        ffi.new("int *"),
    )
    what = lib.lm_index_check_records(
        table, len(table), chunk_size, last_length, list(ends), len(ends), in_order, fault
    )
    return _found(what, fault), bool(in_order[0])


def check_arrays(
    arrays: bytes, shapes: bytes, item_sizes: Sequence[int], name_bytes: int, content_size: int
) -> Fault | None:
    """Sections ARRS and SHAP, and how much of NAME they use. item_sizes: of the dtypes."""
    table, dims = ffi.from_buffer("lm_array_row[]", arrays), ffi.from_buffer("uint64_t[]", shapes)
    fault = ffi.new("lm_index_fault *")
    what = lib.lm_index_check_arrays(
        table, len(table), dims, len(dims), list(item_sizes), len(item_sizes), name_bytes, content_size, fault
    )
    return _found(what, fault)


def check_extents(
    extents: bytes,
    members: Sequence[tuple[int, int, int]],
    sizes: Sequence[int],
    content_size: int,
    is_exact: bool,
) -> Fault | None:
    """Section EXTN. members: (file, file_offset, length) of deflated ones, which lie in their files.

    sizes: of the files. is_exact: extents and members leave no byte of any file uncovered.
    """
    table, fault = ffi.from_buffer("lm_extent_row[]", extents), ffi.new("lm_index_fault *")
    rows = [
        {"file": file, "file_offset": offset, "length": length} for file, offset, length in sorted(members)
    ]
    what = lib.lm_index_check_extents(
        table, len(table), rows, len(rows), list(sizes), len(sizes), content_size, is_exact, fault
    )
    return _found(what, fault)
