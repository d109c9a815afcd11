# SPDX-License-Identifier: Apache-2.0
"""Remote bytes while Python cannot run: whoever touches keeps the GIL, and the fetcher dies meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ..servers.proxy import Fault
from .network import Child, wait_until

if TYPE_CHECKING:
    from ..servers.proxy import HostileProxy
    from ..servers.s3 import Bucket

KEY = "model.lzm"
OPTIONS = json.dumps({"timeout": 90, "attempt_timeout": 2})

# PyDLL, other than CDLL, keeps the GIL for as long as the C function runs.
WITHOUT_PYTHON = """
sys.setswitchinterval(1000)
memcpy = ctypes.PyDLL(None).memcpy
memcpy.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
count = 0  # of what another thread does

def copy_holding_the_gil(snap):
    source = np.frombuffer(snap.buffer, np.uint8)
    copy = np.empty(source.size, np.uint8)
    copy[:] = 1  # touched before, so that only the source faults
    arguments = copy.ctypes.data, source.ctypes.data, source.size
    before = count
    memcpy(*arguments)
    assert count == before, "the GIL was given away"
    return copy

def wrong_in(copy, snap):
    found = []
    for name, right in expected.items():
        info = snap.info(name)
        data = copy[info.offset : info.offset + info.nbytes]
        if data.tobytes() != right.tobytes("A"):
            found.append(name)
    return found
"""


@pytest.fixture
def url(s3: Bucket, proxy: HostileProxy, snapshot_path: Path) -> str:
    s3.put(KEY, snapshot_path.read_bytes())
    s3.through(proxy)
    return s3.url(KEY)


def kill(pids: list[int]) -> int:
    """SIGKILL to each that still runs; how many did."""
    count = 0
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            count += 1
    return count


@pytest.mark.parametrize("other", ["no other thread", "a thread that wants the GIL"])
def test_memcpy_that_keeps_the_gil_gets_every_byte(proxy: HostileProxy, url: str, other: str) -> None:
    code = (
        WITHOUT_PYTHON
        + """
snap = opened()
done = False
def counts():
    global count
    while not done:
        count += 1
        time.sleep(0.001)  # gives the GIL away, and wants it back
if sys.argv[3] != "no other thread":
    threading.Thread(target=counts).start()
copy = copy_holding_the_gil(snap)
done = True
tell(wrong_in(copy, snap), count > 0)
"""
    )
    proxy.add(Fault(status=503), probability=0.2)
    with Child(code, url, OPTIONS, other) as child:
        assert child.hear() == f"[] {other != 'no other thread'}"
        assert child.finish() == 0


def test_fetcher_killed_before_the_touch_is_replaced_without_the_gil(proxy: HostileProxy, url: str) -> None:
    code = (
        WITHOUT_PYTHON
        + """
snap = opened()
os.kill(fetcher_pid(), signal.SIGKILL)
tell(wrong_in(copy_holding_the_gil(snap), snap))
"""
    )
    with Child(code, url, OPTIONS) as child:
        assert child.hear() == "[]"
        assert child.finish() == 0


def test_fetcher_killed_during_a_memcpy_that_keeps_the_gil(proxy: HostileProxy, url: str) -> None:
    proxy.add(Fault(delay=0.01, rate=16 << 20))
    code = (
        WITHOUT_PYTHON
        + """
snap = opened()
tell("copying")
copy = copy_holding_the_gil(snap)
tell(wrong_in(copy, snap))
"""
    )
    with Child(code, url, OPTIONS) as child:
        assert child.hear() == "copying"
        for _ in range(5):
            seen = len(proxy.requests())
            wait_until(lambda seen=seen: len(proxy.requests()) > seen)
            assert kill(child.fetchers()) == 1
        assert child.hear() == "[]"
        assert child.finish() == 0


def test_endpoint_down_during_a_memcpy_that_keeps_the_gil(proxy: HostileProxy, url: str) -> None:
    proxy.add(Fault(delay=0.01, rate=16 << 20))
    code = (
        WITHOUT_PYTHON
        + """
snap = opened()
tell("copying")
copy = copy_holding_the_gil(snap)
tell(wrong_in(copy, snap))
"""
    )
    with Child(code, url, OPTIONS) as child:
        assert child.hear() == "copying"
        wait_until(lambda: len(proxy.requests()) > 3)
        proxy.down()
        time.sleep(2)
        proxy.up()
        assert child.hear() == "[]"
        assert child.finish() == 0


@pytest.mark.timeout(400)
@pytest.mark.parametrize("scan", ["touch", "prefetch"])
def test_fetcher_killed_fifty_times_during_full_scans(proxy: HostileProxy, url: str, scan: str) -> None:
    """One time in two as soon as it works, and a random moment later; else at any moment at all."""
    proxy.add(Fault(delay=0.01, jitter=0.03, rate=8 << 20))
    code = """
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
    rounds = 0
    tell("scanning")
    while not stop.is_set():
        snap = opened()
        if sys.argv[3] == "prefetch":
            snap.prefetch(wait=True)
        bad = wrong(snap)
        assert not bad, bad
        snap.close()
        rounds += 1
    tell(rounds > 0, fetcher_status()["starts"])
    """
    moments = random.Random(50)
    killed = 0
    with Child(code, url, OPTIONS, scan, deadline=350) as child:
        assert child.hear() == "scanning"
        while killed < 50:
            child.check_runs()
            if killed % 2:
                seen = len(proxy.requests())
                wait_until(lambda seen=seen: len(proxy.requests()) > seen)
            time.sleep(moments.random() * 0.3)
            killed += kill(child.fetchers())
        proxy.heal()
        child.say()
        right, starts = child.hear().split()
        assert right == "True"
        assert int(starts) > 40  # a few were killed twice, before they had ended
        assert child.finish() == 0
    wait_until(lambda: not child.fetchers())


def test_parent_killed_in_mid_flight_leaves_nothing(proxy: HostileProxy, url: str) -> None:
    proxy.add(Fault(delay=0.05, rate=1 << 20))
    code = """
    snap = opened()
    tell("scanning")
    wrong(snap)
    """
    with Child(code, url, OPTIONS) as child:
        assert child.hear() == "scanning"
        wait_until(lambda: len(proxy.requests()) > 3)
        assert len(child.fetchers()) == 1
        os.kill(child.pid, signal.SIGKILL)
        wait_until(lambda: not child.fetchers())
        wait_until(lambda: proxy.connections == 0)
