# SPDX-License-Identifier: Apache-2.0
"""Index sections: the directory at the index's start, compression, checksums, JSON. Owns no meaning.

Every number of the directory is hostile: it is checked before it is used as a size or an offset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

import zstandard

from .. import _native
from ..errors import FormatError, UnsupportedFormat
from . import structs

#: A section level: sections are small and read at every open, so decode speed counts, and zstd
#: decodes all levels alike.
_LEVEL: Final = 9


def damaged(url: str, field: str, what: str) -> FormatError:
    """The one sentence for a file that breaks FORMAT.md; `what` says what was found."""
    return FormatError(
        f"{url}: {field} {what}; the snapshot is damaged: copy the file again or build it anew",
        url=url,
        field=field,
    )


def unsupported(url: str, field: str, what: str) -> UnsupportedFormat:
    """The one sentence for a file that a newer lazymem wrote."""
    return UnsupportedFormat(
        f"{url}: {field} {what}, which this lazymem does not know: use a newer lazymem",
        url=url,
        field=field,
    )


class Section(NamedTuple):
    """One entry of the directory. offset: from the start of the file, for hot sections too."""

    id: str
    flags: int
    codec: int
    offset: int
    stored_length: int
    raw_length: int
    checksum: int


@dataclass(frozen=True, slots=True)
class EncodedSection:
    """A section ready for the file: its entry (offset still to be set) and its stored bytes."""

    id: str
    codec: int
    raw_length: int
    stored: bytes

    def entry(self, offset: int) -> bytes:
        """The directory entry, `offset` being what FORMAT.md says for hot or cold."""
        return structs.SECTION.pack(
            id=self.id.encode("ascii"),
            flags=structs.SECTION_FLAGS[self.id],
            codec=self.codec,
            offset=offset,
            stored_length=len(self.stored),
            raw_length=self.raw_length,
            checksum=_native.checksum(self.stored),
        )


def encode_section(section_id: str, raw: bytes) -> EncodedSection:
    """Compress `raw` where that shrinks it and stays within the reader's limit on expansion."""
    if len(raw) >= 64:
        packed = zstandard.ZstdCompressor(level=_LEVEL).compress(raw)
        if len(packed) < len(raw) and len(raw) <= structs.section_limit(len(packed)):
            return EncodedSection(section_id, structs.ZSTD, len(raw), packed)
    return EncodedSection(section_id, structs.RAW, len(raw), raw)


def encode_index(hot: list[EncodedSection], cold: Mapping[int, EncodedSection]) -> bytes:
    """The whole index; `cold` maps the file offset of each cold section to it."""
    count = len(hot) + len(cold)
    position = structs.INDEX_HEAD.size + count * structs.SECTION.size
    parts = [structs.INDEX_HEAD.pack(magic=structs.INDEX_MAGIC, section_count=count)]
    parts += [section.entry(offset) for offset, section in cold.items()]
    for section in hot:
        parts.append(section.entry(position))
        position += len(section.stored)
    parts += [section.stored for section in hot]
    return b"".join(parts)


def parse_directory(url: str, index: bytes, index_offset: int) -> dict[str, Section]:
    """The entries of the index that lies at `index_offset` of the file, each within its bounds."""
    head_size = structs.INDEX_HEAD.size
    if len(index) < head_size:
        raise damaged(url, "index", f"has {len(index)} bytes, fewer than its own head")
    head = structs.INDEX_HEAD.unpack(index[:head_size])
    count = head["section_count"]
    if head["magic"] != structs.INDEX_MAGIC:
        raise damaged(url, "index magic", f"is {head['magic']!r}")
    if head["reserved"]:
        raise damaged(url, "index reserved", "is not zero")
    if count > structs.MAX_SECTIONS:
        raise damaged(url, "section_count", f"is {count}, more than {structs.MAX_SECTIONS}")
    body = head_size + count * structs.SECTION.size
    if body > len(index):
        raise damaged(url, "section_count", f"is {count}, more than the index has room for")

    sections: dict[str, Section] = {}
    unknown: set[str] = set()
    for entry in structs.SECTION.unpack_all(index[head_size:body]):
        section = _parse_entry(url, entry, body, len(index), index_offset)
        if section.id in sections:
            raise damaged(url, f"section {section.id}", "stands in the index twice")
        sections[section.id] = section
        if section.id not in structs.SECTION_FLAGS:
            unknown.add(section.id)
            if section.flags & structs.REQUIRED:
                raise unsupported(url, f"section {section.id}", "is a required section")

    ordered = sorted(sections.values(), key=lambda s: (s.offset, s.stored_length))
    for before, after in pairwise(ordered):
        if after.offset < before.offset + before.stored_length:
            raise damaged(url, f"section {after.id}", f"overlaps section {before.id}")
    for section_id, flags in structs.SECTION_FLAGS.items():
        needed = flags & structs.REQUIRED and section_id not in structs.MAY_BE_ABSENT
        if needed and section_id not in sections:
            raise damaged(url, f"section {section_id}", "is missing")
    return {name: section for name, section in sections.items() if name not in unknown}


def _parse_entry(
    url: str, entry: Mapping[str, Any], body: int, index_length: int, index_offset: int
) -> Section:
    section_id = entry["id"].decode("latin-1")
    field = f"section {section_id!r}"
    if not (section_id.isascii() and section_id.isalpha()):
        raise damaged(url, field, "has an id that is not four ASCII letters")
    field = f"section {section_id}"
    if entry["reserved"]:
        raise damaged(url, field, "has reserved bits that are not zero")
    flags = entry["flags"]
    if flags & ~(structs.REQUIRED | structs.COLD):
        raise damaged(url, field, f"has unknown flags {flags:#x}")
    expected = structs.SECTION_FLAGS.get(section_id)
    if expected is not None and flags != expected:
        raise damaged(url, field, f"has flags {flags}, not {expected}")
    if expected is not None and entry["codec"] not in (structs.RAW, structs.ZSTD):
        raise unsupported(url, field, f"has codec {entry['codec']}")
    offset, stored, raw = entry["offset"], entry["stored_length"], entry["raw_length"]
    low, high, base = (structs.HEAD.size, index_offset, 0)
    if not flags & structs.COLD:
        low, high, base = body, index_length, index_offset
    # Python integers do not overflow, so the sum is safe to compare.
    if offset < low or offset + stored > high:
        raise damaged(url, field, f"lies at {offset} with {stored} bytes, outside its place in the file")
    if entry["codec"] == structs.RAW and raw != stored:
        raise damaged(url, field, f"is raw with {stored} bytes but claims {raw}")
    if raw > structs.section_limit(stored):
        raise damaged(url, field, f"claims to expand {stored} bytes to {raw}")
    return Section(section_id, flags, entry["codec"], base + offset, stored, raw, entry["checksum"])


def decode_section(
    url: str,
    section: Section,
    stored: bytes | memoryview,
    decompressor: zstandard.ZstdDecompressor | None = None,
) -> bytes:
    """The raw bytes of `section`, whose stored bytes are given; checksum and size are verified.

    decompressor: for who decodes several; making one allocates 150 KiB.
    """
    field = f"section {section.id}"
    if len(stored) != section.stored_length or _native.checksum(stored) != section.checksum:
        raise damaged(url, field, "does not match its checksum")
    if section.codec == structs.RAW:
        return bytes(stored)
    try:
        # decompress() allocates what the frame claims, so that number is checked first.
        claimed = zstandard.frame_content_size(stored)
        if claimed != section.raw_length:
            raise damaged(url, field, f"claims {section.raw_length} bytes but its frame says {claimed}")
        decompressor = decompressor or zstandard.ZstdDecompressor()
        raw = decompressor.decompress(stored, max_output_size=section.raw_length)
    except zstandard.ZstdError as error:
        raise damaged(url, field, f"does not decompress ({error})") from None
    if len(raw) != section.raw_length:
        raise damaged(url, field, f"decompresses to {len(raw)} bytes, not {section.raw_length}")
    return raw


def encode_json(value: object) -> bytes:
    """The one spelling of a JSON section: sorted keys, no spaces, UTF-8. Digests depend on it.

    Raises `TypeError` or `ValueError` where `value` is not JSON.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def decode_json(url: str, section_id: str, raw: bytes, kind: type) -> Any:
    """Parse a JSON section and check that its outermost value is a `kind` (dict or list)."""
    field = f"section {section_id}"
    try:
        value = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise damaged(url, field, "is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise damaged(url, field, f"is not JSON ({error})") from None
    if not isinstance(value, kind):
        raise damaged(url, field, f"is a JSON {type(value).__name__}, not a {kind.__name__}")
    return value
