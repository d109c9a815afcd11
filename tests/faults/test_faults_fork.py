# SPDX-License-Identifier: Apache-2.0
"""fork: without a remedy the child reads zeros from every page that was not populated before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..children import check_child

COMMON = """
import os, sys, threading, time
import numpy as np
import lazymem
from tests.arrays import make_arrays

expected = make_arrays()

def all_right(snap):
    return all(np.array_equal(snap[name], expected[name]) for name in expected)

def wait_for(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


@pytest.mark.parametrize("mode", ["r", "c"])
@pytest.mark.parametrize("install", ["copy", "move"])
def test_child_reads_right_bytes_populated_before_and_after(huge_path: Path, mode: str, install: str) -> None:
    code = (
        COMMON
        + """
snap = lazymem.open(sys.argv[1], mode=sys.argv[2], install=sys.argv[3], readahead=0)
assert np.array_equal(snap["layer.1.weight"], expected["layer.1.weight"])
if sys.argv[2] == "c":
    snap["layer.2.weight"][0, 0] = 42
pid = os.fork()
if pid == 0:
    if sys.argv[2] == "c":
        assert snap["layer.2.weight"][0, 0] == 42
        snap["layer.2.weight"][0, 0] = expected["layer.2.weight"][0, 0]
    snap.prefetch("layer.5.weight", wait=True)
    grandchild = os.fork()
    if grandchild == 0:
        os._exit(0 if all_right(snap) else 1)
    os._exit(0 if all_right(snap) and wait_for(grandchild) == 0 else 1)
if sys.argv[2] == "c":
    assert snap["layer.2.weight"][0, 0] == 42
    snap["layer.2.weight"][0, 0] = expected["layer.2.weight"][0, 0]
assert all_right(snap)
print(wait_for(pid))
"""
    )
    assert check_child(code, huge_path, mode, install) == "0\n"


def test_child_outlives_its_parent(snapshot_path: Path) -> None:
    code = (
        COMMON
        + """
snap = lazymem.open(sys.argv[1])
read_end, write_end = os.pipe()
parent = os.fork()
if parent == 0:
    child = os.fork()
    if child == 0:
        os.close(read_end)
        while os.getppid() == int(os.environ.get("MIDDLE", "0")):
            time.sleep(0.001)
        os.write(write_end, b"right" if all_right(snap) else b"wrong")
        os._exit(0)
    os._exit(0)
os.close(write_end)
wait_for(parent)
print(os.read(read_end, 10).decode())
"""
    )
    assert check_child(code, snapshot_path) == "right\n"


def test_fork_while_faults_and_prefetches_are_in_flight(huge_path: Path, snapshot_path: Path) -> None:
    code = (
        COMMON
        + """
for round in range(40):
    path = sys.argv[1 + round % 2]
    snap = lazymem.open(path, install=("copy", "move")[round // 2 % 2] if round % 2 == 0 else "copy")
    wrong = []

    def touch(number):
        names = list(expected)
        np.random.default_rng(number).shuffle(names)
        for name in names:
            if not np.array_equal(snap[name], expected[name]):
                wrong.append(name)

    threads = [threading.Thread(target=touch, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    snap.prefetch()
    pids = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if all_right(snap) else 1)
        pids.append(pid)
    for thread in threads:
        thread.join()
    assert not wrong
    assert [wait_for(pid) for pid in pids] == [0, 0], round
    snap.close()
print("right")
"""
    )
    assert check_child(code, huge_path, snapshot_path, deadline=100) == "right\n"


def test_multiprocessing_fork_pool_reads_right_bytes(snapshot_path: Path) -> None:
    code = (
        COMMON
        + """
import multiprocessing
snap = lazymem.open(sys.argv[1])

def check(name):
    return np.array_equal(snap[name], expected[name])

with multiprocessing.get_context("fork").Pool(3) as pool:
    print(all(pool.map(check, list(expected))))
"""
    )
    assert check_child(code, snapshot_path) == "True\n"


def test_child_closes_and_opens_snapshots_of_its_own(snapshot_path: Path) -> None:
    code = (
        COMMON
        + """
snap = lazymem.open(sys.argv[1])
float(snap["layer.0.weight"][0, 0])
pid = os.fork()
if pid == 0:
    snap.close()
    with lazymem.open(sys.argv[1]) as other:
        right = all_right(other)
    from lazymem._native import engine_counts
    os._exit(0 if right and engine_counts() == (0, 0) else 1)
assert wait_for(pid) == 0
print(all_right(snap))
"""
    )
    assert check_child(code, snapshot_path) == "True\n"


def test_subprocess_after_open_works(snapshot_path: Path) -> None:
    code = (
        COMMON
        + """
import subprocess
snap = lazymem.open(sys.argv[1])
said = subprocess.run(["echo", "here"], capture_output=True, text=True, preexec_fn=lambda: None)
print(said.stdout, end="")
print(all_right(snap))
"""
    )
    assert check_child(code, snapshot_path) == "here\nTrue\n"
