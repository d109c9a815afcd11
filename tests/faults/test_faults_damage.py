# SPDX-License-Identifier: Apache-2.0
"""A damaged chunk: named when asked for, SIGBUS when touched, and no other page is affected."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

import lazymem
from lazymem.errors import ChunkCorrupt, ReadError, SnapshotChanged
from lazymem.format.reader import load_index
from lazymem.store.local import LocalBlob

from ..children import check_child, run_child

NAME = "layer.3.weight"


def damage(path: Path, name: str = NAME, *, keep_time: bool = True) -> int:
    """Flip a byte in the stored bytes of the array's second chunk; the chunk's number.

    The file keeps its modification time: as when a disk, not a writer, changed it.
    """
    with LocalBlob(path) as blob:
        index = load_index(blob)
        offset, _ = index.range_of(index.rows[name])
        chunk = offset // index.chunk_size + 1
        record = index.record_of(chunk)
        assert record is not None
        at = int(index.records["offset"][record]) + 100
    before = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x40]))
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return chunk


@pytest.fixture
def damaged(snapshot_path: Path, tmp_path: Path) -> tuple[Path, int]:
    path = tmp_path / "damaged.lzm"
    shutil.copy(snapshot_path, path)
    return path, damage(path)


def test_prefetch_raises_chunk_corrupt_that_names_chunk_and_array(damaged: tuple[Path, int]) -> None:
    path, chunk = damaged
    with lazymem.open(path) as snap:
        with pytest.raises(ChunkCorrupt) as caught:
            snap.prefetch(wait=True)
        assert caught.value.chunk == chunk
        assert caught.value.array == NAME
        assert str(path) in str(caught.value)
        with pytest.raises(ChunkCorrupt):
            snap.read(NAME)
        assert snap.stats().chunks_failed == 2


def test_other_chunks_stay_right_beside_a_damaged_one(
    damaged: tuple[Path, int], arrays: dict[str, np.ndarray]
) -> None:
    path, _ = damaged
    with lazymem.open(path) as snap:
        with pytest.raises(ChunkCorrupt):
            snap.prefetch(NAME, wait=True)
        for name, expected in arrays.items():
            if name != NAME:
                assert np.array_equal(snap[name], expected), name


TOUCH = """
import sys, faulthandler
import lazymem
snap = lazymem.open(sys.argv[1], install=sys.argv[2], readahead=0)
array = snap["layer.3.weight"].reshape(-1)
print(float(array[0]), flush=True)
print(float(array[int(sys.argv[3])]), flush=True)
"""


@pytest.mark.parametrize("install", ["copy", "auto"])
def test_touch_of_a_damaged_chunk_is_sigbus_after_one_line(
    damaged: tuple[Path, int], arrays: dict[str, np.ndarray], install: str
) -> None:
    path, chunk = damaged
    done = run_child(TOUCH, path, install, 20_000)
    assert done.returncode == -signal.SIGBUS
    assert done.stdout == f"{float(arrays[NAME].reshape(-1)[0])}\n"
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    for part in (str(path), f"chunk {chunk}", NAME, "checksum", "lazymem verify"):
        assert part in lines[0]


def test_faulthandler_still_prints_its_traceback(damaged: tuple[Path, int]) -> None:
    code = "import faulthandler; faulthandler.enable()\n" + TOUCH
    done = run_child(code, damaged[0], "copy", 20_000)
    assert done.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in done.stderr


def test_poisoned_chunk_heals_when_asked_for_again(damaged: tuple[Path, int], snapshot_path: Path) -> None:
    """A child of a fork touches and dies; so does the chunk here, until the file is mended."""
    code = """
    import os, shutil, sys, signal
    import numpy as np
    import lazymem
    from lazymem.errors import LazymemError
    path, good = sys.argv[1:]
    snap = lazymem.open(path, readahead=0)
    name = "layer.3.weight"
    # A system call that touches a poisoned page gets an error in place of the signal.
    read_end, write_end = os.pipe()
    view = memoryview(snap[name].reshape(-1)).cast("B")
    start = snap.info(name).offset
    bad = (start // snap.chunk_size + 1) * snap.chunk_size - start
    try:
        os.write(write_end, view[bad : bad + 10])
        print("written")
    except OSError as error:
        print("EFAULT" if error.errno == 14 else error)
    print(4 in snap.chunk_states())
    with open(good, "rb") as source, open(path, "r+b") as target:
        shutil.copyfileobj(source, target)
    snap.prefetch(name, wait=True)
    print(set(snap.chunk_states()) <= {0, 2})
    with lazymem.open(good) as other:
        print(np.array_equal(snap[name], other[name]))
    """
    out = check_child(code, damaged[0], snapshot_path)
    assert out == "EFAULT\nTrue\nTrue\nTrue\n"


def test_file_cut_short_after_open_raises_snapshot_changed(snapshot_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.lzm"
    shutil.copy(snapshot_path, path)
    with lazymem.open(path) as snap:
        os.truncate(path, 5000)
        with pytest.raises(SnapshotChanged, match="was changed while it was open"):
            snap.prefetch(wait=True)


def test_file_overwritten_in_place_after_open_is_never_shown(snapshot_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "overwritten.lzm"
    shutil.copy(snapshot_path, path)
    with lazymem.open(path) as snap:
        damage(path, keep_time=False)
        with pytest.raises(SnapshotChanged):
            snap.prefetch(wait=True)


def test_file_replaced_by_rename_after_open_still_shows_the_opened_one(
    snapshot_path: Path, tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    path = tmp_path / "replaced.lzm"
    shutil.copy(snapshot_path, path)
    with lazymem.open(path) as snap:
        lazymem.build({NAME: np.ones(10)}, path)
        assert np.array_equal(snap[NAME], arrays[NAME])


def test_eager_backend_refuses_a_damaged_snapshot_at_open(damaged: tuple[Path, int]) -> None:
    with pytest.raises(ChunkCorrupt, match=NAME):
        lazymem.open(damaged[0], backend="eager")


def test_mapped_container_cut_short_raises_instead_of_sigbus_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "raw.npy"
    np.save(path, np.arange(1_000_000))
    with lazymem.open(path) as snap:
        assert snap.backend == "map"
        os.truncate(path, 4096)
        with pytest.raises((ReadError, SnapshotChanged)):
            snap.prefetch(wait=True)
