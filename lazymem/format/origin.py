# SPDX-License-Identifier: Apache-2.0
"""What went into a snapshot: sections CONT and EXTN, from which `extract` gives the files back.

Owns their types and their validity. A file name from here becomes a path on the user's disk, so the
rules on names are the ones that keep an extraction inside its directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .sections import damaged

_MAX_SIZE: Final = 1 << 63
_FIELD: Final = "section CONT"


@dataclass(frozen=True, slots=True)
class DeflatedMember:
    """A zip member that is deflated again to give the file's bytes back.

    extents: (content_offset, length) of its uncompressed bytes, one after another.
    level: zlib's; the stream is raw deflate with zlib's default window and memory.
    """

    file_offset: int
    stored_length: int
    level: int
    extents: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class OriginFile:
    """One file that went in. name: relative, with "/". sha256: hexadecimal, or None if not taken."""

    name: str
    size: int
    sha256: str | None
    deflated: tuple[DeflatedMember, ...] = ()


@dataclass(frozen=True, slots=True)
class Origin:
    """The container that went in. exact: whether its files can be given back byte for byte."""

    format: str
    exact: bool
    files: tuple[OriginFile, ...]
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The value of section CONT."""
        files = []
        for file in self.files:
            entry: dict[str, Any] = {"name": file.name, "size": file.size, "sha256": file.sha256}
            if file.deflated:
                entry["deflated"] = [
                    {
                        "file_offset": member.file_offset,
                        "stored_length": member.stored_length,
                        "level": member.level,
                        "extents": [list(extent) for extent in member.extents],
                    }
                    for member in file.deflated
                ]
            files.append(entry)
        value: dict[str, Any] = {"format": self.format, "exact": self.exact, "files": files}
        if self.reason is not None:
            value["reason"] = self.reason
        return value


def unsafe_name(name: str) -> str | None:
    """Why `name` may not be the name of a file in a container, or None if it may."""
    if not name or "\0" in name or "\\" in name:
        return "is empty or holds a backslash or NUL"
    if not name.isprintable():
        return "holds characters that cannot be printed"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "is absolute or has an empty, '.' or '..' part"
    return None


def parse_origin(url: str, value: Mapping[str, Any], content_size: int) -> Origin:
    """Section CONT, checked on its own; tables.py holds EXTN against it."""
    form, exact, reason = value.get("format"), value.get("exact"), value.get("reason")
    files = value.get("files")
    if not isinstance(form, str) or not isinstance(exact, bool) or not isinstance(files, list):
        raise damaged(url, _FIELD, "lacks a format, exact or files of the right type")
    if reason is not None and not isinstance(reason, str):
        raise damaged(url, _FIELD, "has a reason that is not a string")
    parsed = tuple(_parse_file(url, entry, content_size) for entry in files)
    names = [file.name for file in parsed]
    if len(set(names)) != len(names):
        raise damaged(url, _FIELD, "names a file twice")
    return Origin(form, exact, parsed, reason)


def _integer(url: str, what: str, value: object, high: int) -> int:
    # bool is an int in Python, not in JSON.
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= high:
        raise damaged(url, _FIELD, f"has {what} {str(value)[:40]!r}, not a number from 0 to {high}")
    return value


def _parse_file(url: str, entry: object, content_size: int) -> OriginFile:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise damaged(url, _FIELD, "has a file without a name")
    name = entry["name"]
    why = unsafe_name(name)
    if why is not None:
        raise damaged(url, _FIELD, f"has a file name {name[:200]!r} that {why}")
    size = _integer(url, "a file size", entry.get("size"), _MAX_SIZE)
    sha256 = entry.get("sha256")
    if sha256 is not None and not (
        isinstance(sha256, str) and len(sha256) == 64 and not set(sha256) - set("0123456789abcdef")
    ):
        raise damaged(url, _FIELD, f"has a sha256 of {name!r} that is not 64 hexadecimal digits")
    members = entry.get("deflated", [])
    if not isinstance(members, list):
        raise damaged(url, _FIELD, f"has a deflated of {name!r} that is not a list")
    return OriginFile(name, size, sha256, tuple(_parse_deflated(url, m, size, content_size) for m in members))


def _parse_deflated(url: str, entry: object, size: int, content_size: int) -> DeflatedMember:
    if not isinstance(entry, dict) or not isinstance(entry.get("extents"), list):
        raise damaged(url, _FIELD, "has a deflated member without extents")
    offset = _integer(url, "a member's file_offset", entry.get("file_offset"), size)
    stored = _integer(url, "a member's stored_length", entry.get("stored_length"), size - offset)
    level = _integer(url, "a member's level", entry.get("level"), 9)
    extents = []
    for pair in entry["extents"]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise damaged(url, _FIELD, "has a member's extent that is not a pair")
        start = _integer(url, "an extent's content_offset", pair[0], content_size)
        extents.append((start, _integer(url, "an extent's length", pair[1], content_size - start)))
    return DeflatedMember(offset, stored, level, tuple(extents))
