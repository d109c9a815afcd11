# SPDX-License-Identifier: Apache-2.0
""".npy files read in place give what numpy.load gives, and bad ones are refused by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from lazymem.containers import npy
from lazymem.containers.base import Directory
from lazymem.errors import FormatError, UnsupportedDtype, UnsupportedFormat

from .openers import open_container


def show(directory: Directory, name: str = "data") -> NDArray[Any]:
    """The array as the entry describes it: from its bytes, dtype, shape and order."""
    (entry,) = [entry for entry in directory.arrays if entry.name == name]
    assert entry.compression is None
    data = directory.files[entry.file].read(entry.offset, entry.nbytes)
    order: Any = entry.order
    return np.ndarray(entry.shape, entry.dtype, data, order=order)


def header_file(
    path: Path, header: str, *, version: int = 1, data: bytes = b"", length: int | None = None
) -> Path:
    text = header.encode("utf-8" if version == 3 else "latin1")
    width = 2 if version == 1 else 4
    size = (len(text) if length is None else length).to_bytes(width, "little")
    path.write_bytes(npy.MAGIC + bytes([version, 0]) + size + text + data)
    return path


ARRAYS = [
    np.arange(24, dtype="<f4").reshape(2, 3, 4),
    np.asfortranarray(np.arange(12, dtype=">i8").reshape(3, 4)),
    np.array(7, dtype="<u2"),
    np.zeros((3, 0, 2), "<f8"),
    np.array([("a", 1.5)], dtype=[("имя", "S3"), ("y", "<f8", (1,))]),
    np.array(["2020-01-01"], dtype="M8[D]"),
    np.arange(3, dtype="<i4").reshape((1,) * 31 + (3,)),
]


@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}"[:40])
def test_npy_shows_what_was_saved(tmp_path: Path, array: NDArray[Any]) -> None:
    path = tmp_path / "x.npy"
    np.save(path, array)
    directory = open_container(path)
    assert (directory.format, list(directory.file_names)) == ("npy", ["x.npy"])
    shown = show(directory)
    assert (shown.dtype, shown.shape, shown.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert directory.arrays[0].order == ("F" if array.flags.fnc else "C")


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_every_version_reads(tmp_path: Path, version: tuple[int, int]) -> None:
    path, array = tmp_path / "x.npy", np.arange(5, dtype="<i2")
    with open(path, "wb") as file:
        np.lib.format.write_array(file, array, version=version)
    assert show(open_container(path)).tolist() == [0, 1, 2, 3, 4]


def test_npy_of_bfloat16_stays_void_as_numpy_wrote_it(tmp_path: Path) -> None:
    array = np.array([1, 2], ml_dtypes.bfloat16)
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array(file, array.view("V2"))
    shown = show(open_container(tmp_path / "x.npy"))
    assert shown.dtype == np.dtype("V2")
    assert shown.view(ml_dtypes.bfloat16).tolist() == [1, 2]


def test_npy_bytes_after_the_array_are_ignored(tmp_path: Path) -> None:
    with open(tmp_path / "x.npy", "wb") as file:
        np.save(file, np.arange(3))
        np.save(file, np.arange(4))
    assert show(open_container(tmp_path / "x.npy")).tolist() == [0, 1, 2]


def test_npy_object_array_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UnsupportedFormat, match=r"x\.npy: array 'data' has dtype object"):
        open_container(tmp_path / "x.npy")


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n"


def test_npy_header_template_is_good(tmp_path: Path) -> None:
    assert show(open_container(header_file(tmp_path / "x.npy", GOOD, data=bytes(8)))).tolist() == [0, 0]


@pytest.mark.parametrize(
    "header",
    [
        GOOD.replace("(2,)", "(3,)"),
        GOOD.replace("(2,)", "(-1,)"),
        GOOD.replace("(2,)", "(2**70,)"),
        GOOD.replace("(2,)", f"({2**70},)"),
        GOOD.replace("(2,)", f"({2**62}, {2**62})"),
        GOOD.replace("(2,)", f"(0, {2**62}, {2**62})"),
        GOOD.replace("(2,)", "(True,)"),
        GOOD.replace("(2,)", "(2.0,)"),
        GOOD.replace("(2,)", str((1,) * 65)),
        GOOD.replace("(2,)", "2"),
        GOOD.replace("False", "0"),
        GOOD.replace("<f4", "<f5"),
        GOOD.replace("<f4", "|V4294967296"),
        GOOD.replace("'<f4'", "[('a', '<f4'), ('a', '<f4')]"),
        GOOD.replace("'<f4'", "['<f4']"),
        GOOD.replace("'<f4'", "None"),
        GOOD.replace("'<f4'", "('<f4', (2,))"),
        GOOD.replace("}", "'more': 1}"),
        "(" * 100_000,
        "-" * 60_000 + "1",
        "[" * 90 + "]" * 90,
        "",
        "{",
        "__import__('os').abort()",
        "\0" * 40,
    ],
    ids=range(25),
)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_npy_hostile_header_is_refused(tmp_path: Path, header: str, version: int) -> None:
    if version == 1 and len(header) > 65535:
        header = header[:65535]
    path = header_file(tmp_path / "x.npy", header, version=version, data=bytes(8))
    with pytest.raises(FormatError) as caught:
        open_container(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("length", [npy.MAX_HEADER + 1, 2**32 - 1])
def test_npy_huge_header_is_refused_unread(tmp_path: Path, length: int) -> None:
    path = header_file(tmp_path / "x.npy", GOOD, version=2, length=length)
    with pytest.raises(FormatError, match="limit"):
        open_container(path)


def test_npy_unknown_version_says_so(tmp_path: Path) -> None:
    path = header_file(tmp_path / "x.npy", GOOD, version=4)
    with pytest.raises(UnsupportedFormat, match=r"version 4\.0"):
        open_container(path)


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}"[:40])
def test_npy_made_header_is_what_numpy_loads(array: NDArray[Any]) -> None:
    order = "F" if array.flags.fnc else "C"
    header = npy.make_header(array.dtype, array.shape, order, name="x")
    loaded = np.load(io.BytesIO(header + array.tobytes("A")))
    assert len(header) % 64 == 0
    assert (loaded.dtype, loaded.shape, loaded.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_npy_made_header_may_be_longer_than_version_one_allows() -> None:
    dtype = np.dtype([(f"a field with a long name, number {i}", "<f4") for i in range(2000)])
    data = npy.make_header(dtype, (2,), "C", name="x") + bytes(2 * dtype.itemsize)
    loaded = np.load(io.BytesIO(data), max_header_size=1 << 20)
    assert loaded.dtype == dtype


def test_npy_made_header_shows_extension_dtypes_as_void() -> None:
    for scalar, void in ((ml_dtypes.bfloat16, "V2"), (ml_dtypes.float8_e5m2, "V1"), (ml_dtypes.int4, "V1")):
        header = npy.make_header(np.dtype(scalar), (), "C", name="x")
        assert np.load(io.BytesIO(header + bytes(2))).dtype == np.dtype(void)
    with pytest.raises(UnsupportedDtype, match="'weights'"):
        npy.make_header(np.dtype([("a", ml_dtypes.bfloat16)]), (), "C", name="weights")
