# SPDX-License-Identifier: Apache-2.0
"""Touches made with the GIL held: the fault path must not need Python."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..children import check_child

SCAN = """
import gc, sys, threading
import numpy as np
import lazymem
from tests.arrays import make_arrays

path, install = sys.argv[1:]
expected = make_arrays()
gc.set_threshold(10)
sys.setswitchinterval(1e-6)
for round in range(3):
    snap = lazymem.open(path, install=install, readahead=0)
    stop = threading.Event()
    wrong = []

    def pure_python():
        count = 0
        while not stop.is_set():
            count += len(str(count)) + sum(i * i for i in range(50))

    def touch(number):
        order = np.random.default_rng(number + round).permutation(len(expected))
        names = list(expected)
        for i in order:
            name = names[i]
            # Object conversion and item access hold the GIL across the touch.
            flat = snap[name].reshape(-1, order="A")
            for at in range(0, flat.size, 16384):
                if flat[at] != expected[name].reshape(-1, order="A")[at]:
                    wrong.append((name, at))
            if snap[name].tobytes() != expected[name].tobytes():
                wrong.append(name)
            garbage = [[i] for i in range(100)]
            garbage.append(garbage)

    workers = [threading.Thread(target=touch, args=(n,)) for n in range(8)]
    busy = [threading.Thread(target=pure_python) for n in range(2)]
    for thread in workers + busy:
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    for thread in busy:
        thread.join()
    assert not wrong, wrong[:5]
    stats = snap.stats()
    states = snap.chunk_states()
    assert set(states) == {2}, set(states)
    assert stats.chunks_populated <= snap.chunk_count, "a chunk was decoded twice"
    snap.close()
print("right")
"""


@pytest.mark.parametrize("install", ["copy", "move"])
def test_eight_threads_holding_the_gil_read_right_bytes(huge_path: Path, install: str) -> None:
    assert check_child(SCAN, huge_path, install) == "right\n"


def test_eight_threads_on_small_chunks_read_right_bytes(snapshot_path: Path) -> None:
    assert check_child(SCAN, snapshot_path, "copy") == "right\n"


def test_touch_works_while_every_other_python_thread_is_stopped(snapshot_path: Path) -> None:
    """The main thread never gives the GIL away: nobody's Python code can run during its touches."""
    code = """
    import sys, threading, lazymem
    sys.setswitchinterval(1000)
    snap = lazymem.open(sys.argv[1], readahead=0)
    running = threading.Event()
    threading.Thread(target=lambda: running.wait(), daemon=True).start()
    total = 0
    for name in snap:
        array = snap[name]
        for index in range(0, array.size, 4096):
            total += int(array.flat[index])
    print(snap.stats().chunks_demand > 100)
    running.set()
    """
    assert check_child(code, snapshot_path) == "True\n"
