# SPDX-License-Identifier: Apache-2.0
"""The fetcher and what may happen to it, and to the process that it serves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .. import users
from ..children import check_child, run_child

if TYPE_CHECKING:
    from ..servers.s3 import Bucket

COMMON = """
import os, signal, sys, threading, time
import numpy as np
import lazymem
from lazymem.fetcher.client import fetcher_pid, fetcher_status
from tests.arrays import make_arrays

expected = make_arrays()

def all_right(snap):
    return all(np.array_equal(snap[name], expected[name]) for name in expected)

def wait_for(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

snap = lazymem.open(sys.argv[1], readahead=0)
"""


@pytest.fixture
def url(s3: Bucket, snapshot_path: Path) -> str:
    s3.put("small.lzm", snapshot_path.read_bytes())
    return s3.url("small.lzm")


def is_running(pid: int) -> bool:
    try:
        return b"\nState:\tZ" not in Path(f"/proc/{pid}/status").read_bytes()
    except FileNotFoundError:
        return False


def has_ended(pid: int) -> bool:
    for _ in range(100):
        if not is_running(pid):
            return True
        time.sleep(0.05)
    return False


def test_child_of_a_fork_has_a_fetcher_of_its_own(url: str) -> None:
    code = (
        COMMON
        + """
assert np.array_equal(snap["layer.1.weight"], expected["layer.1.weight"])
mine = fetcher_pid()
snap.prefetch()  # under way
pid = os.fork()
if pid == 0:
    right = all_right(snap)
    grandchild = os.fork()
    if grandchild == 0:
        snap.prefetch("layer.9.weight", wait=True)
        os._exit(0 if all_right(snap) else 1)
    other = lazymem.open(sys.argv[1])
    right = right and all_right(other) and fetcher_pid() not in (0, mine)
    os._exit(0 if right and wait_for(grandchild) == 0 else 1)
assert all_right(snap)
print(wait_for(pid), fetcher_pid() == mine)
"""
    )
    assert check_child(code, url) == "0 True\n"


def test_child_outlives_its_parent(url: str) -> None:
    code = (
        COMMON
        + """
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.01)
    sys.stdout.write("right" if all_right(snap) else "wrong")
    sys.stdout.flush()
    os._exit(0)
os._exit(0)
"""
    )
    assert check_child(code, url) == "right"


@pytest.mark.parametrize("end", ["exit", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_fetcher_goes_when_its_process_goes(url: str, end: str) -> None:
    code = COMMON + f"\nsnap.prefetch()\nprint(fetcher_pid(), flush=True)\n{end}\n"
    pid = int(run_child(code, url).stdout)
    assert pid > 0
    assert has_ended(pid)


def test_fetcher_is_nobodys_child(url: str) -> None:
    out = check_child(
        COMMON
        + """
seen = []
signal.signal(signal.SIGCHLD, lambda number, frame: seen.append(number))
os.kill(fetcher_pid(), signal.SIGKILL)
time.sleep(0.3)
assert all_right(snap)
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("no children", seen)
""",
        url,
    )
    assert out == "no children []\n"


def test_stopped_fetcher_is_replaced(url: str) -> None:
    out = check_child(
        COMMON
        + """
os.kill(fetcher_pid(), signal.SIGSTOP)
stopped = fetcher_pid()
assert all_right(snap)
try:
    state = open(f"/proc/{stopped}/status").read()
except FileNotFoundError:
    state = "State:\\tZ"
print(fetcher_pid() != stopped, "State:\\tZ" in state)  # a zombie, where init does not look after its own
""",
        url,
    )
    assert out == "True True\n"


def test_closing_all_descriptors_does_not_reach_the_fetcher(url: str) -> None:
    """Those of the engine are gone then; the courier's lie in a table of their own."""
    done = run_child(
        COMMON
        + """
snap.prefetch("layer.1.weight", wait=True)
os.closerange(3, 1000)
files = [os.open("/dev/null", os.O_RDWR) for _ in range(50)]
again = lazymem.open(sys.argv[1], backend="eager")
print(all_right(again), all(os.fstat(fd).st_rdev == os.stat("/dev/null").st_rdev for fd in files), flush=True)
os._exit(0)
""",
        url,
    )
    assert done.stdout == "True True\n", done.stderr


def test_interrupt_while_the_fetcher_works(url: str) -> None:
    out = check_child(
        COMMON
        + """
os.kill(fetcher_pid(), signal.SIGSTOP)
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    snap.prefetch(wait=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
os.kill(fetcher_pid(), signal.SIGCONT)
assert all_right(snap)
""",
        url,
    )
    assert out == "interrupted\n"


def test_many_opens_leave_nothing_behind(url: str) -> None:
    out = check_child(
        COMMON
        + """
def held():
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir("/proc/self/task"))
snap.close()
with lazymem.open(sys.argv[1]) as warm:
    warm.prefetch(wait=True)
time.sleep(0.2)
before = held()
for i in range(150):
    with lazymem.open(sys.argv[1]) as again:
        again.prefetch("layer.1.weight", wait=i % 2 == 0)
fds = len(os.listdir(f"/proc/{fetcher_pid()}/fd"))
# The last one's prefetch is broken off, and its number given back, behind close()'s back: that may take
# a while where the machine is busy, but what is left behind stays for ever.
until = time.monotonic() + 30
while (held() != before or fetcher_status()["sources"] > 1) and time.monotonic() < until:
    time.sleep(0.02)
assert held() == before, (before, held())
assert fetcher_status()["sources"] <= 1, fetcher_status()
assert fds < 100, fds
print("level")
""",
        url,
    )
    assert out == "level\n"


def test_ordinary_user_reads_right_bytes(url: str) -> None:
    users.demand()
    out = check_child(
        COMMON + "\nprint(snap.backend, all_right(snap))\n", url, prefix=users.prefix(), env={"HOME": "/"}
    )
    assert out.split()[1] == "True"


def test_missing_interpreter_is_named(url: str) -> None:
    out = check_child(
        """
        import sys, lazymem
        sys.executable = "/nonexistent/python"
        try:
            lazymem.open(sys.argv[1])
        except lazymem.ReadError as error:
            print(error)
        """,
        url,
    )
    assert "small.lzm" in out
    assert "cannot be started" in out


def test_reading_in_a_subprocess_started_meanwhile(url: str, s3: Bucket) -> None:
    """A child that only execs holds neither the socket nor the memory."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMON + "\nimport subprocess\nchild = subprocess.Popen(['sleep', '60'])\n"
         "print(fetcher_pid(), child.pid, flush=True)\nos._exit(0)", url],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    fetcher, child = map(int, process.stdout.readline().split())
    process.wait(30)
    try:
        assert has_ended(fetcher)
    finally:
        os.kill(child, 9)
        process.stdout.close()
