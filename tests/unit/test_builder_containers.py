# SPDX-License-Identifier: Apache-2.0
"""`build` from containers: the arrays come in, and the files can come out byte for byte."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lazymem.builder import build
from lazymem.errors import BuildError, FormatError, SnapshotChanged
from lazymem.format.index import SnapshotIndex
from lazymem.format.reader import SnapshotReader
from lazymem.store.local import LocalBlob
from lazymem.verifier import verify

CHUNK = 1 << 16
RNG = np.random.default_rng(5)
ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "weights": RNG.standard_normal((200, 301)).astype(np.float32),
    "zeros": np.zeros(3 * CHUNK, np.uint8),
    "small": np.arange(7),
    "empty": np.zeros((0, 4), np.float32),
}


def files_of(path: Path) -> tuple[SnapshotIndex, dict[str, bytes]]:
    """The files that went in, made again from CONT and EXTN as FORMAT.md says."""
    result = {}
    with LocalBlob(path) as blob:
        reader = SnapshotReader(blob)
        index = reader.index
        assert index.container is not None

        def content(offset: int, length: int) -> bytes:
            return b"".join(reader.read_range(offset, length))

        for number, file in enumerate(index.container.files):
            parts = [
                (int(row["file_offset"]), content(int(row["content_offset"]), int(row["length"])))
                for row in index.extents[index.extents["file"] == number]
            ]
            for member in file.deflated:
                deflate = zlib.compressobj(member.level, zlib.DEFLATED, -zlib.MAX_WBITS)
                raw = b"".join(content(*extent) for extent in member.extents)
                parts.append((member.file_offset, deflate.compress(raw) + deflate.flush()))
            result[file.name] = b"".join(part for _, part in sorted(parts))
            if file.sha256 is not None:
                assert hashlib.sha256(result[file.name]).hexdigest() == file.sha256
    return index, result


def check_exact(source: Any, originals: list[Path], tmp_path: Path) -> SnapshotIndex:
    """Build, verify, take the files out; then the same of a snapshot built of the snapshot."""
    path = tmp_path / "out.lzm"
    build(source, path, chunk_size=CHUNK, threads=2)
    assert verify(path).ok
    expected = {original.name: original.read_bytes() for original in originals}
    index, files = files_of(path)
    assert files == expected
    build(path, tmp_path / "again.lzm", chunk_size=1 << 18, codec="lz4")
    again, files = files_of(tmp_path / "again.lzm")
    assert files == expected
    assert list(again.rows) == list(index.rows)
    assert again.container == index.container or any(f.deflated for f in again.container.files)  # type: ignore[union-attr]
    return index


def test_build_npz_gives_the_file_back(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **ARRAYS)
    index = check_exact(path, [path], tmp_path)
    assert sorted(index.rows) == sorted(ARRAYS)
    assert index.container is not None
    assert (index.container.format, index.container.exact) == ("npz", True)


def test_build_deflated_npz_gives_the_file_back(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **ARRAYS)
    index = check_exact(path, [path], tmp_path)
    assert index.container is not None
    assert index.container.exact
    assert len(index.container.files[0].deflated) == len(ARRAYS)


def test_build_npz_of_another_deflater_keeps_the_arrays_only(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(tmp_path / "plain.npz", **ARRAYS)
    with (
        zipfile.ZipFile(tmp_path / "plain.npz") as plain,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    build(path, tmp_path / "a.lzm", chunk_size=CHUNK)
    with LocalBlob(tmp_path / "a.lzm") as blob:
        reader = SnapshotReader(blob)
        index = reader.index
        row = index.rows["weights"]
        assert b"".join(reader.read_range(*index.range_of(row))) == ARRAYS["weights"].tobytes()
    assert index.container is not None
    assert not index.container.exact
    assert "deflated" in str(index.container.reason)
    assert index.container.files[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_build_npz_with_a_wrong_crc_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.arange(10_000))
    with zipfile.ZipFile(path) as archive:
        crc = archive.getinfo("x.npy").CRC.to_bytes(4, "little")
    data = path.read_bytes()
    assert data.count(crc) == 2
    path.write_bytes(data.replace(crc, b"\1\2\3\4"))
    with pytest.raises(FormatError, match="CRC"):
        build(path, tmp_path / "a.lzm")
    assert os.listdir(tmp_path) == ["a.npz"]


def test_build_npz_with_bytes_after_an_array_keeps_them(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(1000))
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", (tmp_path / "x.npy").read_bytes() + b"more")
    check_exact(path, [path], tmp_path)


def test_build_npy_gives_the_file_back(tmp_path: Path) -> None:
    path = tmp_path / "f.npy"
    np.save(path, np.asfortranarray(ARRAYS["weights"]))
    index = check_exact(path, [path], tmp_path)
    assert index.order_of(next(iter(index.rows.values()))) == "F"


def test_build_safetensors_gives_the_file_back(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(ARRAYS, path, metadata={"trained": "yes"})
    index = check_exact(path, [path], tmp_path)
    assert index.metadata == {"trained": "yes"}
    assert set(index.rows) == set(ARRAYS)


def test_build_raw_file_gives_the_file_back(tmp_path: Path) -> None:
    path = tmp_path / "memory.bin"
    path.write_bytes(RNG.bytes(5 * CHUNK + 3))
    index = check_exact(path, [path], tmp_path)
    assert list(index.rows) == ["data"]


def test_build_empty_raw_file_gives_the_file_back(tmp_path: Path) -> None:
    path = tmp_path / "empty.bin"
    path.touch()
    check_exact(path, [path], tmp_path)


def test_build_several_containers_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.npy"]
    save_file({"x": np.arange(3), "shared": np.arange(4)}, paths[0])
    save_file({"y": np.arange(5), "shared": np.arange(6)}, paths[1])
    np.save(paths[2], np.arange(7))
    index = check_exact(paths, paths, tmp_path)
    assert sorted(index.rows) == ["a/shared", "b/shared", "c", "x", "y"]


def test_build_refuses_two_files_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for path in (tmp_path / "x.npy", tmp_path / "d" / "x.npy"):
        np.save(path, np.arange(3))
    with pytest.raises(BuildError, match=r"'x\.npy'"):
        build([tmp_path / "x.npy", tmp_path / "d" / "x.npy"], tmp_path / "a.lzm")


def test_build_refuses_a_snapshot_among_others(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(3))
    build(tmp_path / "x.npy", tmp_path / "x.lzm")
    with pytest.raises(BuildError, match="snapshot"):
        build([tmp_path / "x.npy", tmp_path / "x.lzm"], tmp_path / "a.lzm")


def test_hidden_arrays_step_aside_for_names_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({".container/0/0": np.arange(9)}, path)
    index = check_exact(path, [path], tmp_path)
    assert list(index.rows) == [".container/0/0"]


def test_build_keeps_a_file_name_that_the_format_does_not_allow_out(tmp_path: Path) -> None:
    path = tmp_path / "back\\slash.bin"
    path.write_bytes(b"123")
    build(path, tmp_path / "a.lzm")
    assert files_of(tmp_path / "a.lzm")[1] == {"file0": b"123"}


def test_build_of_a_sparse_tebibyte_reads_its_data_only(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"in the middle")
    report = build(path, tmp_path / "a.lzm")
    assert report.content_bytes == 1 << 40
    assert report.chunks - report.zero_chunks == 1
    with LocalBlob(tmp_path / "a.lzm") as blob:
        reader = SnapshotReader(blob)
        assert b"".join(reader.read_range(1 << 39, 13)) == b"in the middle"
        assert reader.index.container is not None
        assert reader.index.container.files[0].sha256 is None


def test_build_of_a_file_with_small_holes_hashes_them(tmp_path: Path) -> None:
    path = tmp_path / "holes"
    with open(path, "wb") as file:
        file.write(b"start")
        file.seek(10 * CHUNK)
        file.write(b"end")
        file.truncate(20 * CHUNK)
    check_exact(path, [path], tmp_path)


def test_build_of_a_file_that_changes_meanwhile_fails(tmp_path: Path) -> None:
    path = tmp_path / "growing.bin"
    path.write_bytes(RNG.bytes(12 << 20))

    def touch(done: int, total: int | None) -> None:
        with open(path, "r+b") as file:
            file.write(b"other")
        os.utime(path, ns=(1, 1))

    with pytest.raises(SnapshotChanged, match=r"growing\.bin"):
        build(path, tmp_path / "a.lzm", progress=touch)
    assert os.listdir(tmp_path) == ["growing.bin"]
