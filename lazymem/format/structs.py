# SPDX-License-Identifier: Apache-2.0
"""The byte tables, magics and limits of FORMAT.md, in code. Owns no logic.

tests/unit/test_format_spec.py compares every table here with its table in FORMAT.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

MAJOR: Final = 1
MINOR: Final = 0
#: The version of files that use layers; others stay what they were, to the byte.
MINOR_LAYERS: Final = 1

HEAD_MAGIC: Final = b"\x89LZM\r\n\x1a\n"
TAIL_MAGIC: Final = b"LZMTAIL\n"
INDEX_MAGIC: Final = b"LZMINDEX"


#: A field's type in numpy's words, and in those of `struct`, which is ten times as fast for one record.
_STRUCT_CODES: Final = {"u1": "B", "<u2": "H", "<u4": "I", "<u8": "Q"}


class Table:
    """One byte table: field names, offsets and sizes, and the numpy dtype made of them."""

    def __init__(self, fields: list[tuple[str, str]]) -> None:
        self.dtype: np.dtype[Any] = np.dtype(fields)  # packed: numpy adds no padding by default
        self.size: int = self.dtype.itemsize
        self._names = [name for name, _ in fields]
        codes = [f"{kind[1:]}s" if kind[0] == "V" else _STRUCT_CODES[kind] for _, kind in fields]
        self._struct = struct.Struct("<" + "".join(codes))  # "<": packed, too

    def pack(self, **values: object) -> bytes:
        """One record; fields not given are zeros."""
        record = np.zeros((), self.dtype)
        for name, value in values.items():
            record[name] = value
        return record.tobytes()

    def unpack(self, data: bytes | memoryview) -> dict[str, Any]:
        """One record as Python integers and bytes. `data` must be exactly `size` bytes."""
        if len(data) != self.size:
            raise ValueError(f"{len(data)} bytes for a record of {self.size}")
        return dict(zip(self._names, self._struct.unpack(data), strict=True))

    def unpack_all(self, data: bytes | memoryview) -> Iterator[dict[str, Any]]:
        """Records one after another, each as `unpack` gives it. `data`: a multiple of `size` bytes."""
        for values in self._struct.iter_unpack(data):
            yield dict(zip(self._names, values, strict=True))


HEAD: Final = Table(
    [
        ("magic", "V8"),
        ("major", "<u2"),
        ("minor", "<u2"),
        ("head_size", "<u4"),
        ("incompatible", "<u8"),
        ("chunk_size", "<u4"),
        ("reserved", "V28"),
        ("checksum", "<u8"),
    ]
)

TAIL: Final = Table(
    [
        ("magic", "V8"),
        ("major", "<u2"),
        ("minor", "<u2"),
        ("tail_size", "<u4"),
        ("incompatible", "<u8"),
        ("compatible", "<u8"),
        ("index_offset", "<u8"),
        ("index_length", "<u8"),
        ("index_checksum", "<u8"),
        ("file_size", "<u8"),
        ("content_size", "<u8"),
        ("chunk_size", "<u4"),
        ("reserved0", "<u4"),
        ("digest", "V32"),
        ("reserved1", "<u8"),
        ("checksum", "<u8"),
    ]
)

INDEX_HEAD: Final = Table([("magic", "V8"), ("section_count", "<u4"), ("reserved", "<u4")])

SECTION: Final = Table(
    [
        ("id", "V4"),
        ("flags", "<u2"),
        ("codec", "u1"),
        ("reserved", "u1"),
        ("offset", "<u8"),
        ("stored_length", "<u8"),
        ("raw_length", "<u8"),
        ("checksum", "<u8"),
    ]
)

RUN: Final = Table([("first_chunk", "<u8"), ("count", "<u8"), ("first_record", "<u8")])

CHUNK: Final = Table(
    [
        ("offset", "<u8"),
        ("stored_length", "<u4"),
        ("codec", "u1"),
        ("filter", "u1"),
        ("width", "u1"),
        ("flags", "u1"),
        ("source", "<u2"),
        ("reserved0", "<u2"),
        ("reserved1", "<u4"),
        ("checksum", "<u8"),
    ]
)

ARRAY: Final = Table(
    [
        ("offset", "<u8"),
        ("nbytes", "<u8"),
        ("name_offset", "<u4"),
        ("name_length", "<u4"),
        ("shape_offset", "<u4"),
        ("dtype", "<u4"),
        ("ndim", "u1"),
        ("flags", "u1"),
        ("reserved", "V6"),
    ]
)

EXTENT: Final = Table(
    [
        ("file", "<u4"),
        ("reserved", "<u4"),
        ("file_offset", "<u8"),
        ("content_offset", "<u8"),
        ("length", "<u8"),
    ]
)

#: The fast way to make one CHNK record; the same bytes as CHUNK.pack (a test compares them).
CHUNK_STRUCT: Final = struct.Struct("<QIBBBBHHIQ")

# Sections.
REQUIRED: Final = 1
COLD: Final = 2
SECTION_FLAGS: Final = {
    "RUNS": REQUIRED,
    "CHNK": REQUIRED,
    "ARRS": REQUIRED,
    "NAME": REQUIRED,
    "SHAP": REQUIRED,
    "DTYP": REQUIRED,
    "VIEW": REQUIRED,
    "META": 0,
    "CONT": 0,
    "EXTN": 0,
    "SRCS": 0,
    "FEAT": 0,
    "TOOL": 0,
    "CDIG": COLD,
}
#: Required, so that an old reader refuses them, but only there where there is something to say.
MAY_BE_ABSENT: Final = frozenset({"VIEW"})
#: The sections that the digest covers, in its order.
DIGEST_SECTIONS: Final = ("ARRS", "NAME", "SHAP", "DTYP", "META", "CONT", "EXTN", "VIEW")
DIGEST_PREFIX: Final = b"lazymem content 1\n"
DIGEST_SIZE: Final = 32

# Codecs and filters.
RAW: Final = 0
LZ4: Final = 1
ZSTD: Final = 2
CODEC_NAMES: Final = {RAW: "raw", LZ4: "lz4", ZSTD: "zstd"}
FILTER_NONE: Final = 0
FILTER_PLANES: Final = 1
FILTER_FLOAT_PLANES: Final = 2
FILTER_NAMES: Final = {FILTER_PLANES: "planes", FILTER_FLOAT_PLANES: "float-planes"}
PLANE_WIDTHS: Final = (2, 4, 8)
ZERO_RUN: Final = 0xFFFF_FFFF_FFFF_FFFF

# Array flags.
FORTRAN: Final = 1
HIDDEN: Final = 2

# Incompatible features: bit -> name.
LAYERS: Final = 1
FEATURE_BITS: Final = {LAYERS: "layers"}
KNOWN_INCOMPATIBLE: Final = LAYERS

# Limits.
MAX_CONTENT: Final = 1 << 46
MAX_SECTIONS: Final = 64
MAX_NAME: Final = 65_535
MAX_NDIM: Final = 64
MAX_BASES: Final = 16
MAX_ELEMENTS_BYTES: Final = 1 << 62  # of an array's non-zero dimensions and item size multiplied
SECTION_FREE_RAW: Final = 16 << 20
SECTION_MAX_RATIO: Final = 1000
#: What a reader reads first; a snapshot whose index fits is open after this one read.
TAIL_READ: Final = 64 << 10
#: Chunks of a file with codec "none" start at multiples of this, so that it can be mapped.
MAP_ALIGNMENT: Final = 4096


def section_limit(stored_length: int) -> int:
    """The largest raw_length that a section of `stored_length` bytes may claim."""
    return SECTION_FREE_RAW + SECTION_MAX_RATIO * stored_length
