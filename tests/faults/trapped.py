# SPDX-License-Identifier: Apache-2.0
"""Processes that use backend "sigsegv" and are done something to; test_faults_sigsegv.py says how each ends.

Run as a program it forks a child for each function named `do_*`, because starting Python for each would take
longer than all of them, and prints a JSON object: name -> [wait status, what it printed].
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import mmap
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import lazymem
from lazymem.errors import LazymemError

from ..conftest import make_arrays

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

expected = make_arrays()
good, damaged = (Path(path) for path in sys.argv[1:3]) if len(sys.argv) > 2 else (Path(), Path())
BAD = 20_000  # element of "layer.3.weight" that lies in the damaged chunk


def opened(path: Path | None = None, **options: Any) -> lazymem.Snapshot:
    return lazymem.open(path or good, backend="sigsegv", **{"readahead": 0, **options})


def wrong(snap: lazymem.Snapshot) -> list[str]:
    return [name for name in expected if not np.array_equal(snap[name], expected[name])]


def tell(*words: object) -> None:
    print(*words, flush=True)


def memory(snap: lazymem.Snapshot) -> tuple[int, int]:
    whole = np.frombuffer(snap.buffer, np.uint8)
    return whole.ctypes.data, whole.size // mmap.PAGESIZE * mmap.PAGESIZE


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(act: Callable[[], object]) -> int:
    """The pid of a child that ends with 0 if `act` returns nothing, or nothing true."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(40)
        os._exit(bool(act()))
    return pid


def stage_descriptor() -> int:
    links = {int(fd): os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2
             and os.path.lexists(f"/proc/self/fd/{fd}")}  # fmt: skip
    return next(fd for fd, link in links.items() if link.startswith("/memfd:lazymem"))


# ---- what works ----


def do_threads_that_hold_the_gil() -> None:
    snap = opened(mode="c")
    bad: list[object] = []

    def touch(number: int) -> None:
        for name in np.random.default_rng(number).permutation(list(expected)):
            flat, right = snap[name].reshape(-1, order="A"), expected[name].reshape(-1, order="A")
            bad.extend((name, at) for at in range(0, flat.size, 8192) if flat[at] != right[at])
            if snap[name].tobytes() != expected[name].tobytes():
                bad.append(name)

    threading.stack_size(64 << 10)
    threads = [threading.Thread(target=touch, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = snap.stats()
    tell(bad, set(snap.chunk_states()), stats.faults > 0, stats.chunks_populated <= snap.chunk_count)


def do_calls_of_a_snapshot() -> None:
    snap = opened(mode="c")
    snap.prefetch("ids", wait=True)
    tell(snap.stats().chunks_prefetch > 0, snap.stats().faults, snap.read("ids")[-1], snap.stats().faults)
    snap["ids"][5] = 77
    snap.evict("ids")
    tell(2 in snap.chunk_states(), snap["ids"][5], snap.stats().faults)
    snap.close()
    tell(lazymem._native.engine_counts())


def do_zeros_and_casts() -> None:
    path = Path(tempfile.mkdtemp()) / "zeros.lzm"
    lazymem.build({"zeros": np.zeros(80 << 20, np.uint8), "ones": np.ones(99_999, np.float32)}, path)
    snap = opened(path, mode="c")
    snap["zeros"][70 << 20] = 3
    tell(int(snap["zeros"].sum()), float(snap["ones"].sum()))
    cast = opened(good, dtype="float64")
    tell(np.array_equal(cast["layer.7.weight"], expected["layer.7.weight"].astype(np.float64)))
    shutil.rmtree(path.parent)


def do_system_call_on_untouched_memory() -> None:
    snap = opened()
    read_end, write_end = os.pipe()
    view = memoryview(snap["ids"]).cast("B")
    try:
        tell(os.write(write_end, view[:8]))
    except OSError as error:
        tell(error.strerror)
    snap.prefetch("ids", wait=True)
    tell(os.write(write_end, view[8:16]), int.from_bytes(os.read(read_end, 8), "little"))


# ---- what an application does to its memory ----


def do_mprotect_of_untouched_memory() -> None:
    for mode in "rc":
        snap = opened(mode=mode)
        start, size = memory(snap)
        assert libc.mprotect(start, size, mmap.PROT_READ) == 0
        tell(wrong(snap))


def do_mprotect_that_forbids_reading() -> None:
    snap = opened()
    start, size = memory(snap)
    snap.prefetch(wait=True)
    assert libc.mprotect(start, size, 0) == 0
    tell("forbidden")
    int(snap["ids"][7])


def do_mprotect_that_forbids_writing() -> None:
    snap = opened(mode="c")
    start, size = memory(snap)
    snap.prefetch(wait=True)
    assert libc.mprotect(start, size, mmap.PROT_READ) == 0
    tell(int(snap["ids"][7]))
    snap["ids"][7] = 3


def do_pages_given_back() -> None:
    snap = opened(mode="c")
    start, size = memory(snap)
    for advice in (
        4,
        3,
        22,
    ):  # DONTNEED, WILLNEED, POPULATE_READ: of memory that is missing, and that is there
        libc.madvise(start, size, advice)
    int(snap["ids"][100])
    snap["ids"][100] = 9
    assert libc.madvise(start, size, 4) == 0
    tell(wrong(snap))
    assert libc.madvise(start, size, 4) == 0
    tell(wrong(snap))


def do_locked_memory() -> None:
    before = opened()
    int(before["ids"][0])
    start, size = memory(before)
    tell(libc.mlock(start, size) != 0, wrong(before))
    if libc.mlockall(3) == 0:
        tell(wrong(opened()), wrong(opened(mode="c")))
    else:
        tell([], [])


def do_unmapped_memory() -> None:
    snap = opened()
    start, size = memory(snap)
    tell(int(snap["ids"][7]))
    assert libc.munmap(start, size) == 0
    int(snap["layer.1.weight"][0, 0])


def do_no_mappings_left() -> None:
    snap = opened()
    room = libc.mmap(None, 70_000 * 2 * 4096, 0, 0x4022, -1, 0)
    made = 0
    while libc.mprotect(room + made * 8192, 4096, 1) == 0:
        made += 1
    error = None
    try:
        snap.prefetch("layer.5.weight", wait=True)
    except LazymemError as caught:
        error = caught
    assert libc.munmap(room, made * 8192) == 0
    tell(made > 1000, type(error).__name__, "Cannot allocate memory" in str(error))
    tell(wrong(snap))


# ---- signals that are not ours ----


def do_real_fault() -> None:
    snap = opened()
    tell(int(snap["ids"][7]))
    ctypes.string_at(8)


def do_real_fault_under_faulthandler() -> None:
    faulthandler.enable()
    do_real_fault()


def do_real_fault_under_a_later_faulthandler() -> None:
    snap = opened()
    faulthandler.enable()
    snap.prefetch("ids")  # puts ours on top again
    tell(int(snap["layer.1.weight"][0, 0] == expected["layer.1.weight"][0, 0]))
    ctypes.string_at(8)


def do_touch_under_a_later_faulthandler() -> None:
    snap = opened()
    tell(int(snap["ids"][7]))
    faulthandler.enable()
    float(snap["layer.1.weight"][0, 0])


def do_touches_after_later_handlers_and_another_open() -> None:
    snap = opened()
    for number in (signal.SIGSEGV, signal.SIGBUS):
        signal.signal(number, lambda *_: None)
    other = opened()
    tell(wrong(snap), wrong(other))


def do_real_fault_after_close() -> None:
    faulthandler.enable()
    opened().close()
    tell("closed")
    ctypes.string_at(8)


def do_write_to_read_only_memory() -> None:
    snap = opened()
    address = snap["ids"].ctypes.data
    tell(int(snap["ids"][7]))
    ctypes.memset(address, 0, 8)


def do_write_to_untouched_read_only_memory() -> None:
    ctypes.memset(opened()["ids"].ctypes.data, 0, 8)


def do_signal_that_somebody_sent() -> None:
    snap = opened()
    tell(int(snap["ids"][7]))
    signal.signal(signal.SIGBUS, signal.SIG_IGN)
    snap.prefetch("small.1")
    os.kill(os.getpid(), signal.SIGBUS)
    tell("ignored")
    os.kill(os.getpid(), signal.SIGSEGV)


def do_handlers_are_taken_off() -> None:
    def caught() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("SigCgt"))
        return int(line.split()[1], 16) & (1 << signal.SIGSEGV - 1 | 1 << signal.SIGBUS - 1)

    before, snap = caught(), opened()
    during = caught()
    snap.close()
    tell(before, during != 0, caught())


# ---- poison ----


def do_poison() -> None:
    snap = opened(damaged)
    array = snap["layer.3.weight"].reshape(-1)
    tell(float(array[0]) == float(expected["layer.3.weight"][0, 0]))
    float(array[BAD])


def do_poison_under_faulthandler() -> None:
    faulthandler.enable()
    do_poison()


def do_poison_under_a_later_faulthandler() -> None:
    snap = opened(damaged)
    faulthandler.enable()
    snap.prefetch("ids")
    float(snap["layer.3.weight"].reshape(-1)[BAD])


def do_poison_heals() -> None:
    path = Path(tempfile.mkdtemp()) / "mended.lzm"
    shutil.copy(damaged, path)
    snap = opened(path)
    thrown: list[int] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def mend(number: int) -> None:
        thrown.append(number)
        with open(good, "rb") as source, open(path, "r+b") as target:
            shutil.copyfileobj(source, target)
        snap.prefetch("layer.3.weight", wait=True)

    libc.signal(signal.SIGBUS, mend)
    snap.prefetch("ids")
    value = float(snap["layer.3.weight"].reshape(-1)[BAD])
    tell(thrown, value == float(expected["layer.3.weight"].reshape(-1)[BAD]), wrong(snap))
    shutil.rmtree(path.parent)


# ---- fork ----


def do_fork_with_chunks_in_flight() -> None:
    """What a child writes stays, whether or not its chunk was on its way at the fork."""
    for turn in range(5):
        snap = opened(mode="c", threads=2)
        snap.prefetch()
        if turn % 3:
            float(snap[f"layer.{turn % 10}.weight"][0, 0])

        def check(snap: lazymem.Snapshot = snap) -> object:
            for i in range(10):
                snap[f"layer.{i}.weight"][1::16, 0] = 42
            snap.prefetch(wait=True)
            written = all((snap[f"layer.{i}.weight"][1::16, 0] == 42).all() for i in range(10))
            for i in range(10):
                snap[f"layer.{i}.weight"][1::16, 0] = expected[f"layer.{i}.weight"][1::16, 0]
            return not written or wrong(snap) or ended(in_child(lambda: wrong(snap)))

        pids = [in_child(check), in_child(check)]
        bad = wrong(snap)
        if bad or [ended(pid) for pid in pids] != [0, 0]:
            tell(turn, bad)
        snap.close()
    tell("right")


def do_evict_after_fork() -> None:
    snap = opened(mode="c")
    snap.prefetch(wait=True)
    snap["ids"][5] = 77
    read_end, write_end = os.pipe()

    def check() -> object:
        os.read(read_end, 1)
        changed = int(snap["ids"][5]) != 77
        snap["ids"][5] = 5
        bad = wrong(snap)
        snap.evict()
        return changed or bad or wrong(snap) or ended(in_child(lambda: wrong(snap)))

    pid = in_child(check)
    snap.evict()
    first = wrong(snap)
    snap.evict()  # of memory that is this process's alone by now
    os.write(write_end, b"x")
    tell(first, ended(pid), wrong(snap))


def do_evict_gives_memory_back() -> None:
    def shared() -> int:
        return os.stat(stage_descriptor()).st_blocks

    snap = opened()
    snap.prefetch(wait=True)
    full = shared()
    snap.evict()
    tell(full > 20_000, shared() < 1_000)
    pid = in_child(lambda: None)
    ended(pid)
    snap.prefetch(wait=True)
    snap.evict()
    tell(shared() < 1_000)


def do_fork_that_runs_no_handlers() -> None:
    """Nobody serves touches there: the signal is what it would have been, and no hang."""
    snap = opened()
    tell(int(snap["ids"][7]))
    pid = libc.syscall(56 if os.uname().machine == "x86_64" else 220, int(signal.SIGCHLD), 0, 0, 0, 0)
    if pid == 0:
        signal.alarm(20)
        int(snap["ids"][8])  # present
        int(snap["layer.4.weight"][0, 0])
        os._exit(0)
    tell(ended(pid))


# ---- descriptors ----


def do_close_all_descriptors() -> None:
    snap = opened()
    snap.prefetch("ids", wait=True)
    os.closerange(3, 4096)
    tell(np.array_equal(snap["ids"], expected["ids"]))
    float(snap["layer.3.weight"][0, 0])


def do_close_after_all_descriptors_are_gone() -> None:
    snap = opened()
    snap.prefetch(wait=True)
    os.closerange(3, 4096)
    tell(wrong(snap))
    snap.close()
    tell("closed")


def do_number_of_the_stage_used_again() -> None:
    """Neither is the application's file written to, nor shown, nor closed."""
    snap = opened(mode="c")
    int(snap["ids"][7])
    number = stage_descriptor()
    with tempfile.TemporaryFile() as file:
        file.write(b"mine" * (8 << 20))
        file.flush()
        os.dup2(file.fileno(), number)
        tell(wrong(snap))
        snap.evict()
        tell(wrong(snap))
        snap.close()
        size, start = os.fstat(number).st_size, os.pread(number, 32 << 20, 0)
        tell(size == 32 << 20, start == b"mine" * (8 << 20))


def run(act: Callable[[], None]) -> list[object]:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(45)
        os.dup2(write_end, 1)
        os.dup2(write_end, 2)
        os.close(read_end)
        os.close(write_end)
        act()
        sys.stdout.flush()
        os._exit(0)
    os.close(write_end)
    with open(read_end, errors="replace") as pipe:
        said = pipe.read()
    return [ended(pid), said]


if __name__ == "__main__":
    wanted = sys.argv[3:]
    print(json.dumps({
        name: run(act) for name, act in sorted(globals().items())
        if name.startswith("do_") and (not wanted or name in wanted)
    }))  # fmt: skip
