# SPDX-License-Identifier: Apache-2.0
"""What the model of the protocol (tests/unit/protocol_model.py) found in the code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ..children import check_child
from .test_faults_damage import damage


@pytest.fixture
def damaged(snapshot_path: Path, tmp_path: Path) -> Path:
    path = tmp_path / "damaged.lzm"
    shutil.copy(snapshot_path, path)
    damage(path)
    return path


def test_poisoned_page_that_was_given_back_is_tried_again(damaged: Path, snapshot_path: Path) -> None:
    """MADV_DONTNEED takes the mark away: a touch is a fault again, which went round for ever."""
    code = """
import ctypes, os, shutil, signal, sys
import numpy as np
import lazymem

path, good = sys.argv[1:]
snap = lazymem.open(path, readahead=0)
array = snap["layer.3.weight"]
info = snap.info("layer.3.weight")
chunk = info.offset // snap.chunk_size + 1
bad = chunk * snap.chunk_size - info.offset
view = memoryview(array.reshape(-1)).cast("B")

def end_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def die_of_a_touch():
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(view[bad])
    return end_of(pid) == -signal.SIGBUS
read_end, write_end = os.pipe()
try:
    os.write(write_end, view[bad : bad + 10])
except OSError:
    pass
assert snap.chunk_states()[chunk] == 4
address = array.__array_interface__["data"][0] + bad
libc = ctypes.CDLL(None)

def give_back():
    assert libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(4096), 4) == 0

print(die_of_a_touch())  # fork may leave marks behind where nothing else of the mapping was ever there
give_back()
print(die_of_a_touch())
with open(good, "rb") as source, open(path, "r+b") as target:
    shutil.copyfileobj(source, target)
give_back()
with lazymem.open(good) as other:
    print(np.array_equal(array, other["layer.3.weight"]))
"""
    assert check_child(code, damaged, snapshot_path) == "True\nTrue\nTrue\n"


def test_prefetch_that_waits_survives_an_eviction(long_path: Path) -> None:
    """What it waits for is given back, or leaves the queue: it asks again. It waited for ever."""
    code = """
    import sys, threading
    import lazymem
    snap = lazymem.open(sys.argv[1], threads=1)
    waiter = threading.Thread(target=lambda: snap.prefetch(wait=True))
    waiter.start()
    while snap.stats().chunks_prefetch < 20:
        pass
    snap.evict()
    waiter.join()
    print(set(snap.chunk_states()))
    """
    assert check_child(code, long_path) == "{2}\n"
