# SPDX-License-Identifier: Apache-2.0
"""A reader trusts no number: each wrong one is a named error with file and field."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import zstandard

from lazymem import _native
from lazymem.errors import FormatError, UnsupportedFormat
from lazymem.format import structs
from lazymem.format.index import is_snapshot, parse_head
from lazymem.format.sections import encode_json

from .format_tools import (
    URL,
    parse,
    raw_sections,
    small_snapshot,
    tail_fields,
    with_index,
    with_row,
    with_sections,
    with_tail,
    write_snapshot,
)

U64 = 2**64 - 1


@pytest.fixture(scope="module")
def snapshot() -> bytes:
    return small_snapshot()


def refused(data: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        parse(data)
    assert caught.value.url == URL
    assert caught.value.field
    assert URL in str(caught.value)
    return caught.value


def test_parse_gives_what_was_written(snapshot: bytes) -> None:
    index = parse(snapshot)
    assert list(index.rows) == ["first", "zeros", "empty", "last"]
    assert [index.shape_of(row) for row in range(4)] == [(300, 100), (500_000,), (0, 7), (70_001,)]
    assert [index.dtype_of(row).str for row in range(4)] == ["<f4", "|u1", "<i2", "|u1"]
    assert index.metadata == {"made": "for a test"}
    assert index.array_metadata["last"] == {"n": 1}
    assert index.created_by == "lazymem"
    assert index.container is None
    assert index.file_size == len(snapshot)


def test_parse_reads_the_index_apart_where_the_tail_read_misses_it(snapshot: bytes) -> None:
    assert parse(snapshot, tail_read=structs.TAIL.size).digest == parse(snapshot).digest


def test_summary_counts_every_chunk_once(snapshot: bytes) -> None:
    summary = parse(snapshot).summary()
    assert summary.zero_chunks > 0
    assert sum(summary.codecs.values()) + summary.zero_chunks == summary.chunks
    assert summary.array_bytes == 300 * 100 * 4 + 500_000 + 70_001
    assert summary.arrays == 4
    assert summary.ratio == summary.array_bytes / summary.stored_bytes


def test_is_snapshot_by_first_or_last_bytes(snapshot: bytes) -> None:
    assert is_snapshot(snapshot[:8])
    assert is_snapshot(snapshot[-200:])
    assert not is_snapshot(b"")
    assert not is_snapshot(snapshot[1:100])


def test_parse_refuses_truncation_at_every_length(snapshot: bytes) -> None:
    small = write_snapshot({"x": np.arange(40)})
    for length in range(len(small)):
        refused(small[:length])


def test_parse_refuses_appended_bytes(snapshot: bytes) -> None:
    for extra in (b"\0", bytes(structs.TAIL.size), snapshot[-structs.TAIL.size :]):
        refused(snapshot + extra)


def test_parse_refuses_any_flipped_bit_of_index_and_tail() -> None:
    small = write_snapshot({"x": np.arange(40)})
    for position in range(tail_fields(small)["index_offset"], len(small)):
        damaged = bytearray(small)
        damaged[position] ^= 1 << position % 8
        refused(bytes(damaged))


def test_parse_tells_an_unfinished_snapshot_from_another_file(snapshot: bytes) -> None:
    assert "never finished" in str(refused(snapshot[:-1]))
    assert "not a snapshot" in str(refused(bytes(5000)))


def hostile(value: int, bits: int) -> list[int]:
    top = 2**bits - 1
    values = {0, 1, 2, value + 1, value - 1, value ^ 1 << bits - 1, top, top - 1, top // 2, top // 2 + 1}
    return sorted(v for v in values if 0 <= v <= top and v != value)


@pytest.mark.parametrize("field", [name for name in structs.TAIL.dtype.names or () if name != "digest"])
def test_parse_refuses_hostile_tail_fields(snapshot: bytes, field: str) -> None:
    dtype = structs.TAIL.dtype[field]
    value = tail_fields(snapshot)[field]
    if dtype.kind == "V":
        refused(with_tail(snapshot, **{field: bytes(dtype.itemsize)}))
        return
    for other in hostile(value, 8 * dtype.itemsize):
        data = with_tail(snapshot, **{field: other})
        if field in ("minor", "compatible"):  # a reader accepts any
            assert parse(data).names == parse(snapshot).names
        else:
            refused(data)


#: Fields that a damaged file may change without breaking a rule; checksum and digest find those.
FREE = {
    ("CHNK", "checksum"),
    ("CHNK", "offset"),  # any place among the chunks that overlaps no other
    ("CHNK", "stored_length"),
    ("CHNK", "codec"),
    ("CHNK", "filter"),
    ("CHNK", "width"),
    ("ARRS", "dtype"),
    ("ARRS", "flags"),
    ("ARRS", "offset"),  # into the padding, as long as nothing overlaps
}


@pytest.mark.parametrize(
    ("section", "field"),
    [
        (section, field)
        for section, table in (("RUNS", structs.RUN), ("CHNK", structs.CHUNK), ("ARRS", structs.ARRAY))
        for field in table.dtype.names or ()
    ],
)
def test_parse_refuses_hostile_table_fields(snapshot: bytes, section: str, field: str) -> None:
    index = parse(snapshot)
    table = {"RUNS": index.runs, "CHNK": index.records, "ARRS": index.arrays}[section]
    column = table[field]
    refusals = 0
    for row in (0, len(column) // 2, len(column) - 1):
        if column.dtype.kind == "V":
            refused(with_row(snapshot, section, row, **{field: np.void(b"\0\0\0\0\0\1")}))
            refusals += 1
            continue
        for value in hostile(int(column[row]), 8 * column.dtype.itemsize):
            data = with_row(snapshot, section, row, **{field: value})
            if (section, field) not in FREE:
                refused(data)
                refusals += 1
                continue
            try:
                parse(data)
            except FormatError:
                refusals += 1
    assert refusals or field == "checksum"


def test_parse_refuses_chunks_that_overlap(snapshot: bytes) -> None:
    records = parse(snapshot).records
    error = refused(with_row(snapshot, "CHNK", 1, offset=int(records["offset"][0]) + 1))
    assert "overlaps" in str(error)


def test_parse_accepts_two_records_of_the_same_bytes(snapshot: bytes) -> None:
    records = parse(snapshot).records
    fields = {name: records[name][0] for name in ("offset", "stored_length", "codec", "filter", "width")}
    assert len(parse(with_row(snapshot, "CHNK", 1, **fields)).records) == len(records)


def test_parse_refuses_chunks_within_cold_sections_or_index(snapshot: bytes) -> None:
    index = parse(snapshot)
    row = len(index.records) - 1
    length = int(index.records["stored_length"][row])
    cold = index.cold["CDIG"].offset
    refused(with_row(snapshot, "CHNK", row, offset=cold - length + 1))
    parse(with_row(snapshot, "CHNK", row, offset=cold - length))


def test_parse_refuses_arrays_that_overlap(snapshot: bytes) -> None:
    offset = int(parse(snapshot).arrays["offset"][1])
    assert "before the array before it ends" in str(refused(with_row(snapshot, "ARRS", 2, offset=offset)))


@pytest.mark.parametrize("shape", [(2**32, 2**32), (2**63, 2), (0, 2**63), (0, 2**40, 2**40), (U64, U64)])
def test_parse_refuses_shapes_that_overflow(shape: tuple[int, ...]) -> None:
    # Every one of these products is 0 modulo 2^64, or 0.
    data = write_snapshot({"x": np.zeros((0,) * len(shape), np.uint8)})
    refused(with_sections(data, lambda s: s.update(SHAP=np.array(shape, "<u8").tobytes())))


def test_parse_accepts_64_dimensions() -> None:
    data = write_snapshot({"x": np.zeros((1,) * 32, np.float64)})

    def deepen(sections: dict[str, bytes]) -> None:
        rows = np.frombuffer(sections["ARRS"], structs.ARRAY.dtype).copy()
        rows["ndim"] = 64
        sections.update(ARRS=rows.tobytes(), SHAP=np.ones(64, "<u8").tobytes())

    assert parse(with_sections(data, deepen)).shape_of(0) == (1,) * 64


def test_parse_refuses_names_that_are_equal_or_not_utf8() -> None:
    data = write_snapshot({"ab": np.arange(3), "cd": np.arange(3)})
    assert "'ab' twice" in str(refused(with_sections(data, lambda s: s.update(NAME=b"abab"))))
    assert "UTF-8" in str(refused(with_sections(data, lambda s: s.update(NAME=b"ab\xffd"))))
    # A character that is cut by the border of two names is not UTF-8 either.
    assert "UTF-8" in str(refused(with_sections(data, lambda s: s.update(NAME="aéx".encode()))))


def test_parse_keeps_names_of_any_script() -> None:
    names = ["вес", "重み", "وزن", "w/../x", "", "😀"]
    assert list(parse(write_snapshot({name: np.arange(2) for name in names})).rows) == names


@pytest.mark.parametrize(
    "section",
    [s for s, f in structs.SECTION_FLAGS.items() if f & structs.REQUIRED and s not in structs.MAY_BE_ABSENT],
)
def test_parse_refuses_a_missing_required_section(snapshot: bytes, section: str) -> None:
    error = refused(with_sections(snapshot, lambda s: s.pop(section)))
    assert section in str(error)


@pytest.mark.parametrize("section", ["RUNS", "CHNK", "ARRS", "SHAP", "NAME"])
def test_parse_refuses_tables_of_another_length(snapshot: bytes, section: str) -> None:
    raw = raw_sections(snapshot)[section]
    refused(with_sections(snapshot, lambda s: s.update({section: raw[:-1]})))
    refused(with_sections(snapshot, lambda s: s.update({section: raw + raw[-40:]})))
    refused(with_sections(snapshot, lambda s: s.update({section: b""})))


JSON_SECTIONS: list[tuple[str, Any]] = [
    ("DTYP", {}),
    ("DTYP", ["|O"]),
    ("DTYP", ["<f4"] * 5),
    ("DTYP", [7, "|u1", "<i2"]),
    ("META", []),
    ("META", {"metadata": [1]}),
    ("META", {"arrays": {"x": 1}}),
    ("FEAT", {}),
    ("FEAT", [1]),
    ("CONT", []),
    ("CONT", {}),
    ("SRCS", {}),
    ("TOOL", []),
]


@pytest.mark.parametrize(("section", "value"), JSON_SECTIONS, ids=str)
def test_parse_refuses_json_of_another_shape(snapshot: bytes, section: str, value: Any) -> None:
    refused(with_sections(snapshot, lambda s: s.update({section: encode_json(value)})))


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000, b"{}".decode().encode("utf-16")])
def test_parse_refuses_what_is_not_json(snapshot: bytes, raw: bytes) -> None:
    refused(with_sections(snapshot, lambda s: s.update(META=raw)))


def container(**file: Any) -> bytes:
    entry = {"name": "a", "size": 8, "sha256": None, **file}
    return encode_json({"format": "raw", "exact": True, "files": [entry]})


def extents(*rows: tuple[int, int, int, int]) -> bytes:
    table = np.zeros(len(rows), structs.EXTENT.dtype)
    for i, (file, file_offset, content_offset, length) in enumerate(rows):
        table[i] = (file, 0, file_offset, content_offset, length)
    return table.tobytes()


def with_container(data: bytes, cont: bytes, extn: bytes) -> bytes:
    return with_sections(data, lambda s: s.update(CONT=cont, EXTN=extn))


def test_parse_accepts_a_container(snapshot: bytes) -> None:
    index = parse(with_container(snapshot, container(), extents((0, 0, 64, 3), (0, 3, 0, 5))))
    assert index.container is not None
    assert index.container.files[0].size == 8


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "..", "a/../b", "a//b", "a/", "./a", "a\\b", "a\0b", "a\nb", "\ud800", 7, None],
)
def test_parse_refuses_container_file_names_that_leave_the_directory(snapshot: bytes, name: Any) -> None:
    raw = json.dumps(
        json.loads(container()) | {"files": [{"name": name, "size": 8, "sha256": None}]}
    ).encode()
    refused(with_container(snapshot, raw, extents((0, 0, 0, 8))))


@pytest.mark.parametrize(
    "file",
    [
        {"size": -1},
        {"size": 2**70},
        {"size": True},
        {"size": "8"},
        {"sha256": "12"},
        {"sha256": "G" * 64},
        {"sha256": 5},
        {"deflated": {}},
        {"deflated": [1]},
        {"deflated": [{"file_offset": 9, "stored_length": 1, "level": 6, "extents": []}]},
        {"deflated": [{"file_offset": 4, "stored_length": 5, "level": 6, "extents": []}]},
        {"deflated": [{"file_offset": 4, "stored_length": 4, "level": 10, "extents": []}]},
        {"deflated": [{"file_offset": 4, "stored_length": 4, "level": 6, "extents": [[0, 2**46]]}]},
        {"deflated": [{"file_offset": 4, "stored_length": 4, "level": 6, "extents": [[2**63, 1]]}]},
        {"deflated": [{"file_offset": 4, "stored_length": 4, "level": 6, "extents": [[0]]}]},
    ],
    ids=str,
)
def test_parse_refuses_container_files_of_impossible_fields(snapshot: bytes, file: dict[str, Any]) -> None:
    refused(with_container(snapshot, container(**file), extents((0, 0, 0, 8))))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [(0, 0, 0, 7)],  # too short
        [(0, 1, 0, 7)],  # a hole at the start
        [(0, 0, 0, 3), (0, 4, 0, 4)],  # a hole inside
        [(0, 0, 0, 5), (0, 4, 0, 4)],  # an overlap
        [(0, 4, 0, 4), (0, 0, 0, 4)],  # out of order
        [(0, 0, 0, 9)],  # beyond the file
        [(1, 0, 0, 8)],  # no such file
        [(2**32 - 1, 0, 0, 8)],
        [(0, 0, 2**46, 8)],  # beyond the content
        [(0, 0, U64, 8)],
        [(0, 0, 0, U64)],
        [(0, U64, 0, 8)],
    ],
    ids=str,
)
def test_parse_refuses_extents_that_do_not_give_the_file(
    snapshot: bytes, rows: list[tuple[int, int, int, int]]
) -> None:
    refused(with_container(snapshot, container(), extents(*rows)))


def test_parse_refuses_extents_without_container(snapshot: bytes) -> None:
    refused(with_sections(snapshot, lambda s: s.update(EXTN=extents((0, 0, 0, 8)))))


def test_parse_takes_deflated_members_as_covered(snapshot: bytes) -> None:
    member = {"file_offset": 2, "stored_length": 3, "level": 6, "extents": [[0, 10]]}
    good = with_container(snapshot, container(deflated=[member]), extents((0, 0, 0, 2), (0, 5, 0, 3)))
    assert parse(good).container is not None
    refused(with_container(snapshot, container(deflated=[member]), extents((0, 0, 0, 3), (0, 5, 0, 3))))


@pytest.mark.parametrize(
    ("members", "rows", "is_good"),
    [
        ([(4, 4), (0, 4)], [(2, 0, 0, 5)], True),  # members in any order; "empty" needs nothing
        ([(0, 4)], [(0, 4, 0, 4), (2, 0, 0, 5)], True),
        ([(0, 4), (2, 6)], [(2, 0, 0, 5)], False),  # members that overlap
        ([(0, 4)], [(2, 0, 0, 5)], False),  # the end of the first file
        ([(0, 8)], [], False),  # nothing of the last
        ([(0, 8)], [(2, 1, 0, 4)], False),
        ([(0, 8)], [(1, 0, 0, 1), (2, 0, 0, 5)], False),  # more than the empty one has
    ],
    ids=str,
)
def test_parse_holds_extents_against_every_file(
    snapshot: bytes, members: list[tuple[int, int]], rows: list[tuple[int, int, int, int]], is_good: bool
) -> None:
    deflated = [
        {"file_offset": offset, "stored_length": length, "level": 6, "extents": []}
        for offset, length in members
    ]
    files = [
        {"name": "zip", "size": 8, "sha256": None, "deflated": deflated},
        {"name": "empty", "size": 0, "sha256": None},
        {"name": "last", "size": 5, "sha256": None},
    ]
    cont = encode_json({"format": "raw", "exact": True, "files": files})
    data = with_container(snapshot, cont, extents(*rows))
    if is_good:
        assert parse(data).container is not None
    else:
        refused(data)


# ---- the directory ----


def index_of(data: bytes) -> bytes:
    fields = tail_fields(data)
    return data[fields["index_offset"] :][: fields["index_length"]]


def with_entry(data: bytes, number: int, **fields: Any) -> bytes:
    index = bytearray(index_of(data))
    begin = structs.INDEX_HEAD.size + number * structs.SECTION.size
    entry = structs.SECTION.unpack(bytes(index[begin : begin + structs.SECTION.size])) | fields
    index[begin : begin + structs.SECTION.size] = structs.SECTION.pack(**entry)
    return with_index(data, bytes(index))


@pytest.mark.parametrize(
    "field", ["flags", "codec", "reserved", "offset", "stored_length", "raw_length", "checksum"]
)
@pytest.mark.parametrize("number", [0, 1, 4])  # entry 0 is the cold one, whose bytes opening never reads
def test_parse_refuses_hostile_section_entries(snapshot: bytes, number: int, field: str) -> None:
    begin = structs.INDEX_HEAD.size + number * structs.SECTION.size
    entry = structs.SECTION.unpack(index_of(snapshot)[begin : begin + structs.SECTION.size])
    for value in hostile(entry[field], 8 * structs.SECTION.dtype[field].itemsize):
        data = with_entry(snapshot, number, **{field: value})
        if number == 0 and field in ("checksum", "offset"):
            try:
                assert parse(data).names
            except FormatError:
                continue
        elif number == 0 and field == "codec" and value == structs.ZSTD:
            assert parse(data).names
        else:
            refused(data)


def test_parse_refuses_a_section_that_stands_twice(snapshot: bytes) -> None:
    assert "twice" in str(refused(with_entry(snapshot, 2, id=b"ARRS")))


def test_parse_refuses_an_unknown_required_section_by_name(snapshot: bytes) -> None:
    with pytest.raises(UnsupportedFormat, match="XYZW"):
        parse(with_entry(snapshot, 1, id=b"XYZW", flags=structs.REQUIRED))


def test_parse_ignores_an_unknown_optional_section(snapshot: bytes) -> None:
    count = len(raw_sections(snapshot))
    # The last hot section is TOOL, which a reader can do without.
    data = with_entry(snapshot, count, id=b"XYZW", flags=0, codec=9)
    assert parse(data).created_by is None
    assert parse(data).names == parse(snapshot).names


@pytest.mark.parametrize("section_id", [b"AB1D", b"A\0CD", b"\xff\xff\xff\xff"])
def test_parse_refuses_section_ids_that_are_no_letters(snapshot: bytes, section_id: bytes) -> None:
    refused(with_entry(snapshot, 1, id=section_id))


def test_parse_refuses_a_section_count_beyond_the_index(snapshot: bytes) -> None:
    for count in (0, 1, 65, 2**32 - 1):
        index = bytearray(index_of(snapshot))
        index[8:12] = count.to_bytes(4, "little")
        refused(with_index(snapshot, bytes(index)))


def test_parse_refuses_a_section_bomb_before_allocating(snapshot: bytes) -> None:
    packed = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    index = bytearray(index_of(snapshot)) + packed
    begin = structs.INDEX_HEAD.size + structs.SECTION.size
    entry = structs.SECTION.unpack(bytes(index[begin : begin + structs.SECTION.size]))
    entry |= {
        "codec": structs.ZSTD,
        "offset": len(index) - len(packed),
        "stored_length": len(packed),
        "checksum": _native.checksum(packed),
    }
    for claim in (64 << 20, 1 << 20):  # too much; a lie about the frame
        index[begin : begin + structs.SECTION.size] = structs.SECTION.pack(**(entry | {"raw_length": claim}))
        assert "claims" in str(refused(with_index(snapshot, bytes(index))))


def test_parse_names_features_it_does_not_know(snapshot: bytes) -> None:
    with pytest.raises(FormatError, match="SRCS and the feature bit `layers`"):
        parse(with_tail(snapshot, incompatible=structs.LAYERS))
    with pytest.raises(UnsupportedFormat, match="bit 5"):
        parse(with_tail(snapshot, incompatible=32))
    with pytest.raises(UnsupportedFormat, match="moonlight"):
        parse(with_sections(snapshot, lambda s: s.update(FEAT=b'["moonlight"]'), incompatible=2))


def test_parse_refuses_a_newer_major_version(snapshot: bytes) -> None:
    with pytest.raises(UnsupportedFormat, match=r"version 2\.0"):
        parse(with_tail(snapshot, major=2))


def test_parse_head_refuses_each_flipped_bit(snapshot: bytes) -> None:
    head = snapshot[: structs.HEAD.size]
    assert parse_head(URL, head)["chunk_size"] == 1 << 16
    for position in range(len(head)):
        damaged = bytearray(head)
        damaged[position] ^= 4
        with pytest.raises(FormatError, match="head"):
            parse_head(URL, bytes(damaged))


# ---- lookups ----


def test_record_of_agrees_with_the_runs(snapshot: bytes) -> None:
    index = parse(snapshot)
    expected: list[int | None] = []
    for _, count, first_record in index.runs.tolist():
        zero = first_record == structs.ZERO_RUN
        expected += [None if zero else first_record + i for i in range(count)]
    assert [index.record_of(chunk) for chunk in range(index.chunk_count)] == expected
    with pytest.raises(IndexError):
        index.record_of(index.chunk_count)


def test_rows_between_finds_arrays_that_touch_a_range(snapshot: bytes) -> None:
    index = parse(snapshot)
    for begin in range(0, index.content_size, 10_007):
        end = begin + 5_000
        expected = [
            row
            for row, (offset, nbytes) in enumerate(map(index.range_of, range(len(index.names))))
            if nbytes and offset < end and offset + nbytes > begin
        ]
        assert index.rows_between(begin, end) == expected
