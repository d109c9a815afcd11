# SPDX-License-Identifier: Apache-2.0
"""`extract` and `cat`: the very bytes back, or an error and nothing left."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import deserialize as untyped_deserialize
from safetensors.numpy import load_file, save_file

import lazymem
from lazymem.builder import build
from lazymem.errors import (
    ArrayNotFound,
    BuildError,
    ChunkCorrupt,
    FormatError,
    LazymemError,
    OptionError,
    SnapshotNotFound,
    UnsupportedDtype,
    UnsupportedFormat,
)
from lazymem.extractor import cat, extract
from lazymem.format.reader import SnapshotReader
from lazymem.store.local import LocalBlob

deserialize: Any = untyped_deserialize

ARRAYS: dict[str, NDArray[Any]] = {
    "w": np.arange(3000, dtype="<f4").reshape(30, 100),
    "слой/вес": np.asfortranarray(np.arange(12, dtype=">i8").reshape(3, 4)),
    "empty": np.zeros((0, 3)),
    "scalar": np.array(5, "<u2"),
    "zeros": np.zeros(3 << 20, "u1"),
    "bf16": np.arange(9).astype(ml_dtypes.bfloat16),
}
CHUNK = 1 << 16


def weights() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(50_000).astype(np.float32)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def arrays() -> str:
    build(ARRAYS, "arrays.lzm", chunk_size=CHUNK, metadata={"author": "me", "steps": [1, 2]})
    return "arrays.lzm"


def make_raw(path: Path) -> None:
    path.write_bytes(os.urandom(100_001))


def make_sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.write(b"head")
        file.truncate(9 << 20)


def make_empty(path: Path) -> None:
    path.touch()


def make_npy(path: Path) -> None:
    np.save(path, np.asfortranarray(weights().reshape(100, 500)))


def make_npz(path: Path) -> None:
    np.savez(path, a=weights(), b=np.arange(3), c=np.zeros((0,)))


def make_deflated(path: Path) -> None:
    np.savez_compressed(path, a=weights(), b=np.arange(70_000), c=np.zeros((0,)), d=np.zeros(1 << 20))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("notes.txt", b"not an array" * 100)


def make_safetensors(path: Path) -> None:
    save_file({"a": weights(), "b": np.arange(4)}, path, metadata={"format": "np"})


MAKERS = {
    "memory.img": make_raw,
    "sparse.img": make_sparse,
    "empty.img": make_empty,
    "x.npy": make_npy,
    "x.npz": make_npz,
    "deflated.npz": make_deflated,
    "x.safetensors": make_safetensors,
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_extract_gives_the_very_file_back(folder: Path, name: str, codec: str) -> None:
    MAKERS[name](folder / name)
    build(name, "s.lzm", chunk_size=CHUNK, codec=codec)
    assert extract("s.lzm", "back") == [Path("back")]
    assert Path("back").read_bytes() == Path(name).read_bytes()
    os.mkdir("into")
    assert extract("s.lzm", "into") == [Path("into") / name]
    assert (folder / "into" / name).read_bytes() == Path(name).read_bytes()


def test_extract_leaves_holes_where_a_file_has_zeros(folder: Path) -> None:
    make_sparse(folder / "sparse.img")
    build("sparse.img", "s.lzm", chunk_size=CHUNK)
    extract("s.lzm", "back")
    assert Path("back").stat().st_blocks * 512 < 2 << 20


def test_extract_gives_the_shards_and_their_index_back(folder: Path) -> None:
    os.mkdir("model")
    save_file({"a": weights()}, "model/m-1.safetensors")
    save_file({"b": np.arange(4)}, "model/m-2.safetensors")
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    Path("model/model.safetensors.index.json").write_text(json.dumps(index))
    build("model", "s.lzm", chunk_size=CHUNK)
    written = extract("s.lzm", "back")
    assert {path.name for path in written} == set(os.listdir("model")) == set(os.listdir("back"))
    for path in written:
        assert path.read_bytes() == (folder / "model" / path.name).read_bytes()


@pytest.mark.parametrize("name", ["out.safetensors", "out.NPZ", "out.npy", "out.pt", "out.bin", "out.gguf"])
def test_extract_of_several_files_makes_no_folder_called_like_a_file(
    folder: Path, arrays: str, name: str
) -> None:
    os.mkdir("model")
    save_file({"a": weights()}, "model/model.safetensors")
    Path("model/config.json").write_text("{}")
    build("model", "s.lzm", chunk_size=CHUNK)
    with pytest.raises(OptionError, match=r"is called like a file, but 2 files .* name a folder"):
        extract("s.lzm", name)
    with pytest.raises(OptionError, match="is called like a file"):
        extract(arrays, name, format="npy")
    assert not Path(name).exists()
    assert extract("s.lzm", name, format="safetensors") == [Path(name)]
    os.unlink(name)
    os.mkdir(name)
    assert len(extract("s.lzm", name)) == 2
    assert len(extract("s.lzm", "else." + name + "/")) == 2


def test_extract_of_arrays_is_an_npz(arrays: str) -> None:
    assert extract(arrays, "out.npz") == [Path("out.npz")]
    with np.load("out.npz") as loaded:
        assert set(loaded) == set(ARRAYS)
        for name, array in ARRAYS.items():
            expected = array.view("V2") if name == "bf16" else array
            assert (loaded[name].dtype, loaded[name].shape) == (expected.dtype, expected.shape)
            assert loaded[name].tobytes() == expected.tobytes()
            assert loaded[name].flags.fnc == array.flags.fnc


def test_extract_of_the_same_snapshot_is_the_same_npz(arrays: str) -> None:
    extract(arrays, "one.npz")
    extract(arrays, "two.npz", format="npz")
    assert Path("one.npz").read_bytes() == Path("two.npz").read_bytes()


def test_extract_of_named_arrays_has_only_these(folder: Path, arrays: str) -> None:
    make_npz(folder / "x.npz")
    build("x.npz", "s.lzm")
    extract("s.lzm", "out.npz", names=["b", "c", "b"])
    with np.load("out.npz") as loaded:
        assert set(loaded) == {"b", "c"}
    for form in ("npz", "npy", "raw", "safetensors"):
        with pytest.raises(ArrayNotFound, match="no array 'nope'"):
            extract(arrays, "out", format=form, names=["nope"])
        assert not os.path.exists("out")


def test_extract_npy_of_one_array_is_a_file(arrays: str) -> None:
    assert extract(arrays, "w.npy", format="npy", names=["w"]) == [Path("w.npy")]
    assert np.array_equal(np.load("w.npy"), ARRAYS["w"])


def test_extract_npy_of_several_is_a_folder(arrays: str) -> None:
    assert len(extract(arrays, "out", format="npy")) == len(ARRAYS)
    for name in ("w", "слой/вес", "empty", "scalar"):
        loaded = np.load(f"out/{name}.npy")
        assert (loaded.dtype, loaded.shape, loaded.tobytes()) == (
            ARRAYS[name].dtype,
            ARRAYS[name].shape,
            ARRAYS[name].tobytes(),
        )


def test_extract_raw_is_the_bytes_of_an_array_or_of_the_content(arrays: str) -> None:
    extract(arrays, "w.bin", format="raw", names=["w"])
    assert Path("w.bin").read_bytes() == ARRAYS["w"].tobytes()
    extract(arrays, "all.bin", format="raw")
    with LocalBlob(arrays) as blob:
        reader = SnapshotReader(blob)
        size = reader.index.content_size
        assert Path("all.bin").read_bytes() == b"".join(reader.read_range(0, size))
    with pytest.raises(OptionError, match="not 2 arrays"):
        extract(arrays, "x", format="raw", names=["w", "bf16"])


def test_extract_safetensors_is_what_the_package_loads(arrays: str) -> None:
    names = ["w", "bf16", "zeros", "scalar", "empty"]
    extract(arrays, "out.safetensors", format="safetensors", names=names)
    loaded = load_file("out.safetensors")
    assert set(loaded) == set(names)
    for name in names:
        assert loaded[name].shape == ARRAYS[name].shape
        assert loaded[name].tobytes() == ARRAYS[name].tobytes()
    data = Path("out.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"author": "me", "steps": "[1, 2]"}
    for name in names:
        size = ARRAYS[name].dtype.itemsize
        assert (8 + int.from_bytes(data[:8], "little") + header[name]["data_offsets"][0]) % size == 0


def test_extract_safetensors_keeps_packed_dtypes(folder: Path) -> None:
    text = b'{"a":{"dtype":"F4","shape":[2,6],"data_offsets":[0,6]}}'
    Path("x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"packed")
    build("x.safetensors", "s.lzm")
    extract("s.lzm", "out", format="safetensors")
    ((name, tensor),) = deserialize(Path("out").read_bytes())
    assert (name, tensor["dtype"], tensor["shape"], bytes(tensor["data"])) == ("a", "F4", [2, 6], b"packed")


def test_extract_safetensors_refuses_what_it_cannot_say(arrays: str) -> None:
    with pytest.raises(UnsupportedDtype, match="'слой/вес' has dtype >i8"):
        extract(arrays, "out", format="safetensors")
    build({"t": np.zeros(3, "M8[s]")}, "t.lzm")
    with pytest.raises(UnsupportedDtype, match="'t' has dtype datetime64"):
        extract("t.lzm", "out", format="safetensors")
    assert not os.path.exists("out")


def test_extract_does_not_overwrite_unless_told(arrays: str) -> None:
    Path("out").write_bytes(b"theirs")
    with pytest.raises(BuildError, match="exists already"):
        extract(arrays, "out")
    assert Path("out").read_bytes() == b"theirs"
    extract(arrays, "out", overwrite=True)
    assert zipfile.is_zipfile("out")


def test_extract_into_a_folder_keeps_others_files_when_it_fails(arrays: str) -> None:
    os.makedirs("out/слой")
    Path("out/слой/вес.npy").write_bytes(b"theirs")
    Path("out/mine").write_bytes(b"mine")
    with pytest.raises(BuildError, match="exists already"):
        extract(arrays, "out", format="npy")
    left = {str(path) for path in Path("out").rglob("*") if path.is_file()}
    assert left == {"out/слой/вес.npy", "out/mine"}


def test_extract_reports_progress_up_to_the_total(arrays: str) -> None:
    calls: list[tuple[int, int | None]] = []
    extract(arrays, "out", progress=lambda done, total: calls.append((done, total)))
    total = sum(array.nbytes for array in ARRAYS.values())
    assert calls[-1] == (total, total)
    assert len(calls) >= 3
    assert calls == sorted(calls)


@pytest.mark.parametrize("name", ["deflated.npz", "sparse.img", "x.safetensors"])
def test_extract_of_the_original_reports_progress_in_its_bytes(folder: Path, name: str) -> None:
    MAKERS[name](folder / name)
    build(name, "s.lzm", chunk_size=CHUNK)
    calls: list[tuple[int, int | None]] = []
    extract("s.lzm", "out", progress=lambda done, total: calls.append((done, total)))
    size = os.path.getsize(name)
    assert calls[-1] == (size, size)


def test_extract_interrupted_leaves_nothing(arrays: str) -> None:
    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    before = set(os.listdir())
    for form in (None, "npy", "raw", "safetensors"):
        names = ["zeros"] if form in ("raw", "safetensors") else None
        with pytest.raises(KeyboardInterrupt):
            extract(arrays, "out", format=form, names=names, progress=interrupt)
        assert set(os.listdir()) == before


def test_extract_of_a_damaged_chunk_names_it_and_leaves_nothing(folder: Path) -> None:
    make_npy(folder / "x.npy")
    build("x.npy", "s.lzm", chunk_size=CHUNK)
    with LocalBlob("s.lzm") as blob:
        offset = int(SnapshotReader(blob).index.records["offset"][1])
    data = bytearray(Path("s.lzm").read_bytes())
    data[offset + 10] ^= 1
    Path("s.lzm").write_bytes(data)
    before = set(os.listdir())
    for form in (None, "npz", "npy", "raw"):
        with pytest.raises(ChunkCorrupt) as caught:
            extract("s.lzm", "out", format=form)
        assert caught.value.chunk == 1
        assert set(os.listdir()) == before


def test_extract_of_a_file_that_comes_back_different_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_npy(folder / "x.npy")
    build("x.npy", "s.lzm", chunk_size=CHUNK)
    read = SnapshotReader.read_segment
    # The index has no checksum per range: a reader that gives other bytes stands for any such fault.
    monkeypatch.setattr(
        SnapshotReader,
        "read_segment",
        lambda self, segment: (memoryview(bytes(len(piece))) for piece in read(self, segment)),
    )
    with pytest.raises(FormatError, match=r"'x.npy', put together again, has another SHA-256") as caught:
        extract("s.lzm", "out")
    assert caught.value.field == "x.npy"
    assert not os.path.exists("out")


@pytest.mark.parametrize(("bytes_more", "says"), [(b"x" * 4000, "more bytes"), (b"", "fewer bytes")])
def test_extract_by_a_zlib_that_deflates_otherwise_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bytes_more: bytes, says: str
) -> None:
    make_deflated(folder / "deflated.npz")
    build("deflated.npz", "s.lzm", chunk_size=CHUNK)

    class Other:
        def compress(self, data: bytes) -> bytes:
            return bytes_more * 100

        def flush(self) -> bytes:
            return b""

    monkeypatch.setattr("zlib.compressobj", lambda *args: Other())
    with pytest.raises(FormatError, match=f"deflates to {says}.*zlib") as caught:
        extract("s.lzm", "out")
    assert "npz" in str(caught.value)
    assert not os.path.exists("out")


def test_extract_of_a_file_that_cannot_come_back_says_why(folder: Path) -> None:
    with zipfile.ZipFile("x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        stream = io.BytesIO()
        np.save(stream, np.arange(5000) % 91)
        archive.writestr("a.npy", stream.getvalue())
    build("x.npz", "s.lzm")
    with pytest.raises(UnsupportedFormat, match=r"npz original cannot be given back.*format=\"npz\""):
        extract("s.lzm", "out")
    extract("s.lzm", "out", format="npz")
    with np.load("out") as loaded:
        assert np.array_equal(loaded["a"], np.arange(5000) % 91)


@pytest.mark.parametrize("name", ["../up", "/abs", "a/../../up", "a//b", "a\\b", "nul\0", "line\n"])
def test_extract_of_a_hostile_array_name_writes_nothing(folder: Path, name: str) -> None:
    os.mkdir("inner")
    build({name: np.arange(3), "ok": np.arange(3)}, "s.lzm")
    before = {str(path) for path in folder.rglob("*")}
    for form in ("npy", "npz"):
        with pytest.raises(LazymemError, match=r"the name|array name"):
            extract("s.lzm", "inner/out", format=form)
        assert {str(path) for path in folder.rglob("*")} == before
    extract("s.lzm", "inner/out", format="safetensors")
    assert set(load_file("inner/out")) == {name, "ok"}


def test_extract_does_not_follow_links_below_the_folder(folder: Path, arrays: str) -> None:
    os.makedirs("out")
    os.makedirs("elsewhere")
    os.symlink("../elsewhere", "out/слой")
    with pytest.raises(BuildError, match="is a link"):
        extract(arrays, "out", format="npy")
    assert os.listdir("elsewhere") == []
    assert os.listdir("out") == ["слой"]


def test_extract_bad_arguments_are_named(arrays: str) -> None:
    with pytest.raises(OptionError, match="format is 'zarr'"):
        extract(arrays, "out", format="zarr")
    with pytest.raises(SnapshotNotFound):
        extract("absent.lzm", "out")
    with pytest.raises(BuildError, match="create it first"):
        extract(arrays, "absent/out")
    Path("plain").touch()
    with pytest.raises(BuildError, match="not a folder"):
        extract(arrays, "plain", format="npy")


@pytest.mark.parametrize("name", ["memory.img", "sparse.img", "empty.img", "x.npy", "x.npz", "x.safetensors"])
def test_cat_reads_containers_in_place(folder: Path, name: str) -> None:
    MAKERS[name](folder / name)
    snap = lazymem.open(name)
    for array in snap:
        out = io.BytesIO()
        assert cat(name, array, out) == snap.info(array).nbytes
        assert out.getvalue() == snap[array].tobytes("A")
    with pytest.raises(ArrayNotFound, match="'nope'"):
        cat(name, "nope", io.BytesIO())


def test_cat_of_a_compressed_array_says_to_build(folder: Path) -> None:
    make_deflated(folder / "deflated.npz")
    with pytest.raises(UnsupportedFormat, match=r"'a' is compressed .*lazymem build"):
        cat("deflated.npz", "a", io.BytesIO())


def test_extract_refuses_pipes_and_standard_output(arrays: str) -> None:
    os.mkfifo("pipe")
    with pytest.raises(BuildError, match="is a named pipe"):
        extract(arrays, "pipe", overwrite=True)
    assert Path("pipe").is_fifo()
    with pytest.raises(OptionError, match="lazymem cat"):
        extract(arrays, "-")
    assert not os.path.lexists("-")


def test_extract_follows_a_link_that_the_user_named(arrays: str) -> None:
    Path("real").write_bytes(b"old")
    os.symlink("real", "link")
    extract(arrays, "link", overwrite=True)
    assert os.path.islink("link")
    assert zipfile.is_zipfile("real")


def test_extract_into_a_folder_follows_no_link(arrays: str) -> None:
    os.makedirs("out")
    Path("theirs").write_bytes(b"theirs")
    os.symlink("../theirs", "out/w.npy")
    with pytest.raises(BuildError, match="is a link"):
        extract(arrays, "out", format="npy", overwrite=True)
    assert Path("theirs").read_bytes() == b"theirs"
    assert os.listdir("out") == ["w.npy"]


def test_extract_of_what_is_no_snapshot_says_so(folder: Path) -> None:
    make_npy(folder / "x.npy")
    for source, says in (("x.npy", "is not a snapshot"), (".", "is a folder")):
        with pytest.raises(FormatError, match=says):
            extract(source, "out")


def test_cat_writes_the_bytes_as_they_lie(arrays: str) -> None:
    for name, array in ARRAYS.items():
        out = io.BytesIO()
        assert cat(arrays, name, out) == array.nbytes
        assert out.getvalue() == array.tobytes("A")
    with pytest.raises(ArrayNotFound, match="'nope'"):
        cat(arrays, "nope", io.BytesIO())
