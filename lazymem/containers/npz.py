# SPDX-License-Identifier: Apache-2.0
"""numpy's .npz archives: zip files whose members are .npy files.

Stored members are read in place. Deflated ones are only described (`ArrayEntry.compression`).
Members that are not .npy are no arrays, but remain part of the file.
"""

from __future__ import annotations

import zipfile
import zlib
from typing import Final

from ..store import locations
from ..store.base import Blob
from . import npy
from .base import ArrayEntry, Directory, damaged, unsupported
from .zipped import check_disjoint, check_names, data_start, for_each, list_members, member_of

_MAX_RATIO: Final = 1040  # deflate's own limit is 1032 to 1
_FIRST_INPUT: Final = 1 << 16


def read_npz(blob: Blob, members: list[zipfile.ZipInfo] | None = None) -> Directory:
    """The directory of an .npz file; `members` is what `list_members` gave, if it was asked already."""
    members = list_members(blob) if members is None else members
    arrays = [info for info in members if info.filename.endswith(".npy")]
    check_names(blob.url, arrays)

    def read(info: zipfile.ZipInfo) -> tuple[int, ArrayEntry]:
        start, head = data_start(blob, info, npy.FIRST_READ, npy.PREFIX)
        return start, _entry(blob, info, start, head, member_of(info))

    found = for_each(blob, arrays, read)
    check_disjoint(blob.url, [(info, start) for info, (start, _) in zip(arrays, found, strict=True)])
    entries = sorted((entry for _, entry in found), key=lambda entry: entry.offset)
    return Directory("npz", (blob,), (locations.name_of(blob.url),), tuple(entries))


def _entry(blob: Blob, info: zipfile.ZipInfo, start: int, head: bytes, member: str) -> ArrayEntry:
    url, method = blob.url, info.compress_type
    declared, stored = info.file_size, info.compress_size
    deflated = method == zipfile.ZIP_DEFLATED
    if deflated:
        if declared > _MAX_RATIO * stored:
            raise damaged(url, member, f"declares {declared} bytes from {stored} deflated ones")
        head = _inflate_header(blob, info, start, head, member)
    elif method != zipfile.ZIP_STORED:
        raise unsupported(
            url, member, f"is compressed by zip's method {method}", "save it with numpy.savez_compressed"
        )
    elif declared != stored:
        raise damaged(url, member, f"is stored, but in {stored} bytes instead of {declared}")
    size = npy.header_size(head[: npy.PREFIX], url=url, field=member)
    if size > declared:
        raise damaged(url, member, f"has a .npy header of {size} bytes in a member of {declared}")
    if size > len(head):  # only of a stored member: _inflate_header brings all
        head = blob.read(start, size)
    name = info.filename.removesuffix(".npy")
    header = npy.parse_header(head[:size], url=url, field=member, name=name)
    if header.nbytes > declared - size:
        raise damaged(url, member, f"needs {header.nbytes} bytes, but has {declared - size}")
    return ArrayEntry(
        name=name,
        dtype=header.dtype,
        shape=header.shape,
        order=header.order,
        file=0,
        offset=start if deflated else start + size,
        nbytes=header.nbytes,
        stored_length=stored if deflated else header.nbytes,
        compression="deflate" if deflated else None,
        skip=size if deflated else 0,
        member_size=declared if deflated else 0,
        crc32=info.CRC if deflated else None,
    )


def _inflate_header(blob: Blob, info: zipfile.ZipInfo, start: int, pending: bytes, member: str) -> bytes:
    """The first bytes of a deflated member: the whole .npy header and no more. pending: its first stored."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    output = bytearray()
    position, end, wanted = start + len(pending), start + info.compress_size, npy.PREFIX
    while len(output) < wanted and not inflater.eof:
        if not pending:
            if position == end:
                break
            pending = blob.read(position, min(_FIRST_INPUT, end - position))
            position += len(pending)
        try:
            output += inflater.decompress(pending, wanted - len(output))
        except zlib.error as error:
            raise damaged(blob.url, member, f"is no deflate stream ({error})") from None
        pending = inflater.unconsumed_tail
        if wanted == npy.PREFIX and len(output) == wanted:
            wanted = npy.header_size(bytes(output), url=blob.url, field=member)
    if len(output) < wanted:
        raise damaged(blob.url, member, f"ends after {len(output)} bytes, within the .npy header")
    return bytes(output)
