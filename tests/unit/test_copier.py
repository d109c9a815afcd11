# SPDX-License-Identifier: Apache-2.0
"""`copy` between local files: what is copied, what is checked, what is refused. (Stores: test_cli_remote.)"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import lazymem
from lazymem import copier
from lazymem.copier import copy
from lazymem.errors import (
    BuildError,
    ChunkCorrupt,
    FormatError,
    OptionError,
    ReadError,
    SnapshotChanged,
    SnapshotNotFound,
)
from lazymem.format import structs
from lazymem.format.reader import load_index
from lazymem.store.local import LocalBlob

CHUNK = 1 << 16
RNG = np.random.default_rng(0)


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    path = tmp_path / "a.lzm"
    lazymem.build(
        {
            "zeros": np.zeros(10 * CHUNK, np.uint8),
            "noise": RNG.integers(0, 256, 100 * CHUNK, np.uint8),
            "little": np.arange(9),
        },
        path,
        chunk_size=CHUNK,
    )
    return path


def test_copy_of_a_snapshot_is_the_same_bytes_and_checked(snapshot: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    report = copy(snapshot, snapshot.with_name("b.lzm"), progress=lambda *now: seen.append(now))
    assert snapshot.with_name("b.lzm").read_bytes() == snapshot.read_bytes()
    assert report.size == snapshot.stat().st_size == seen[-1][0] == seen[-1][1]
    assert report.checked == 101
    assert (report.source, report.destination) == (str(snapshot), str(snapshot.with_name("b.lzm")))
    assert seen == sorted(seen)
    assert copy(snapshot, snapshot.with_name("b.lzm"), verify=False).checked is None


@pytest.mark.parametrize("size", [0, 1, 3, 4 << 20, (4 << 20) + 1, (12 << 20) - 1])
def test_copy_of_anything_else_is_the_same_bytes(tmp_path: Path, size: int) -> None:
    data = RNG.bytes(size)
    (tmp_path / "a").write_bytes(data)
    report = copy(tmp_path / "a", (tmp_path / "b").as_uri())
    assert (tmp_path / "b").read_bytes() == data
    assert (report.size, report.checked) == (size, None)


def test_copy_into_a_folder_keeps_the_name(snapshot: Path) -> None:
    folder = snapshot.parent / "folder"
    folder.mkdir()
    assert copy(snapshot, folder).destination == str(folder / "a.lzm")
    assert os.listdir(folder) == ["a.lzm"]


def test_copy_does_not_carry_damage_on(snapshot: Path) -> None:
    with LocalBlob(snapshot) as blob:
        records = load_index(blob).records
    data = bytearray(snapshot.read_bytes())
    data[int(records["offset"][50]) + 3] ^= 4
    snapshot.write_bytes(data)
    target = snapshot.with_name("b.lzm")
    # The zeros are chunks too, without records.
    with pytest.raises(ChunkCorrupt, match=r"chunk 82 .*'noise'.*do not match their checksum") as caught:
        copy(snapshot, target)
    assert caught.value.chunk == 82
    assert not target.exists()
    copy(snapshot, target, verify=False)
    assert target.read_bytes() == data


def test_copy_of_a_snapshot_cut_short_is_refused(snapshot: Path) -> None:
    snapshot.write_bytes(snapshot.read_bytes()[:-5])
    with pytest.raises(FormatError, match="cut short"):
        copy(snapshot, snapshot.with_name("b.lzm"))
    assert not snapshot.with_name("b.lzm").exists()


def test_copy_checks_records_that_share_their_bytes(snapshot: Path) -> None:
    with LocalBlob(snapshot) as blob:
        index = load_index(blob)
    shared = index.records.copy()
    shared["offset"][7] = shared["offset"][3]
    shared["stored_length"][7] = shared["stored_length"][3]
    object.__setattr__(index, "records", shared)
    steps = list(copier._steps(index.file_size, index))
    position = 0
    for offset, length, _ in steps:
        assert offset == position
        position += length
    assert position == index.file_size
    assert [3, 7] in [records for _, _, records in steps]
    assert sorted(record for _, _, records in steps for record in records) == list(range(len(shared)))


def test_copy_replaces_what_build_would(snapshot: Path) -> None:
    target = snapshot.with_name("b")
    target.write_bytes(b"precious")
    with pytest.raises(BuildError, match="is not a snapshot"):
        copy(snapshot, target)
    with pytest.raises(BuildError, match="exists already"):
        copy(snapshot, target, overwrite=False)
    assert target.read_bytes() == b"precious"
    copy(snapshot, target, overwrite=True)
    copy(snapshot, target)
    with pytest.raises(BuildError, match="exists already"):
        copy(snapshot, target, overwrite=False)


def test_copy_refuses_what_makes_no_sense(snapshot: Path) -> None:
    link = snapshot.with_name("link")
    link.symlink_to(snapshot)
    before = snapshot.read_bytes()
    for source, target, kind, words in (
        (snapshot, link, OptionError, "is the source and the destination"),
        (snapshot, snapshot.as_uri(), OptionError, "is the source and the destination"),
        ("-", link, OptionError, "standard input"),
        (snapshot, "-", OptionError, "always a file"),
        (snapshot.parent, link, OptionError, "one file is copied at a time"),
        (snapshot.with_name("none"), link, SnapshotNotFound, "no such file"),
        ("/dev/null", link, ReadError, "not a regular file"),
        (snapshot, "ftp://host/x", OptionError, "ftp"),
    ):
        with pytest.raises(kind, match=words):
            copy(source, target, overwrite=True)
    assert snapshot.read_bytes() == before


def test_copy_of_a_file_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(9 << 20))

    def change(done: int, total: int | None) -> None:
        os.utime(path)

    with pytest.raises(SnapshotChanged, match="while it was copied"):
        copy(path, tmp_path / "b", progress=change)
    assert os.listdir(tmp_path) == ["a"]


def test_copy_sees_every_byte_of_the_index_too(snapshot: Path) -> None:
    data = bytearray(snapshot.read_bytes())
    data[-structs.TAIL.size - 5] ^= 1
    snapshot.write_bytes(data)
    with pytest.raises(FormatError, match="index"):
        copy(snapshot, snapshot.with_name("b"))
