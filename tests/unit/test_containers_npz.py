# SPDX-License-Identifier: Apache-2.0
""".npz archives: stored members in place, deflated ones described, bad ones refused by name."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lazymem.errors import FormatError, UnsupportedFormat

from .openers import open_container

ARRAYS: dict[str, NDArray[Any]] = {
    "a": np.arange(6, dtype="<f4").reshape(2, 3),
    "слой/вес": np.asfortranarray(np.arange(12).reshape(3, 4)),
    "empty": np.zeros((0, 3)),
    "scalar": np.array(3, ">u2"),
    "big": np.zeros(300_000, "u1"),
}


def npy_bytes(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def write_zip(
    path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED, **options: Any
) -> Path:
    with zipfile.ZipFile(path, "w", method, **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_shows_what_was_saved(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "x.npz"
    save(path, **ARRAYS)
    directory = open_container(path)
    assert directory.format == "npz"
    assert {entry.name for entry in directory.arrays} == set(ARRAYS)
    assert [entry.offset for entry in directory.arrays] == sorted(entry.offset for entry in directory.arrays)
    for entry in directory.arrays:
        array = ARRAYS[entry.name]
        data = directory.files[0].read(entry.offset, entry.stored_length)
        if save is np.savez_compressed:
            assert entry.compression == "deflate"
            member = zlib.decompress(data, -zlib.MAX_WBITS)
            assert (len(member), zlib.crc32(member)) == (entry.member_size, entry.crc32)
            data = member[entry.skip :]
        else:
            assert (entry.compression, entry.skip, entry.crc32) == (None, 0, None)
        order: Any = entry.order
        shown = np.ndarray(entry.shape, entry.dtype, data, order=order)
        assert (shown.dtype, shown.shape, shown.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_npz_without_members_has_no_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz")
    assert list(open_container(tmp_path / "x.npz").arrays) == []


def test_npz_ignores_members_that_are_not_npy(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.npz", {"README": b"text", "a.npy": npy_bytes(np.arange(3)), "b": b"PK"})
    assert [entry.name for entry in open_container(path).arrays] == ["a"]


def test_npz_after_other_bytes_is_read_where_it_lies(tmp_path: Path) -> None:
    """As a self-extracting archive has them: the directory's offsets count from the zip's start."""
    archive = write_zip(tmp_path / "zip", {"a.npy": npy_bytes(np.arange(3, dtype="u1"))}).read_bytes()
    path = tmp_path / "x.npz"
    path.write_bytes(b"#!/bin/sh\n" + archive)
    directory = open_container(path, as_format="npz")
    assert directory.files[0].read(directory.arrays[0].offset, 3) == b"\x00\x01\x02"


def test_npz_with_long_names_and_extra_fields_is_read(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("n" * 5000 + ".npy")
    info.extra = struct.pack("<HH", 0x9999, 4000) + bytes(4000)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr(info, npy_bytes(np.arange(3, dtype="u1")))
    directory = open_container(tmp_path / "x.npz")
    assert directory.files[0].read(directory.arrays[0].offset, 3) == b"\x00\x01\x02"


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_npz_of_other_compression_says_so(tmp_path: Path, method: int) -> None:
    path = write_zip(tmp_path / "x.npz", {"a.npy": npy_bytes(np.arange(3))}, method)
    with pytest.raises(UnsupportedFormat, match=r"member 'a\.npy' is compressed by zip's method"):
        open_container(path)


def test_npz_object_array_is_refused_by_member(tmp_path: Path) -> None:
    members = {"good.npy": npy_bytes(np.arange(3)), "o.npy": npy_bytes(np.array([{}]))}
    path = write_zip(tmp_path / "x.npz", members)
    with pytest.raises(UnsupportedFormat, match=r"array 'o' has dtype object") as caught:
        open_container(path)
    assert caught.value.field == "member 'o.npy'"


def test_npz_member_twice_is_refused(tmp_path: Path) -> None:
    data = npy_bytes(np.arange(3))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", data)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npy", data)
    with pytest.raises(FormatError, match=r"member 'a\.npy' stands twice"):
        open_container(tmp_path / "x.npz")


def central(data: bytes, number: int = 0) -> int:
    """Where the central directory's entry of that number begins."""
    at = -1
    for _ in range(number + 1):
        at = data.index(b"PK\x01\x02", at + 1)
    return at


def poke(path: Path, offset: int, layout: str, value: int) -> None:
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, offset, value)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("field", "layout", "value", "says"),
    [
        (8, "<H", 0x1, "encrypted"),
        (20, "<I", 0x7FFFFFFF, "stands twice|needs|stored"),
        (24, "<I", 1, "is stored, but in"),
        (42, "<I", 5, "no header of its name"),
        (42, "<I", 1 << 20, "header at byte"),
    ],
)
def test_npz_hostile_directory_entry_is_refused(
    tmp_path: Path, field: int, layout: str, value: int, says: str
) -> None:
    path = write_zip(tmp_path / "x.npz", {"a.npy": npy_bytes(np.arange(3))})
    poke(path, central(path.read_bytes()) + field, layout, value)
    with pytest.raises(FormatError, match=says) as caught:
        open_container(path)
    assert caught.value.field == "member 'a.npy'"


def test_npz_local_name_of_another_member_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.npz", {"a.npy": npy_bytes(np.arange(3)), "b.npy": npy_bytes(np.arange(3))})
    data = path.read_bytes()
    poke(path, central(data, 0) + 42, "<I", data.index(b"PK\x03\x04", 1))
    with pytest.raises(FormatError, match=r"member 'a\.npy' has no header of its name"):
        open_container(path)


def test_npz_overlapping_members_are_refused(tmp_path: Path) -> None:
    inner = npy_bytes(np.arange(200, dtype="u1"))
    inside = io.BytesIO()
    with zipfile.ZipFile(inside, "w") as archive:
        archive.writestr("b.npy", inner)
    local = inside.getvalue()[: 30 + 5 + len(inner)]
    outer = npy_bytes(np.frombuffer(local, "u1"))
    path = write_zip(tmp_path / "x.npz", {"a.npy": outer, "b.npy": inner})
    data = path.read_bytes()
    poke(path, central(data, 1) + 42, "<I", data.index(b"PK\x03\x04", 1))
    with pytest.raises(FormatError, match=r"member 'b\.npy' overlaps"):
        open_container(path)


def test_npz_deflate_bomb_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.npz", {"a.npy": npy_bytes(np.zeros(9000, "u1"))}, zipfile.ZIP_DEFLATED)
    poke(path, central(path.read_bytes()) + 24, "<I", 0x7FFFFFFF)
    with pytest.raises(FormatError, match=r"member 'a\.npy' declares 2147483647 bytes"):
        open_container(path)


WHOLE = npy_bytes(np.arange(100))


@pytest.mark.parametrize("data", [b"", b"\x93NUM", WHOLE[:40], WHOLE[:-1], b"x" * 99])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_npz_member_that_is_cut_short_is_refused_by_name(tmp_path: Path, data: bytes, method: int) -> None:
    path = write_zip(tmp_path / "x.npz", {"ok.npy": npy_bytes(np.arange(3)), "bad.npy": data}, method)
    with pytest.raises(FormatError, match=r"member 'bad\.npy'"):
        open_container(path)


def test_npz_zip64_is_read(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "x.npz", "w") as archive,
        archive.open("a.npy", "w", force_zip64=True) as stream,
    ):
        stream.write(npy_bytes(np.arange(3, dtype="u1")))
    directory = open_container(tmp_path / "x.npz")
    assert directory.files[0].read(directory.arrays[0].offset, 3) == b"\x00\x01\x02"
