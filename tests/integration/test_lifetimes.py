# SPDX-License-Identifier: Apache-2.0
"""Who keeps the memory alive, who gives it back, and that nothing is left over."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import lazymem
from lazymem._native import engine_counts

from ..children import check_child, run_child

Arrays = dict[str, NDArray[np.generic]]


def test_close_refuses_while_arrays_are_alive(snapshot_path: Path, arrays: Arrays) -> None:
    snap = lazymem.open(snapshot_path)
    view = snap["ids"][10:20].reshape(2, 5)
    with pytest.raises(BufferError, match="still alive"):
        snap.close()
    assert not snap.closed
    assert np.array_equal(view.reshape(-1), arrays["ids"][10:20])
    del view
    buffer = snap.buffer
    with pytest.raises(BufferError):
        snap.close()
    del buffer
    snap.close()


def test_context_manager_shows_the_blocks_own_error(snapshot_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lazymem.open(snapshot_path) as snap:  # noqa: PT012
        array = snap["ids"]
        raise ZeroDivisionError(array.shape)


def test_arrays_outlive_the_snapshot(
    snapshot_path: Path, arrays: Arrays, counts_before: tuple[int, int]
) -> None:
    before = counts_before[0]
    array = lazymem.open(snapshot_path)["layer.7.weight"]
    column = array[:, 3]
    del array
    assert engine_counts()[0] == before + 1
    assert np.array_equal(column, arrays["layer.7.weight"][:, 3])
    del column
    assert engine_counts()[0] == before


def test_any_order_of_dropping_is_right(
    snapshot_path: Path, arrays: Arrays, counts_before: tuple[int, int]
) -> None:
    rng = np.random.default_rng(5)
    before = counts_before[0]
    for _ in range(30):
        snaps = [lazymem.open(snapshot_path) for _ in range(3)]
        held: list[object] = [*snaps, *(snap["ids"] for snap in snaps), *(snap.buffer for snap in snaps)]
        del snaps
        for position in rng.permutation(len(held)):
            thing = held[position]
            if isinstance(thing, np.ndarray):
                assert thing[123] == arrays["ids"][123]
            held[position] = None
            del thing
        assert engine_counts()[0] == before


LEAKS = """
import gc, os, sys
import numpy as np
import lazymem
from lazymem._native import engine_counts

def count():
    gc.collect()
    status = open("/proc/self/status").read()
    field = lambda name: int(status.split(name + ":")[1].split()[0])
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": field("Threads"),
        "mappings": open("/proc/self/maps").read().count("\\n"),
        "memory": field("VmRSS"),
        "address space": field("VmSize"),
    }

def cycle(i):
    snap = lazymem.open(sys.argv[1], mode="rc"[i % 2])
    if i % 4 == 0:
        assert snap["ids"][i] == i
    if i % 4 == 1:
        snap.prefetch("small.3")
    if i % 8 == 7:
        array = snap["ids"]
        del snap
        assert array[7] == 7
        return
    snap.close()

for i in range(int(sys.argv[2]) // 15):
    cycle(i)
before = count()
for i in range(int(sys.argv[2])):
    cycle(i)
after = count()
assert engine_counts() == (0, 0), engine_counts()
for name in ("descriptors", "threads", "mappings"):
    assert after[name] <= before[name] + (2 if name == "mappings" else 0), (name, before, after)
assert after["memory"] < before["memory"] + 4096, (before, after)
assert after["address space"] < before["address space"] + 20000, (before, after)
print("level")
"""


def test_thousands_of_cycles_leave_nothing_behind(snapshot_path: Path) -> None:
    # One that reads everything has to leave a region of megabytes behind only once.
    cycles = 120 if os.environ.get("LAZYMEM_BACKEND") == "eager" else 3000
    assert check_child(LEAKS, snapshot_path, cycles, deadline=100) == "level\n"


def test_close_while_other_threads_fault(snapshot_path: Path) -> None:
    """close() is refused as long as a thread holds an array, and then takes effect; nobody sees zeros."""
    code = """
    import sys, threading
    import numpy as np
    import lazymem
    from lazymem.errors import SnapshotClosed
    from tests.arrays import make_arrays
    expected = make_arrays()
    for round in range(30):
        snap = lazymem.open(sys.argv[1])
        wrong = []
        started = threading.Barrier(5)

        def touch(number):
            started.wait()
            names = list(expected)
            np.random.default_rng(number).shuffle(names)
            try:
                for name in names:
                    if not np.array_equal(snap[name], expected[name]):
                        wrong.append(name)
            except SnapshotClosed:
                pass

        def prefetch():
            started.wait()
            try:
                snap.prefetch(wait=True)
            except SnapshotClosed:
                pass

        threads = [threading.Thread(target=touch, args=(n,)) for n in range(3)]
        threads.append(threading.Thread(target=prefetch))
        for thread in threads:
            thread.start()
        started.wait()
        closed = False
        while not closed:
            try:
                snap.close()
                closed = True
            except BufferError:
                pass
        for thread in threads:
            thread.join()
        assert not wrong, wrong
    print("right")
    """
    assert check_child(code, snapshot_path, deadline=100) == "right\n"


def test_interpreter_exit_with_arrays_alive_and_faults_in_flight(snapshot_path: Path) -> None:
    code = """
    import atexit, sys, threading
    import lazymem
    snap = lazymem.open(sys.argv[1])
    array = snap["layer.2.weight"]
    atexit.register(lambda: print(float(array[1000, 1]) != 0.0, flush=True))
    def touch():
        for name in snap:
            snap[name].tobytes()
    threading.Thread(target=touch, daemon=True).start()
    snap.prefetch()
    """
    for _ in range(5):
        done = run_child(code, snapshot_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_garbage_collector_may_close_a_region_in_the_middle_of_a_touch(snapshot_path: Path) -> None:
    code = """
    import gc, sys
    import lazymem
    gc.set_threshold(1)
    for _ in range(50):
        class Node: pass
        node = Node()
        node.self, node.snap = node, lazymem.open(sys.argv[1])
        node.array = node.snap["ids"]
        other = lazymem.open(sys.argv[1])
        del node
        assert [int(v) for v in other["ids"][::30000]] == list(range(0, 300000, 30000))
    print("right")
    """
    assert check_child(code, snapshot_path) == "right\n"


def test_failed_open_leaves_nothing(tmp_path: Path, snapshot_path: Path) -> None:
    import os

    bad = tmp_path / "bad.lzm"
    bad.write_bytes(snapshot_path.read_bytes()[:-200])
    before = len(os.listdir("/proc/self/fd")), engine_counts()
    for _ in range(5):
        with pytest.raises(lazymem.LazymemError):
            lazymem.open(bad)
    assert (len(os.listdir("/proc/self/fd")), engine_counts()) == before
