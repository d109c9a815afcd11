# SPDX-License-Identifier: Apache-2.0
"""Composed regions (dtype=, parts in another order) under what befalls a process: GIL, network. What forks:
test_faults_fork.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ..children import check_child, run_child
from ..servers.proxy import Fault
from .network import Child, wait_until
from .test_faults_gil_network import KEY, OPTIONS, kill

if TYPE_CHECKING:
    from ..servers.proxy import HostileProxy
    from ..servers.s3 import Bucket

COMMON = """
import ctypes, json, os, sys, threading, time
import numpy as np
import lazymem
from tests.arrays import make_arrays

expected = {
    name: array.astype(np.float64) if array.dtype == np.float32 else array
    for name, array in make_arrays().items()
}

def wrong(snap):
    return [name for name in expected if not np.array_equal(snap[name], expected[name])]
"""


def test_touches_that_keep_the_gil_are_served_from_a_store(s3: Bucket, snapshot_path: Path) -> None:
    """Composers are C: eight threads and a memcpy that never lets Python run."""
    s3.put(KEY, snapshot_path.read_bytes())
    code = (
        COMMON
        + """
snap = lazymem.open(sys.argv[1], dtype="float64", readahead=0, storage_options=json.loads(sys.argv[2]))
sys.setswitchinterval(1000)
memcpy = ctypes.PyDLL(None).memcpy
memcpy.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
found = {}
def copy(name):
    info = snap.info(name)
    out = np.zeros(info.nbytes, np.uint8)
    memcpy(out.ctypes.data, snap[name].ctypes.data, info.nbytes)
    found[name] = out.tobytes()
threads = [threading.Thread(target=copy, args=(f"layer.{i}.weight",)) for i in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(all(found[name] == expected[name].tobytes() for name in found), len(found))
"""
    )
    assert check_child(code, s3.url(KEY), OPTIONS) == "True 8\n"


@pytest.mark.timeout(200)
def test_fetcher_killed_in_mid_flight_loses_nothing(
    s3: Bucket, proxy: HostileProxy, snapshot_path: Path, tmp_path: Path
) -> None:
    s3.put(KEY, snapshot_path.read_bytes())
    s3.through(proxy)
    proxy.add(Fault(delay=0.01, jitter=0.03, rate=8 << 20))
    code = (
        COMMON
        + """
options = json.loads(sys.argv[2])
print("scanning", flush=True)
for rounds in range(1000):
    snap = lazymem.open(sys.argv[1], dtype="float64", storage_options=options)
    if rounds % 2:
        snap.prefetch(wait=True)
    assert not wrong(snap), rounds
    snap.close()
    if os.path.exists(sys.argv[3]):
        break
print("right", flush=True)
"""
    )
    stop = tmp_path / "stop"
    with Child(code, s3.url(KEY), OPTIONS, str(stop), deadline=150) as child:
        assert child.hear() == "scanning"
        for _ in range(12):
            seen = len(proxy.requests())
            wait_until(lambda seen=seen: len(proxy.requests()) > seen + 2)
            kill(child.fetchers())
        stop.touch()
        proxy.heal()
        assert child.hear() == "right"
        assert child.finish() == 0
    stop.unlink()


def test_store_that_says_no_is_quoted(s3: Bucket, snapshot_path: Path) -> None:
    """By the exception, and by the line before SIGBUS."""
    s3.put(KEY, snapshot_path.read_bytes())
    code = (
        COMMON
        + """
snap = lazymem.open(sys.argv[1], dtype="float64", readahead=0, storage_options=options)
print("open", flush=True)
sys.stdin.readline()
try:
    snap.prefetch("layer.3.weight", wait=True)
except lazymem.SnapshotNotFound as error:
    print("layer.3.weight" in str(error), flush=True)
snap["layer.5.weight"].sum()
"""
    )
    with Child(code, s3.url(KEY), '{"timeout": 5}') as child:
        assert child.hear() == "open"
        s3.delete(KEY)
        child.say()
        assert child.hear() == "True"
        assert child.finish() == -signal.SIGBUS
        assert "array 'layer.5.weight'" in child.stderr


def test_close_while_requests_are_out_does_not_wait_for_them(
    s3: Bucket, proxy: HostileProxy, snapshot_path: Path
) -> None:
    s3.put(KEY, snapshot_path.read_bytes())
    s3.through(proxy)
    code = (
        COMMON
        + """
snap = lazymem.open(sys.argv[1], dtype="float64", storage_options=json.loads(sys.argv[2]))
print("open", flush=True)
sys.stdin.readline()
snap.prefetch()
time.sleep(0.3)
began = time.monotonic()
snap.close()
print(time.monotonic() - began < 20, flush=True)
os._exit(0)
"""
    )
    with Child(code, s3.url(KEY), OPTIONS) as child:
        assert child.hear() == "open"
        proxy.add(Fault(delay=60))
        child.say()
        assert child.hear() == "True"


def test_damaged_stock_is_a_signal_for_who_touches_it(snapshot_path: Path, tmp_path: Path) -> None:
    raw = bytearray(snapshot_path.read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "damaged.lzm").write_bytes(raw)
    done = run_child(
        COMMON
        + """
snap = lazymem.open(sys.argv[1], dtype="float64", readahead=0)
bad = []
for name in expected:
    try:
        snap.prefetch(name, wait=True)
    except lazymem.ChunkCorrupt as error:
        bad.append(error.array)
assert len(bad) == 1, bad
for name in expected:
    if name != bad[0]:
        assert np.array_equal(snap[name], expected[name]), name
print(bad[0], flush=True)
snap[bad[0]].sum()
""",
        tmp_path / "damaged.lzm",
    )
    assert done.returncode == -signal.SIGBUS
    assert f"array '{done.stdout.strip()}'" in done.stderr
    assert os.path.exists(tmp_path / "damaged.lzm")
