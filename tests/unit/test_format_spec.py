# SPDX-License-Identifier: Apache-2.0
"""FORMAT.md against the code: every byte table, the sections, magics and limits."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from lazymem._native._core import ffi

import lazymem.format
from lazymem._native import index
from lazymem.format import structs
from lazymem.format.encode import EncodedChunk

SPEC = (Path(lazymem.format.__file__).parent / "FORMAT.md").read_text("utf-8")

Row = tuple[int, int, str, str]


def byte_tables() -> dict[str, list[list[Row]]]:
    """Heading -> its tables of (offset, size, field, value)."""
    tables: dict[str, list[list[Row]]] = {}
    heading = ""
    current: list[Row] | None = None
    for line in SPEC.splitlines():
        if line.startswith("#"):
            heading, current = line.strip("# "), None
        elif line.startswith("| offset | size | field"):
            current = []
            tables.setdefault(heading, []).append(current)
        elif current is not None and line.startswith("|---"):
            continue
        elif current is not None and line.startswith("|"):
            offset, size, field, value = (cell.strip() for cell in line.strip("|").split("|"))
            current.append((int(offset), int(size), field, value))
        else:
            current = None
    return tables


TABLES = byte_tables()
IN_CODE = {
    ("Head", 0): structs.HEAD,
    ("Tail", 0): structs.TAIL,
    ("Index", 0): structs.INDEX_HEAD,
    ("Index", 1): structs.SECTION,
    ("RUNS", 0): structs.RUN,
    ("CHNK", 0): structs.CHUNK,
    ("ARRS", 0): structs.ARRAY,
    ("EXTN", 0): structs.EXTENT,
}


def test_spec_has_exactly_the_tables_of_the_code() -> None:
    found = {(heading, i) for heading, tables in TABLES.items() for i in range(len(tables))}
    assert found == set(IN_CODE)


@pytest.mark.parametrize("key", IN_CODE, ids=str)
def test_spec_table_matches_code(key: tuple[str, int]) -> None:
    heading, number = key
    table = IN_CODE[key]
    fields = table.dtype.fields
    assert fields is not None
    # Reserved fields need distinct names in code only.
    in_code = [
        (offset, dtype.itemsize, re.sub(r"^(reserved)\d$", r"\1", name))
        for name, (dtype, offset, *_) in fields.items()
    ]
    assert [row[:3] for row in TABLES[heading][number]] == in_code
    last = TABLES[heading][number][-1]
    assert last[0] + last[1] == table.size


@pytest.mark.parametrize(
    ("key", "magic"),
    [
        (("Head", 0), structs.HEAD_MAGIC),
        (("Tail", 0), structs.TAIL_MAGIC),
        (("Index", 0), structs.INDEX_MAGIC),
    ],
)
def test_spec_magic_matches_code(key: tuple[str, int], magic: bytes) -> None:
    value = TABLES[key[0]][key[1]][0][3]
    found = re.match(r"`([0-9A-F ]+)`", value)
    assert found is not None
    assert bytes.fromhex(found[1]) == magic


def test_spec_sections_match_code() -> None:
    rows = re.findall(r"^\| ([A-Z]{4}) \| ([a-z, ]+) \|", SPEC, re.M)
    words = {"yes": structs.REQUIRED, "no": 0, "no, cold": structs.COLD, "where present": structs.REQUIRED}
    assert {name for name, required in rows if required == "where present"} == structs.MAY_BE_ABSENT
    assert {name: words[required] for name, required in rows} == structs.SECTION_FLAGS


def test_spec_digest_sections_match_code() -> None:
    found = re.search(r"for ((?:[A-Z]{4}, )+[A-Z]{4} and [A-Z]{4}) in this order", SPEC)
    assert found is not None
    assert tuple(re.findall("[A-Z]{4}", found[1])) == structs.DIGEST_SECTIONS
    assert structs.DIGEST_PREFIX.decode().replace("\n", "\\n") in SPEC


@pytest.mark.parametrize(
    ("heading", "table", "field", "text"),
    [
        ("Head", 0, "head_size", str(structs.HEAD.size)),
        ("Head", 0, "major", str(structs.MAJOR)),
        ("Tail", 0, "tail_size", str(structs.TAIL.size)),
        ("Tail", 0, "content_size", f"at most 2^{structs.MAX_CONTENT.bit_length() - 1}"),
        ("Tail", 0, "chunk_size", "a power of two, 2^16 to 2^26"),
        ("Index", 0, "section_count", f"at most {structs.MAX_SECTIONS}"),
        ("Index", 1, "raw_length", "at most 16 MiB + 1000 \u00d7 stored_length"),
        ("ARRS", 0, "name_length", f"bytes; at most {structs.MAX_NAME:,}"),
        ("ARRS", 0, "ndim", f"at most {structs.MAX_NDIM}"),
        ("CHNK", 0, "codec", "0 raw, 1 lz4 (block), 2 zstd (one frame)"),
    ],
)
def test_spec_value_matches_code(heading: str, table: int, field: str, text: str) -> None:
    values = {row[2]: row[3] for row in TABLES[heading][table]}
    assert values[field] == text


def test_spec_limits_match_code() -> None:
    assert structs.section_limit(3) == 16 * 2**20 + 3000
    assert f"item size are at most 2^{structs.MAX_ELEMENTS_BYTES.bit_length() - 1}" in SPEC
    assert {structs.RAW: "raw", structs.LZ4: "lz4", structs.ZSTD: "zstd"} == structs.CODEC_NAMES


def test_native_limits_are_those_of_the_code() -> None:
    assert {
        "HEAD_SIZE": structs.HEAD.size,
        "MAX_SOURCES": structs.MAX_BASES + 1,
        "MAX_NDIM": structs.MAX_NDIM,
        "MAX_NAME": structs.MAX_NAME,
        "MAX_SIZE": structs.MAX_ELEMENTS_BYTES,
        "ARRAY_FLAGS": structs.FORTRAN | structs.HIDDEN,
    } == index.LIMITS


def test_chunk_struct_packs_what_the_table_packs() -> None:
    chunk = EncodedChunk(b"12345", structs.ZSTD, structs.FILTER_PLANES, 4, 0x0123456789ABCDEF, bytes(32))
    assert chunk.record(1 << 40) == structs.CHUNK.pack(
        offset=1 << 40,
        stored_length=5,
        codec=structs.ZSTD,
        filter=structs.FILTER_PLANES,
        width=4,
        checksum=0x0123456789ABCDEF,
    )


def test_unpack_keeps_trailing_zeros_of_bytes_fields() -> None:
    packed = structs.SECTION.pack(id=b"AB\0\0", raw_length=7)
    assert structs.SECTION.unpack(packed)["id"] == b"AB\0\0"
    assert structs.SECTION.unpack(packed)["raw_length"] == 7


def test_native_records_have_the_sizes_of_the_tables() -> None:
    # The C core uses these records where they lie.
    for kind, table in (
        ("lm_run", structs.RUN),
        ("lm_chunk_record", structs.CHUNK),
        ("lm_array_row", structs.ARRAY),
        ("lm_extent_row", structs.EXTENT),
    ):
        assert table.size == ffi.sizeof(kind)
        for name, (_, offset, *_) in (table.dtype.fields or {}).items():
            assert ffi.offsetof(kind, name) == offset
    assert np.dtype("<u8").newbyteorder("=") == np.uint64  # little-endian host
