# SPDX-License-Identifier: Apache-2.0
"""Which container a file is, and that no damage to one does worse than a named exception."""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from lazymem.containers.base import Directory, array_size
from lazymem.containers.detect import FORMATS
from lazymem.errors import FormatError, OptionError, ReadError, SnapshotNotFound

from .openers import open_container


def npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.arange(6, dtype="<i2").reshape(2, 3))
    return stream.getvalue()


def npz(*, compressed: bool = False) -> bytes:
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, a=np.arange(5, dtype="u1"), b=np.ones((2, 1)))
    return stream.getvalue()


def safetensors() -> bytes:
    return save({"a": np.arange(3, dtype="<f4"), "b": np.zeros((0, 2))}, metadata={"k": "v"})


def torch_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02}.")
        archive.writestr("model/data/0", bytes(16))
    return stream.getvalue()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".bin", ""])
@pytest.mark.parametrize(
    ("data", "form"),
    [
        (npy(), "npy"),
        (npz(), "npz"),
        (npz(compressed=True), "npz"),
        (safetensors(), "safetensors"),
    ],
)
def test_detect_goes_by_content_before_suffix(tmp_path: Path, data: bytes, form: str, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(data)
    assert open_container(path).format == form


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".npy", ""])
def test_detect_torch_goes_by_content(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(torch_zip())
    for as_format in (None, "torch"):
        with contextlib.closing(open_container(path, as_format=as_format)) as directory:
            assert directory.format == "torch"


@pytest.mark.parametrize("data", [b"", b"x", bytes(100), b"PK\x03\x04 but no zip", b"\x80\x02}."])
def test_detect_other_content_is_raw(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "memory.img"
    path.write_bytes(data)
    directory = open_container(path)
    (entry,) = directory.arrays
    assert (directory.format, list(directory.file_names)) == ("raw", ["memory.img"])
    assert (entry.name, entry.dtype, entry.shape) == ("data", np.dtype("u1"), (len(data),))
    assert directory.files[0].read(entry.offset, entry.nbytes) == data


def test_detect_zip_of_other_things_is_raw(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("text.txt", b"text")
    assert open_container(tmp_path / "x.zip").format == "raw"


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".NPY"])
@pytest.mark.parametrize("data", [b"", b"x" * 40, bytes(40)])
def test_detect_broken_file_with_a_suffix_is_not_raw(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"x{suffix}"):
        open_container(path)
    assert open_container(path, as_format="raw").arrays[0].nbytes == len(data)


BROKEN_TORCH = torch_zip().replace(b"}.", b"}}")


@pytest.mark.parametrize("data", [BROKEN_TORCH, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.more"])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ""])
def test_detect_torch_files_say_what_to_do(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"torch\.save.*safetensors|data\.pkl"):
        open_container(path)
    assert open_container(path, as_format="raw").arrays[0].nbytes == len(data)


def test_detect_asked_for_a_format_takes_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(npy())
    assert open_container(path, as_format="npy").format == "npy"
    for form in ("npz", "safetensors"):
        with pytest.raises(FormatError):
            open_container(path, as_format=form)
    with pytest.raises(OptionError, match="no folder"):
        open_container(path, as_format="safetensors-sharded")
    with pytest.raises(OptionError, match="one of raw, npy"):
        open_container(path, as_format="hdf5")


def test_detect_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SnapshotNotFound):
        open_container(tmp_path / "absent.npy")
    with pytest.raises(ReadError, match="is a directory"):
        open_container(tmp_path, as_format="npy")


@pytest.mark.parametrize(
    ("shape", "itemsize", "size"),
    [
        *[((), 4, 4), ((2, 3), 4, 24), ((0,), 4, 0), ((5,), 0, 0), ((1,) * 64, 1, 1)],
        ((2**63 - 1,), 1, 2**63 - 1),
        *[((1,) * 65, 1, None), ((2**63,), 1, None), ((2**62, 2), 1, None), ((2**62, 0, 2), 1, None)],
        *[((-1,), 1, None), ((True,), 1, None), ((1.0,), 1, None), (("1",), 1, None), ((2**63,), 0, None)],
    ],
)
def test_array_size_is_numpys_or_none(shape: tuple[object, ...], itemsize: int, size: int | None) -> None:
    assert array_size(shape, itemsize) == size


# ---- damage: every length, every byte ----

SAMPLES = {
    "x.npy": npy(),
    "x.npz": npz(),
    "c.npz": npz(compressed=True),
    "x.safetensors": safetensors(),
    "x.pt": torch_zip(),
}


def open_or_refusal(path: Path) -> Directory | str:
    try:
        return open_container(path)
    except FormatError as error:
        return str(error)


def outcome(path: Path) -> str:
    """ "ok" or "refused"; asserts that no array reaches out of its file."""
    directory = open_or_refusal(path)
    if isinstance(directory, str):
        assert str(path) in directory
        assert len(directory) < 1000
        return "refused"
    for entry in directory.arrays:
        assert 0 <= entry.offset <= entry.offset + entry.stored_length <= directory.files[entry.file].size
        assert entry.nbytes == array_size(entry.shape, entry.dtype.itemsize)
        if entry.compression is None:
            assert entry.stored_length == entry.nbytes
        else:
            assert entry.skip + entry.nbytes <= entry.member_size
    directory.close()
    return "ok"


def damaged(data: bytes) -> Iterator[bytes]:
    for position in range(len(data)):
        for value in {0, 1, 0x7F, 0x80, 0xFF, data[position] ^ 1, data[position] ^ 0x80} - {data[position]}:
            yield data[:position] + bytes([value]) + data[position + 1 :]
        yield data[:position] + b"\xff" * 8 + data[position + 8 :]
        yield data[:position] + bytes(8) + data[position + 8 :]


@pytest.mark.parametrize("name", SAMPLES)
def test_damage_truncated_at_every_length_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = SAMPLES[name]
    for length in range(len(data)):
        path.write_bytes(data[:length])
        if name == "x.pt":  # no suffix of ours: what is no whole zip is raw bytes
            outcome(path)
        else:
            assert outcome(path) == "refused", length


@pytest.mark.filterwarnings("ignore")  # Python's parser and numpy's have their say about some headers
@pytest.mark.parametrize("name", SAMPLES)
def test_damage_at_every_byte_is_refused_or_harmless(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    outcomes = set()
    descriptors = len(os.listdir("/proc/self/fd"))
    for data in damaged(SAMPLES[name]):
        path.write_bytes(data)
        outcomes.add(outcome(path))
    assert outcomes == {"ok", "refused"}
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_formats_are_those_that_can_be_asked_for() -> None:
    assert FORMATS == ("raw", "npy", "npz", "safetensors", "safetensors-sharded", "torch", "gguf")
