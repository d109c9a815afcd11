# SPDX-License-Identifier: Apache-2.0
"""What an application does to its own process: signals, descriptors, locked memory, privileges."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

import lazymem

from ..children import check_child, run_child
from .test_faults_damage import damaged  # noqa: F401

COMMON = """
import ctypes, os, resource, signal, sys, threading
import numpy as np
import lazymem
from tests.arrays import make_arrays

expected = make_arrays()

def all_right(snap):
    return all(np.array_equal(snap[name], expected[name]) for name in expected)
"""


@pytest.mark.parametrize("mode", ["r", "c"])
@pytest.mark.parametrize("backend", ["uffd", "uffd-user", "eager"])
def test_mlockall_before_open_does_not_fill_the_region_with_zeros(
    snapshot_path: Path, mode: str, backend: str
) -> None:
    code = (
        COMMON
        + """
limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)
libc = ctypes.CDLL(None, use_errno=True)
if libc.mlockall(3) != 0:
    print("not allowed")
    sys.exit()
snap = lazymem.open(sys.argv[1], mode=sys.argv[2], backend=sys.argv[3])
print(all_right(snap))
"""
    )
    out = check_child(code, snapshot_path, mode, backend)
    if out == "not allowed\n":
        pytest.skip("mlockall is not allowed here")
    assert out == "True\n"


@pytest.mark.parametrize("forked", [False, True])
def test_closing_all_descriptors_never_shows_zeros(snapshot_path: Path, forked: bool) -> None:
    """As daemons do. The bytes can be had no longer: SIGSEGV after a line that says why."""
    code = (
        COMMON
        + """
snap = lazymem.open(sys.argv[1], readahead=0)
array = snap["ids"]
if sys.argv[2] == "True":
    pid = os.fork()
    if pid:
        os.kill(os.getpid(), os.WTERMSIG(os.waitpid(pid, 0)[1]))
os.closerange(3, 4096)
print("closed", flush=True)
print("zeros" if array[250_000] == 0 else "bytes", flush=True)
"""
    )
    done = run_child(code, snapshot_path, forked)
    assert done.stdout == "closed\n"
    assert done.returncode == -signal.SIGSEGV
    assert "descriptors were closed by the application" in done.stderr


def test_signal_handlers_may_use_the_snapshot_they_interrupt(snapshot_path: Path) -> None:
    code = (
        COMMON
        + """
snap = lazymem.open(sys.argv[1])
calls = 0

def handler(*_):
    global calls
    calls += 1
    snap["scalar"]
    snap.stats()

signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
while calls < 300:
    snap["ids"]
    snap.stats()
    snap.prefetch("small.1", wait=True)
    assert all_right(snap)
signal.setitimer(signal.ITIMER_REAL, 0)
snap.close()
print("closed")
"""
    )
    assert check_child(code, snapshot_path) == "closed\n"


def test_exceptions_of_signal_handlers_leave_the_snapshot_usable(snapshot_path: Path) -> None:
    code = (
        COMMON
        + """
class Interrupt(Exception):
    pass

def handler(*_):
    raise Interrupt

signal.signal(signal.SIGALRM, handler)
interrupted = 0
for round in range(400):
    snap = lazymem.open(sys.argv[1])
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0001 + round * 1e-6)
        for _ in range(100):
            snap.stats()
            snap["ids"]
            snap.prefetch("small.2", wait=True)
    except Interrupt:
        interrupted += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert snap["ids"][77] == 77
    snap.close()
print(interrupted > 100)
"""
    )
    assert check_child(code, snapshot_path) == "True\n"


def test_ctrl_c_ends_a_long_prefetch(huge_path: Path) -> None:
    code = (
        COMMON
        + """
signal.signal(signal.SIGALRM, signal.default_int_handler)
for round in range(20):
    snap = lazymem.open(sys.argv[1], threads=1)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    try:
        while True:
            snap.prefetch(wait=True)
    except KeyboardInterrupt:
        pass
    snap.close()
print("interrupted")
"""
    )
    assert check_child(code, huge_path) == "interrupted\n"


def test_fork_in_a_signal_handler_during_a_prefetch(huge_path: Path) -> None:
    code = (
        COMMON
        + """
pids = []

def handler(*_):
    signal.setitimer(signal.ITIMER_REAL, 0)
    pid = os.fork()
    if pid:
        pids.append(pid)

signal.signal(signal.SIGALRM, handler)
for round in range(10):
    snap = lazymem.open(sys.argv[1], threads=1)
    parent = os.getpid()
    signal.setitimer(signal.ITIMER_REAL, 0.002)
    snap.prefetch(wait=True)
    if os.getpid() != parent:
        os._exit(0 if all_right(snap) else 1)
    assert all_right(snap)
    signal.setitimer(signal.ITIMER_REAL, 0)
    snap.close()
print(all(os.waitpid(pid, 0)[1] == 0 for pid in pids))
"""
    )
    assert check_child(code, huge_path) == "True\n"


def test_first_open_racing_a_fork_leaves_no_lock_behind(snapshot_path: Path) -> None:
    code = (
        COMMON
        + """
for round in range(30):
    stop = threading.Event()

    def cycle():
        while not stop.is_set():
            lazymem.open(sys.argv[1]).close()

    thread = threading.Thread(target=cycle)
    thread.start()
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            with lazymem.open(sys.argv[1]) as snap:
                os._exit(0 if snap["ids"][5] == 5 else 1)
        assert os.waitpid(pid, 0)[1] == 0
    stop.set()
    thread.join()
print("right")
"""
    )
    assert check_child(code, snapshot_path) == "right\n"


def test_child_of_a_process_that_gave_up_root_is_served(snapshot_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to give up")
    code = (
        COMMON
        + """
snap = lazymem.open(sys.argv[1], backend="uffd")
os.setgroups([]); os.setgid(65534); os.setuid(65534)
pid = os.fork()
if pid == 0:
    os._exit(0 if all_right(snap) else 1)
print(os.waitpid(pid, 0)[1])
"""
    )
    assert check_child(code, snapshot_path) == "0\n"


def test_a_full_stderr_pipe_does_not_hold_up_the_signal(damaged: tuple[Path, int]) -> None:  # noqa: F811
    code = """
    import fcntl, os, signal, sys
    import lazymem
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETFL, os.O_NONBLOCK)
    try:
        while True:
            os.write(write_end, bytes(4096))
    except BlockingIOError:
        pass
    fcntl.fcntl(write_end, fcntl.F_SETFL, 0)
    pid = os.fork()
    if pid == 0:
        os.dup2(write_end, 2)
        snap = lazymem.open(sys.argv[1], readahead=0)
        snap["layer.3.weight"].sum()
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGBUS)
    """
    assert check_child(code, damaged[0]) == "True\n"


def test_names_cannot_forge_lines_of_the_report(tmp_path: Path) -> None:
    path = tmp_path / "forged.lzm"
    name = "fine\nlazymem: all is well\x1b[2J"
    lazymem.build({name: np.random.default_rng(1).standard_normal(100_000)}, path, chunk_size=1 << 16)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    code = """
    import sys, lazymem
    snap = lazymem.open(sys.argv[1], readahead=0)
    next(iter(snap.values())).sum()
    """
    done = run_child(code, path)
    assert done.returncode == -signal.SIGBUS
    assert done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr


def test_threads_that_cannot_be_started_are_an_error_not_a_wait(snapshot_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to become a user without other processes")
    code = (
        COMMON
        + """
snap = lazymem.open(sys.argv[1])
os.setgroups([]); os.setgid(64999); os.setuid(64999)
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    try:
        snap.prefetch(wait=True)
    except lazymem.LazymemError as error:
        os._exit(0 if "no thread can be started" in str(error) else 1)
    os._exit(2)
print(os.waitpid(pid, 0)[1] >> 8)
"""
    )
    assert check_child(code, snapshot_path) == "0\n"


def test_what_is_waited_for_goes_before_what_is_only_queued(long_path: Path) -> None:
    with lazymem.open(long_path) as snap:
        snap.prefetch("big")
        assert snap.read("small").tolist() == list(range(9))
        assert snap.stats().chunks_prefetch < snap.chunk_count - 2
