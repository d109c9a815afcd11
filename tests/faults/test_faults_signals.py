# SPDX-License-Identifier: Apache-2.0
"""Signals at any moment: handlers, timers, stops, Ctrl-C while a store hangs, and SIGKILL."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..children import check_child
from ..unit.raw_server import Asked, Honest, RawServer
from .network import Child, wait_until

BACKENDS = ["uffd", "uffd-user", "sigsegv"]

COMMON = """
import ctypes, os, signal, sys, threading
import numpy as np
import lazymem
from tests.arrays import make_arrays

expected = make_arrays()

def wrong(snap):
    return [name for name in expected if not np.array_equal(snap[name], expected[name])]
"""

#: Touches four pages a call, without SA_RESTART, wherever the thread is.
HANDLER = """
#include <signal.h>
static const volatile unsigned char *memory;
static unsigned long size;
static volatile unsigned long next, sum, calls;

static void touch(int number)
{
    (void)number;
    for (int i = 0; i < 4; i++) {
        sum += memory[next];
        next = (next + 7 * 65536 + 4096) % size;
    }
    calls++;
}

int install(int number, const void *address, unsigned long length)
{
    struct sigaction action = { .sa_handler = touch };

    memory = address;
    size = length;
    return sigaction(number, &action, 0);
}

unsigned long count(void) { return calls; }
"""


@pytest.fixture(scope="module")
def handler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("handler")
    source, target = folder / "handler.c", folder / "handler.so"
    source.write_text(HANDLER)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", str(source), "-o", str(target)], check=True)
    return target


@pytest.mark.parametrize("backend", BACKENDS)
def test_c_handlers_that_touch_lazy_memory_interrupt_every_call(
    snapshot_path: Path, handler: Path, backend: str
) -> None:
    """Without the engine's care for signals a handler waits for the very lock that it interrupted."""
    code = (
        COMMON
        + """
library = ctypes.CDLL(sys.argv[3])
for kind, timer in ((signal.SIGALRM, signal.ITIMER_REAL), (signal.SIGPROF, signal.ITIMER_PROF)) * 2:
    snap = lazymem.open(sys.argv[1], backend=sys.argv[2])
    shown = np.frombuffer(snap.buffer, np.uint8)
    assert library.install(kind, ctypes.c_void_p(shown.ctypes.data), ctypes.c_ulong(shown.nbytes)) == 0
    signal.setitimer(timer, 0.0003, 0.0003)
    for _ in range(10):
        snap.stats()
        snap.prefetch(["small.1", "layer.3.weight"], wait=True)
        snap.evict()
        lazymem.open(sys.argv[1], backend=sys.argv[2]).close()
    snap.prefetch(wait=True)
    snap.evict()
    assert not wrong(snap)
    signal.setitimer(timer, 0)
    signal.signal(kind, signal.SIG_IGN)
    del shown
    snap.close()
print(library.count() > 20)
"""
    )
    # One thread: else the handler may run in one of numpy's, and go on when the memory has gone.
    env = {"OPENBLAS_NUM_THREADS": "1"}
    assert check_child(code, snapshot_path, backend, handler, env=env) == "True\n"


@pytest.mark.parametrize("backend", BACKENDS)
def test_python_handlers_timers_and_storms_during_faults(snapshot_path: Path, backend: str) -> None:
    code = (
        COMMON
        + """
calls = dict.fromkeys([signal.SIGALRM, signal.SIGPROF, signal.SIGCHLD, signal.SIGTERM], 0)

def handle(number, frame):
    calls[number] += 1
    snap["ids"][calls[number] * 997 % 300_000]  # touches, too

for number in calls:
    signal.signal(number, handle)
snap = lazymem.open(sys.argv[1], backend=sys.argv[2], readahead=0)
parent = os.getpid()
storm = os.fork()
if storm == 0:
    while os.getppid() == parent:
        os.kill(parent, signal.SIGCHLD)
        os.kill(parent, signal.SIGTERM)
        os.sched_yield()
    os._exit(0)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
rounds = 0
while rounds < 2 or min(calls.values()) < 20:
    assert not wrong(snap)
    snap.evict()
    snap.prefetch(wait=True)
    assert snap.read("layer.2.weight").tobytes() == expected["layer.2.weight"].tobytes()
    snap.evict()
    rounds += 1
os.kill(storm, signal.SIGKILL)
signal.setitimer(signal.ITIMER_REAL, 0)
signal.setitimer(signal.ITIMER_PROF, 0)
print("right")
"""
    )
    assert check_child(code, snapshot_path, backend) == "right\n"


def test_profilers_tracers_and_garbage_collection_that_touch_lazy_memory(snapshot_path: Path) -> None:
    code = (
        COMMON
        + """
import cProfile, gc, tracemalloc
snap = lazymem.open(sys.argv[1], readahead=0)
at = 0

def touch(*_):
    global at
    at = (at + 65_537) % 300_000
    int(snap_ids[at])

def profile(frame, event, argument):
    touch()

def trace(frame, event, argument):
    touch()
    return trace

snap_ids = snap["ids"]
tracemalloc.start(10)
gc.callbacks.append(touch)
thresholds = gc.get_threshold()

def work():
    snap.prefetch("small.3", wait=True)
    for name in list(expected)[:14]:
        assert snap[name].tobytes() == expected[name].tobytes(), name
        garbage = [[] for _ in range(20)]
        garbage.append(garbage)
    snap.read("layer.1.weight")
    snap.evict()

gc.set_threshold(1)
work()
gc.set_threshold(*thresholds)
gc.callbacks.clear()
sys.setprofile(profile)
work()
sys.setprofile(None)
sys.settrace(trace)
work()
sys.settrace(None)
profiler = cProfile.Profile()
profiler.runcall(work)
tracemalloc.stop()
print(not wrong(snap))
"""
    )
    assert check_child(code, snapshot_path) == "True\n"


def test_stopped_and_continued_in_mid_scan(snapshot_path: Path) -> None:
    code = """
    for _ in range(3):
        snap = opened()
        snap.prefetch()
        tell("scanning")
        bad = wrong(snap)
        assert not bad, bad
        snap.close()
    tell("right")
    """

    def state(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]

    moments = random.Random(3)
    with Child(code, snapshot_path, "{}") as child:
        for _ in range(3):
            assert child.hear() == "scanning"
            for _ in range(3):
                os.kill(child.pid, signal.SIGSTOP)
                wait_until(lambda: state(child.pid) in "TZ")
                os.kill(child.pid, signal.SIGCONT)
                time.sleep(moments.random() * 0.01)  # another moment of the scan
        assert child.hear() == "right"
        assert child.finish() == 0


def test_engine_threads_block_all_signals(snapshot_path: Path) -> None:
    code = (
        COMMON
        + """
def masks():
    found = {}
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/status") as status:
            found[task] = int(next(line for line in status if line.startswith("SigBlk")).split()[1], 16)
    return found

before = masks()
snap = lazymem.open(sys.argv[1])
snap.prefetch(wait=True)
other = lazymem.open(sys.argv[1], backend="uffd-user")
ours = {task: mask for task, mask in masks().items() if task not in before}
# All but KILL and STOP, which cannot be, and the two that the C library keeps for itself.
every = (1 << 64) - 1 & ~(1 << 8 | 1 << 18 | 1 << 31 | 1 << 32)
assert len(ours) >= 4
assert all(mask | 1 << 31 | 1 << 32 == every | 1 << 31 | 1 << 32 for mask in ours.values()), ours
assert masks()[str(os.getpid())] == before[str(os.getpid())] == 0
print("blocked")
"""
    )
    assert check_child(code, snapshot_path) == "blocked\n"


def test_ctrl_c_during_a_long_copy_does_not_wait_for_its_end(long_path: Path) -> None:
    """A copy out of populated memory is one call into C for each 16 MiB."""
    code = (
        COMMON
        + """
snap = lazymem.open(sys.argv[1])
info = snap.info("big")
snap.prefetch("big", wait=True)
out = np.ones(info.nbytes, np.uint8)
signal.signal(signal.SIGALRM, signal.default_int_handler)
for round in range(300):
    out[:4] = out[-4:] = 1
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001 + round % 30 * 0.001)
        while True:
            out[:4] = out[-4:] = 1
            snap._region.read_into(info.offset, out)
    except KeyboardInterrupt:
        if out[:4].tolist() != [1] * 4 and out[-4:].tolist() == [1] * 4:
            print("half a copy")
            break
"""
    )
    assert check_child(code, long_path) == "half a copy\n"


# ---- a store that hangs ----


class Hanging:
    """Answers until it is told to hang; then what is asked waits until it is let go."""

    def __init__(self, data: bytes) -> None:
        self._honest = Honest(data)
        self.going = threading.Event()
        self.going.set()
        self.waiting = threading.Semaphore(0)

    def __call__(self, asked: Asked) -> bytes:
        if not self.going.is_set():
            self.waiting.release()
            self.going.wait()
        return self._honest(asked)


@pytest.fixture
def hanging(snapshot_path: Path) -> Iterator[tuple[str, Hanging]]:
    answering = Hanging(snapshot_path.read_bytes())
    with RawServer(answering) as server:
        yield f"{server.endpoint}/small.lzm", answering
        answering.going.set()


@pytest.mark.parametrize(
    "call",
    [
        "opened()",
        "snap.prefetch(wait=True)",
        "lazymem.populate(snap['ids'])",
        "snap.read('ids')",
        "opened(backend='eager')",
        "lazymem.verify(url, storage_options=options)",
        "lazymem.extract(url, folder + '/x.npz', format='npz', storage_options=options)",
        "lazymem.build(url, folder + '/x.lzm', storage_options=options)",
        "lazymem.copy(url, folder + '/x.lzm', storage_options=options)",
    ],
)
def test_ctrl_c_while_a_store_hangs_takes_effect_at_once(
    hanging: tuple[str, Hanging], tmp_path: Path, call: str
) -> None:
    """The store would be waited for for ten minutes, and the child for one."""
    url, answering = hanging
    code = """
    def opened(**more):
        return lazymem.open(url, storage_options=options, **more)
    folder = sys.argv[3]
    try:
        with opened() as snap:
            tell("open")
            wait()
            CALL
    except KeyboardInterrupt:
        tell("interrupted")
    """
    with Child(code.replace("CALL", call), url, '{"timeout": 600}', tmp_path, deadline=60) as child:
        assert child.hear() == "open"
        answering.going.clear()
        child.say()
        assert answering.waiting.acquire(timeout=50)
        os.kill(child.pid, signal.SIGINT)
        assert child.hear() == "interrupted"
        assert child.finish() == 0
        wait_until(lambda: not child.fetchers())
    assert not list(tmp_path.iterdir())


def test_ctrl_c_during_a_stuck_touch_takes_effect_when_the_bytes_come(hanging: tuple[str, Hanging]) -> None:
    url, answering = hanging
    code = """
    snap = opened()
    tell("open")
    wait()
    try:
        snap["ids"][250_000]
        tell("not interrupted")
    except KeyboardInterrupt:
        tell("interrupted", wrong(snap))
    """
    with Child(code, url, "{}") as child:
        assert child.hear() == "open"
        answering.going.clear()
        child.say()
        assert answering.waiting.acquire(timeout=50)
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGINT)
        answering.going.set()
        assert child.hear() == "interrupted []"
        assert child.finish() == 0


def test_stuck_touch_ends_at_the_deadline_whatever_was_interrupted(hanging: tuple[str, Hanging]) -> None:
    url, answering = hanging
    code = """
    snap = opened()
    tell("open")
    wait()
    try:
        snap["ids"][250_000]
    finally:
        tell("went on")
    """
    with Child(code, url, '{"timeout": 1}') as child:
        assert child.hear() == "open"
        answering.going.clear()
        child.say()
        assert answering.waiting.acquire(timeout=50)
        for _ in range(2):
            os.kill(child.pid, signal.SIGINT)
        assert child.finish() == -signal.SIGBUS
        assert child.rest == ""
        assert "'ids'" in child.stderr


# ---- SIGKILL ----


def test_killed_at_any_moment_leaves_nothing_behind(hanging: tuple[str, Hanging], tmp_path: Path) -> None:
    url, _ = hanging
    code = """
    import tempfile
    folder, cache, tempfile.tempdir = sys.argv[3:]
    tell("begin")
    while True:
        with lazymem.open(url, storage_options=options, cache=cache) as snap:
            snap.prefetch(["ids", "layer.1.weight"])
            assert not wrong(snap)
            snap.read("layer.2.weight")
            lazymem.build({"a": snap["layer.3.weight"], "b": snap["ids"]}, folder + "/built.lzm")
        lazymem.extract(folder + "/built.lzm", folder + "/out.npz", format="npz")
        os.unlink(folder + "/built.lzm")
        os.unlink(folder + "/out.npz")
    """
    moments = random.Random(7)
    temporary, cache = tmp_path / "temporary", tmp_path / "cache"
    temporary.mkdir()
    for _ in range(2):
        children = []
        for number in range(3):
            folder = tmp_path / str(number)
            folder.mkdir(exist_ok=True)
            child = Child(code, url, "{}", folder, cache, temporary)
            children.append((folder, child))
        for folder, child in children:
            with child:
                child.hear()
                time.sleep(moments.random() * 0.5)  # a random moment is what this is about
                os.kill(child.pid, signal.SIGKILL)
                assert child.finish() == -signal.SIGKILL
                wait_until(lambda child=child: not child.fetchers())
                assert {path.name for path in folder.iterdir()} <= {"built.lzm", "out.npz"}
    assert not list(temporary.iterdir())
    assert not [name for name in os.listdir("/dev/shm") if "lazymem" in name]
    # What a writer of the cache leaves there, the next sweep removes: tests/unit/test_cache.py.
