# SPDX-License-Identifier: Apache-2.0
"""`build` from arrays and streams, its destination, its errors; `verify` of what it made."""

from __future__ import annotations

import io
import os
import threading
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lazymem import destination
from lazymem.builder import build
from lazymem.errors import (
    AccessDenied,
    BuildError,
    ChunkCorrupt,
    FormatError,
    OptionError,
    SnapshotNotFound,
    UnsupportedDtype,
)
from lazymem.extractor import extract
from lazymem.format import structs
from lazymem.format.reader import SnapshotReader
from lazymem.store.local import AtomicFile, LocalBlob
from lazymem.verifier import verify

CHUNK = 1 << 16
RNG = np.random.default_rng(3)


def arrays_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every visible array of a snapshot, decoded."""
    with LocalBlob(path) as blob:
        reader = SnapshotReader(blob)
        index = reader.index
        result = {}
        for name, row in index.rows.items():
            raw = b"".join(reader.read_range(*index.range_of(row)))
            result[name] = np.ndarray(
                index.shape_of(row),
                index.dtype_of(row),
                raw,
                order="F" if index.order_of(row) == "F" else "C",
            )
    return result


def assert_same(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "weights": RNG.standard_normal((200, 301)).astype(np.float32),
    "fortran": np.asfortranarray(RNG.integers(0, 9, (30, 40, 5))),
    "transposed": RNG.random((17, 23, 29)).transpose(1, 0, 2),
    "strided": np.arange(90_000, dtype=np.int16)[::3],
    "reversed": np.arange(1000)[::-1],
    "scalar": np.array(3.25, np.float16),
    "empty": np.zeros((0, 5), np.uint32),
    "big endian": np.arange(100, dtype=">u4"),
    "bfloat16": np.arange(100).astype(ml_dtypes.bfloat16),
    "float8": np.arange(100).astype(ml_dtypes.float8_e5m2),
    "time": np.array(["2020-01-01", "NaT"], "M8[us]"),
    "text": np.array(["a", "längst"]),
    "bytes": np.array([b"ab", b"c"]),
    "bool": np.array([True, False]),
    "struct": np.array([(1, 2.5), (3, 4.5)], [("x", "u1"), ("y", "<f8", ())]),
    "имя": np.arange(3),
}


def test_build_keeps_every_kind_of_array(tmp_path: Path) -> None:
    path = tmp_path / "a.lzm"
    report = build(ARRAYS, path, chunk_size=CHUNK, threads=2)
    found = arrays_of(path)
    assert list(found) == list(ARRAYS)
    for name, expected in ARRAYS.items():
        assert_same(found[name], expected)
    assert found["fortran"].flags.f_contiguous
    assert not found["fortran"].flags.c_contiguous
    assert report.arrays == len(ARRAYS)
    assert report.source_bytes == sum(array.nbytes for array in ARRAYS.values())
    assert report.file_bytes == path.stat().st_size
    assert verify(path).ok


def test_build_copies_strided_arrays_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazymem.builder.sources.PIECE", 1000)
    build(ARRAYS, tmp_path / "a.lzm", chunk_size=CHUNK)
    for name, found in arrays_of(tmp_path / "a.lzm").items():
        assert_same(found, ARRAYS[name])


def test_build_takes_what_numpy_takes(tmp_path: Path) -> None:
    build({"list": [1, 2, 3], "float": 2.5}, tmp_path / "a.lzm")
    found = arrays_of(tmp_path / "a.lzm")
    assert found["list"].tolist() == [1, 2, 3]
    assert found["float"] == 2.5


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.array([{}, []], object),
        np.ma.masked_array([1, 2], [False, True]),
        [[1], [2, 3]],
    ],
    ids=["object", "mixed", "masked", "ragged"],
)
def test_build_refuses_arrays_without_fixed_bytes(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UnsupportedDtype, match="'bad'"):
        build({"good": np.arange(3), "bad": value}, tmp_path / "a.lzm")
    assert os.listdir(tmp_path) == []


def test_build_same_input_gives_same_file(tmp_path: Path) -> None:
    build(ARRAYS, tmp_path / "one.lzm", threads=1, chunk_size=CHUNK)
    build(ARRAYS, tmp_path / "two.lzm", threads=4, chunk_size=CHUNK)
    assert (tmp_path / "one.lzm").read_bytes() == (tmp_path / "two.lzm").read_bytes()


def test_build_keeps_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.lzm"
    build(
        {"x": np.arange(3)}, path, metadata={"step": 7, "ü": [1, None]}, array_metadata={"x": {"unit": "m"}}
    )
    with LocalBlob(path) as blob:
        index = SnapshotReader(blob).index
    assert index.metadata == {"step": 7, "ü": [1, None]}
    assert index.array_metadata == {"x": {"unit": "m"}}


def test_build_refuses_metadata_of_arrays_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'y'"):
        build({"x": np.arange(3)}, tmp_path / "a.lzm", array_metadata={"y": {}})
    with pytest.raises(BuildError, match="JSON"):
        build({"x": np.arange(3)}, tmp_path / "a.lzm", metadata={"x": {1, 2}})
    assert os.listdir(tmp_path) == []


def test_build_progress_ends_at_the_total(tmp_path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    data = np.zeros(20 << 20, np.uint8)
    build({"x": data}, tmp_path / "a.lzm", progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1] == (data.nbytes, data.nbytes)
    assert len(calls) > 2
    assert {total for _, total in calls} == {data.nbytes}


# ---- streams ----


@pytest.mark.parametrize("length", [0, 1, CHUNK, 3 * CHUNK + 17])
def test_build_from_a_stream(tmp_path: Path, length: int) -> None:
    data = RNG.bytes(length)
    report = build(io.BytesIO(data), tmp_path / "a.lzm", chunk_size=CHUNK)
    assert arrays_of(tmp_path / "a.lzm")["data"].tobytes() == data
    assert report.source_bytes == length
    with LocalBlob(tmp_path / "a.lzm") as blob:
        container = SnapshotReader(blob).index.container
    assert container is not None
    assert (container.format, container.exact, container.files[0].size) == ("raw", True, length)


def test_build_from_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"piped")))
    build("-", tmp_path / "a.lzm")
    assert arrays_of(tmp_path / "a.lzm")["data"].tobytes() == b"piped"


def test_build_from_a_named_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"through a pipe",))
    writer.start()
    build(pipe, tmp_path / "a.lzm")
    writer.join()
    assert arrays_of(tmp_path / "a.lzm")["data"].tobytes() == b"through a pipe"


def test_build_refuses_a_text_stream(tmp_path: Path) -> None:
    source: Any = io.StringIO("text")
    with pytest.raises(BuildError, match="'rb'"):
        build(source, tmp_path / "a.lzm")


def test_build_refuses_sources_of_other_types(tmp_path: Path) -> None:
    for source in (7, None, [], [np.arange(3)], np.arange(3)):
        bad: Any = source
        with pytest.raises(OptionError, match="the source is a"):
            build(bad, tmp_path / "a.lzm")


def test_build_of_a_missing_source_says_so(tmp_path: Path) -> None:
    with pytest.raises(SnapshotNotFound, match=r"nothing\.npy"):
        build(tmp_path / "nothing.npy", tmp_path / "a.lzm")


# ---- the destination ----


def test_failed_build_leaves_the_old_snapshot_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.lzm"
    build({"x": np.arange(10)}, path)
    before = path.read_bytes()

    class Breaks(io.RawIOBase):
        reads = 0

        def read(self, size: int = -1) -> bytes:
            self.reads += 1
            if self.reads > 5:
                raise KeyboardInterrupt
            return bytes(RNG.bytes(1 << 20))

    source: Any = Breaks()
    with pytest.raises(KeyboardInterrupt):
        build(source, path, chunk_size=CHUNK)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.lzm"]
    assert not [t for t in threading.enumerate() if t.name.startswith("lazymem-build")]


def test_build_without_overwrite_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.lzm"
    path.write_bytes(b"precious")
    with pytest.raises(BuildError, match="exists"):
        build({"x": np.arange(3)}, path, overwrite=False)
    assert path.read_bytes() == b"precious"


def test_build_replaces_only_snapshots_unless_told(tmp_path: Path) -> None:
    path, precious = tmp_path / "a.lzm", tmp_path / "thesis.lzm"
    path.touch()
    build({"x": np.arange(3)}, path)  # in place of an empty file
    build({"x": np.arange(4)}, path)  # in place of a snapshot
    with open(path, "r+b") as file:
        file.write(b"damaged")
    build({"x": np.arange(5)}, path)  # in place of what its tail still calls a snapshot
    assert arrays_of(path)["x"].tolist() == [0, 1, 2, 3, 4]
    precious.write_bytes(b"precious")
    with pytest.raises(BuildError, match="overwrite=True"):
        build({"x": np.arange(3)}, precious)
    assert precious.read_bytes() == b"precious"
    build({"x": np.arange(3)}, precious, overwrite=True)
    assert arrays_of(precious)["x"].tolist() == [0, 1, 2]


def test_build_does_not_replace_what_appeared_while_it_ran(tmp_path: Path) -> None:
    path = tmp_path / "a.lzm"

    def appear(done: int, total: int | None) -> None:
        path.write_bytes(b"theirs")

    with pytest.raises(BuildError, match="is not a snapshot"):
        build({"x": np.arange(3)}, path, progress=appear)
    assert path.read_bytes() == b"theirs"


def test_build_keeps_links_and_modes(tmp_path: Path) -> None:
    path, link = tmp_path / "a.lzm", tmp_path / "link.lzm"
    build({"x": np.arange(3)}, path)
    path.chmod(0o600)
    link.symlink_to(path)
    build({"x": np.arange(4)}, link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(arrays_of(path)["x"]) == 4


def test_build_does_not_write_into_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for overwrite in (None, True, False):
        with pytest.raises(BuildError, match=r"named pipe|exists"):
            build({"x": np.arange(3)}, pipe, overwrite=overwrite)
    assert pipe.is_fifo()


@pytest.mark.parametrize("exact", [True, False])
def test_build_in_place_of_its_source_only_if_that_can_be_had_again(tmp_path: Path, exact: bool) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=6 if exact else 1) as archive:
        buffer = io.BytesIO()
        np.save(buffer, RNG.standard_normal(10_000).round(2))
        archive.writestr("a.npy", buffer.getvalue())
    before = path.read_bytes()
    with pytest.raises(BuildError, match="overwrite=True"):
        build(path, path)
    (tmp_path / "link").symlink_to(path)
    if exact:
        report = build(path, tmp_path / "link", overwrite=True)
        assert (report.exact, report.reason) == (True, None)
        extract(path, tmp_path / "again.npz")
        assert (tmp_path / "again.npz").read_bytes() == before
        return
    for target in (path, tmp_path / "link"):
        with pytest.raises(BuildError, match="is the source"):
            build(path, target, overwrite=True)
    assert path.read_bytes() == before
    report = build(path, tmp_path / "a.lzm")
    assert not report.exact
    assert "'a'" in (report.reason or "")


def test_report_of_what_was_in_no_file_is_exact(tmp_path: Path) -> None:
    report = build({"x": np.arange(3)}, tmp_path / "a.lzm")
    assert (report.exact, report.reason) == (True, None)


@pytest.mark.parametrize(
    "options",
    [
        {"level": 3.5},
        {"level": True},
        {"threads": "x"},
        {"threads": 1.0},
        {"planes": "x"},
        {"planes": 1},
        {"chunk_size": "2M"},
        {"chunk_size": np.arange(2)},
        {"codec": 3},
    ],
)
def test_build_options_of_wrong_types_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(OptionError, match=f"{name} is "):
        build({"x": np.arange(3)}, tmp_path / "a.lzm", **options)
    numbers: dict[str, Any] = {"level": np.int64(3), "threads": np.uint8(1)}
    build({"x": np.arange(3)}, tmp_path / "a.lzm", **numbers)


def test_build_to_or_with_standard_streams_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.arange(3))
    with pytest.raises(OptionError, match="always a file"):
        build("x.npy", "-")
    with pytest.raises(OptionError, match="build it alone"):
        build(["x.npy", "-"], "a.lzm")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(BuildError, match="input is closed"):
        build("-", "a.lzm")
    assert os.listdir() == ["x.npy"]


def test_build_says_what_is_wrong_with_the_destination(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "missing" / "a.lzm", "does not exist"),
        (tmp_path, "is a directory"),
        ("", "path is empty"),
    ):
        with pytest.raises(BuildError, match=words):
            build({"x": np.arange(3)}, path)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_build_into_a_directory_without_rights_is_access_denied(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(AccessDenied):
        build({"x": np.arange(3)}, tmp_path / "a.lzm")


def test_build_on_a_full_disk_says_how_much_was_written(tmp_path: Path) -> None:
    class Full:
        """What AtomicFile's file does when the disk is full: /dev/full gives a true ENOSPC."""

        def __init__(self, path: str, overwrite: bool) -> None:
            self.inner = builder_atomic(path, overwrite)

        def __enter__(self) -> Any:
            target = self.inner.__enter__()
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, target._fd)
            os.close(full)
            return target

        def __exit__(self, *exc: Any) -> None:
            self.inner.__exit__(*exc)

    builder_atomic = AtomicFile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(destination, "AtomicFile", Full)
        with pytest.raises(BuildError, match=r"writing failed after \d+ bytes \(No space left"):
            build({"x": RNG.bytes(5 << 20)}, tmp_path / "a.lzm", chunk_size=CHUNK)
    assert os.listdir(tmp_path) == []


# ---- snapshots as a source ----


def test_rebuild_with_other_settings_keeps_everything(tmp_path: Path) -> None:
    build(ARRAYS, tmp_path / "a.lzm", metadata={"k": 1}, array_metadata={"bool": {"m": 2}}, chunk_size=CHUNK)
    first = build(tmp_path / "a.lzm", tmp_path / "b.lzm", codec="lz4", level=9, chunk_size=1 << 18)
    for name, found in arrays_of(tmp_path / "b.lzm").items():
        assert_same(found, ARRAYS[name])
    with LocalBlob(tmp_path / "b.lzm") as blob:
        index = SnapshotReader(blob).index
    assert index.metadata == {"k": 1}
    assert index.array_metadata == {"bool": {"m": 2}}
    again = build(tmp_path / "b.lzm", tmp_path / "b.lzm", codec="none", chunk_size=1 << 18)
    assert again.digest == first.digest


def test_rebuild_does_not_read_zero_chunks(tmp_path: Path) -> None:
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 40)
    build(tmp_path / "sparse", tmp_path / "a.lzm")
    report = build(tmp_path / "a.lzm", tmp_path / "b.lzm", codec="lz4")
    assert (report.content_bytes, report.zero_chunks) == (1 << 40, report.chunks)


def test_rebuild_of_a_damaged_snapshot_fails_and_names_the_chunk(tmp_path: Path) -> None:
    path = tmp_path / "a.lzm"
    build({"x": RNG.integers(0, 256, 5 * CHUNK, np.uint8)}, path, chunk_size=CHUNK)
    damage(path, 3)
    with pytest.raises(ChunkCorrupt, match=r"chunk 3 .*'x'"):
        build(path, tmp_path / "b.lzm")
    assert os.listdir(tmp_path) == ["a.lzm"]


# ---- verify ----


def damage(path: Path, record: int) -> None:
    with LocalBlob(path) as blob:
        offset = int(SnapshotReader(blob).index.records["offset"][record])
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    path = tmp_path / "a.lzm"
    noise = RNG.integers(0, 256, 40 * CHUNK, np.uint8)
    build(
        {"small": np.arange(9), "zeros": np.zeros(CHUNK * 3, np.uint8), "noise": noise},
        path,
        chunk_size=CHUNK,
    )
    return path


@pytest.mark.parametrize("deep", [True, False])
def test_verify_finds_nothing_wrong_with_a_good_snapshot(snapshot: Path, deep: bool) -> None:
    calls: list[tuple[int, int | None]] = []
    report = verify(snapshot, deep=deep, threads=2, progress=lambda done, total: calls.append((done, total)))
    assert report.ok
    assert report.digest_ok is True
    assert (report.bad, report.problems) == ((), ())
    assert calls[-1] == (report.stored_chunks, report.stored_chunks)


@pytest.mark.parametrize("deep", [True, False])
def test_verify_reports_every_bad_chunk(snapshot: Path, deep: bool) -> None:
    for record in (0, 7, 40):
        damage(snapshot, record)
    report = verify(snapshot, deep=deep, threads=2)
    with LocalBlob(snapshot) as blob:
        index = SnapshotReader(blob).index
    assert not report.ok
    assert report.digest_ok is False
    assert [index.record_of(bad.chunk) for bad in report.bad] == [0, 7, 40]
    assert [bad.arrays for bad in report.bad] == [("small",), ("noise",), ("noise",)]
    assert [bad.offset for bad in report.bad] == index.records["offset"][[0, 7, 40]].tolist()
    assert all("checksum" in bad.reason for bad in report.bad)


@pytest.mark.parametrize("deep", [True, False])
def test_verify_finds_a_damaged_head(snapshot: Path, deep: bool) -> None:
    with open(snapshot, "r+b") as file:
        file.seek(20)
        file.write(b"x")
    report = verify(snapshot, deep=deep)
    assert not report.ok
    assert "head" in report.problems[0]


def test_verify_finds_damaged_chunk_digests(snapshot: Path) -> None:
    with LocalBlob(snapshot) as blob:
        offset = SnapshotReader(blob).index.cold["CDIG"].offset
    with open(snapshot, "r+b") as file:
        file.seek(offset)
        file.write(b"\0\0\0\0")
    deep, shallow = verify(snapshot), verify(snapshot, deep=False)
    assert not deep.ok
    assert deep.digest_ok is True  # the chunks themselves are right
    assert not shallow.ok
    assert shallow.digest_ok is None
    assert "CDIG" in deep.problems[0]


def test_verify_finds_a_digest_that_is_not_the_contents(snapshot: Path) -> None:
    from .format_tools import with_tail

    snapshot.write_bytes(with_tail(snapshot.read_bytes(), digest=bytes(32)))
    for deep in (True, False):
        report = verify(snapshot, deep=deep)
        assert report.digest_ok is False
        assert not report.ok


def test_verify_finds_chunks_swapped_with_their_records(snapshot: Path) -> None:
    from .format_tools import with_sections

    def swap(sections: dict[str, bytes]) -> None:
        size = structs.CHUNK.size
        chunks = sections["CHNK"]
        sections["CHNK"] = (
            chunks[:size] + chunks[2 * size : 3 * size] + chunks[size : 2 * size] + chunks[3 * size :]
        )

    snapshot.write_bytes(with_sections(snapshot.read_bytes(), swap))
    # Each chunk matches its checksum, and only their SHA-256 tell that they changed places.
    report = verify(snapshot)
    assert len(report.bad) == 2
    assert all("SHA-256" in bad.reason for bad in report.bad)


def test_verify_of_another_format_says_what_to_do(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(10))
    (tmp_path / "empty").touch()
    for name in ("x.npy", "empty"):
        with pytest.raises(FormatError, match="lazymem build"):
            verify(tmp_path / name)


def test_verify_of_a_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="one file is verified at a time"):
        verify(tmp_path)


@pytest.mark.parametrize("threads", ["x", 0, 2.0])
def test_verify_with_impossible_threads_is_refused(snapshot: Path, threads: Any) -> None:
    with pytest.raises(OptionError, match="threads is"):
        verify(snapshot, threads=threads)


def test_verify_of_a_truncated_snapshot_is_a_format_error(snapshot: Path) -> None:
    os.truncate(snapshot, snapshot.stat().st_size - 5)
    with pytest.raises(FormatError, match="cut short"):
        verify(snapshot)
