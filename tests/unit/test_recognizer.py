# SPDX-License-Identifier: Apache-2.0
"""What a URL holds, found out in as few requests as can be; sharded models by URL."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save, save_file

import lazymem
from lazymem.containers.base import Directory
from lazymem.containers.detect import open_container
from lazymem.errors import FormatError, OptionError, SnapshotNotFound, UnsupportedFormat
from lazymem.format.reader import SnapshotReader, load_index, open_snapshot
from lazymem.recognizer import recognize
from lazymem.store.base import Blob

from .openers import TAIL, FakeOpener, local

BIG = np.arange(50_000)  # 400 kB: more than comes with opening


@pytest.fixture
def opener(tmp_path: Path) -> FakeOpener:
    return FakeOpener(tmp_path)


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(*, compressed: bool) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).bytes(200_000)
    arrays = {name: np.frombuffer(noise, np.uint8) for name in "abc"}
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


def directory_of(found: Blob | Directory) -> Directory:
    assert isinstance(found, Directory)
    return found


# ---- requests ----


def test_snapshot_by_url_is_one_request(tmp_path: Path, opener: FakeOpener) -> None:
    lazymem.build({"x": BIG}, tmp_path / "a", codec="none")
    size = (tmp_path / "a").stat().st_size
    found = recognize(opener.url("a"), opener)
    assert not isinstance(found, Directory)
    assert load_index(found).names == ["x"]
    assert opener.requests == [("a", size - TAIL, TAIL)]


def test_snapshot_with_a_large_index_is_two_requests(tmp_path: Path, opener: FakeOpener) -> None:
    lazymem.build({f"{i:099}": np.arange(i % 7) for i in range(20_000)}, tmp_path / "a")
    found = recognize(opener.url("a"), opener)
    assert not isinstance(found, Directory)
    assert len(load_index(found).names) == 20_000
    assert len(opener.requests) == 2


@pytest.mark.parametrize(
    ("data", "form", "requests"),
    [
        (npy(np.arange(9)), "npy", 1),
        (npy(BIG), "npy", 2),
        (save({"a": np.arange(9)}), "safetensors", 1),
        (save({"a": BIG}), "safetensors", 2),
        (save({f"{i:099}": np.arange(9) for i in range(1000)} | {"big": BIG}), "safetensors", 3),
        (bytes(10), "raw", 1),
        (b"", "raw", 1),
        (bytes(TAIL * 3), "raw", 2),
        (npz(compressed=False), "npz", 2 + 3),  # and each member's header
        (npz(compressed=True), "npz", 2 + 3),
    ],
)
def test_container_by_url_costs_few_requests(
    tmp_path: Path, opener: FakeOpener, data: bytes, form: str, requests: int
) -> None:
    (tmp_path / "x").write_bytes(data)
    with_url = directory_of(recognize(opener.url("x"), opener))
    asked = len(opener.requests)
    here = directory_of(recognize(str(tmp_path / "x"), local()))
    assert with_url.format == here.format == form
    assert with_url.arrays == here.arrays
    assert list(with_url.file_names) == ["x"]
    assert with_url.files[0].url == "mem://x"
    assert asked == requests, opener.requests
    assert len(opener.blobs) == 1  # opened once
    with_url.close()
    assert opener.blobs[0].closed


def test_container_as_a_given_format_by_url(tmp_path: Path, opener: FakeOpener) -> None:
    lazymem.build({"x": BIG}, tmp_path / "a.lzm")
    found = directory_of(recognize(opener.url("a.lzm"), opener, as_format="raw"))
    assert (found.format, found.arrays[0].nbytes) == ("raw", (tmp_path / "a.lzm").stat().st_size)
    assert len(opener.requests) == 1
    with pytest.raises(FormatError, match=r"mem://a\.lzm"):
        recognize(opener.url("a.lzm"), opener, as_format="npy")
    with pytest.raises(OptionError, match="no folder"):
        recognize(opener.url("a.lzm"), opener, as_format="safetensors-sharded")
    assert all(blob.closed for blob in opener.blobs[1:])


@pytest.mark.parametrize("name", ["x.lzm", "x.LZM"])
def test_url_that_is_called_a_snapshot_and_is_none_is_refused(
    tmp_path: Path, opener: FakeOpener, name: str
) -> None:
    (tmp_path / name).write_bytes(bytes(TAIL * 2))
    for call in (recognize, open_snapshot):
        with pytest.raises(FormatError, match="neither begins nor ends as a snapshot"):
            call(opener.url(name), opener)
    assert all(blob.closed for blob in opener.blobs)


def test_url_of_a_snapshot_cut_short_is_a_snapshot(tmp_path: Path, opener: FakeOpener) -> None:
    lazymem.build({"x": BIG}, tmp_path / "whole", codec="none")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-10])
    found = recognize(opener.url("cut"), opener)
    assert not isinstance(found, Directory)
    with pytest.raises(FormatError, match="cut short"):
        load_index(found)


# ---- shards ----


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    weight_map = {}
    for shard in range(40):
        name = f"model-{shard:05}-of-00040.safetensors"
        save_file({f"t{shard}": np.full(9, shard), f"u{shard}": np.ones(2)}, folder / name)
        weight_map |= {f"t{shard}": name, f"u{shard}": name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("location", ["mem://model/model.safetensors.index.json", "mem://model/"])
def test_shards_by_url_are_opened_beside_their_index(model: Path, location: str) -> None:
    opener = FakeOpener(model.parent, lists=False)
    found = directory_of(recognize(location, opener))
    here = directory_of(recognize(str(model), local()))
    assert found.format == "safetensors-sharded"
    assert found.arrays == here.arrays
    assert list(found.file_names) == list(here.file_names) == sorted(found.file_names)
    assert [blob.url for blob in found.files] == [f"mem://model/{name}" for name in found.file_names]
    assert found.extra_files == here.extra_files
    assert len(opener.requests) == 41
    found.close()
    assert all(blob.closed for blob in opener.blobs)


def test_shards_by_url_of_a_folder_without_an_index(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()
    opener = FakeOpener(model.parent)
    found = directory_of(recognize("mem://model/", opener))
    assert (len(found.arrays), opener.listed) == (80, 1)
    for shard in list(found.file_names):
        (model / shard).unlink()
    with pytest.raises(UnsupportedFormat, match=r"mem://model/: the folder holds no \.safetensors"):
        recognize("mem://model/", opener)


@pytest.mark.parametrize("name", ["../secret", "a/b", "..", "", "/etc/passwd", "s3://other/x", "a\\b"])
def test_shards_by_url_cannot_lead_out_of_the_folder(model: Path, name: str) -> None:
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    opener = FakeOpener(model.parent)
    with pytest.raises(FormatError, match="weight_map has"):
        recognize("mem://model/", opener)
    assert {request[0] for request in opener.requests} == {"model/model.safetensors.index.json"}


def test_shards_by_url_of_which_one_is_missing_or_broken_close_the_others(model: Path) -> None:
    opener = FakeOpener(model.parent)
    broken = model / "model-00007-of-00040.safetensors"
    for data in (b"x" * 100, None):
        if data is None:
            broken.unlink()
        else:
            broken.write_bytes(data)
        with pytest.raises(FormatError, match="model-00007-of-00040"):
            open_container("mem://model/", opener)
    assert all(blob.closed for blob in opener.blobs)


def test_missing_urls_are_named(opener: FakeOpener) -> None:
    for location in ("mem://none", "mem://none.safetensors.index.json"):
        with pytest.raises(SnapshotNotFound, match="mem://none"):
            recognize(location, opener)


# ---- reading what was recognized ----


def test_reader_of_a_url_reads_only_the_chunks_of_a_range_and_ahead(
    tmp_path: Path, opener: FakeOpener
) -> None:
    arrays = {name: np.random.default_rng(ord(name)).integers(0, 256, 1 << 20, np.uint8) for name in "abc"}
    lazymem.build(arrays, tmp_path / "x.lzm", chunk_size=1 << 16)
    blob = opener.open(opener.url("x.lzm"))
    reader = SnapshotReader(blob)
    offset, nbytes = reader.index.range_of(reader.index.rows["b"])
    before = len(opener.requests)
    with reader.ahead([(offset, nbytes)]):
        data = b"".join(reader.read_range(offset, nbytes))
    assert data == arrays["b"].tobytes()
    stored = reader.index.records["stored_length"][16:32]
    # One array is one range of the file, and less than a piece of reading ahead.
    assert [length for _, _, length in opener.requests[before:]] == [int(stored.sum())]
