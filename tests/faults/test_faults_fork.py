# SPDX-License-Identifier: Apache-2.0
"""fork: without a remedy the child reads zeros from every page that was not populated before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ..children import check_child

if TYPE_CHECKING:
    from ..servers.s3 import Bucket

COMMON = """
import ctypes, json, os, platform, signal, sys, threading
import numpy as np
import lazymem
from tests.faults import forking
from tests.faults.forking import *
"""
KEY = "model.lzm"
REMOTE: dict[str, Any] = {"storage_options": {"timeout": 90, "attempt_timeout": 2}}
CAST = {"dtype": "float64"}


def run(code: str, location: object, *arguments: object, deadline: float = 60.0, **options: Any) -> str:
    return check_child(COMMON + code, location, json.dumps(options), *arguments, deadline=deadline)


@pytest.fixture
def url(s3: Bucket, snapshot_path: Path) -> str:
    s3.put(KEY, snapshot_path.read_bytes())
    return s3.url(KEY)


# Each generation populates an array and writes to it, forks, and writes to both that and to another one:
# parent and child at the same time, each its own number. When both have written, both look.
GENERATIONS = """
import socket
snap = opened(sys.argv[1], readahead=0)
expected = expected_of(snap)
generations = int(sys.argv[3])

def write(value, *names):
    if snap.mode == "c":
        for name in names:
            snap[name][0, 0] = value
    return dict.fromkeys(names, value) if snap.mode == "c" else {}

def differing(written):
    for name, value in written.items():
        if snap[name][0, 0] != value:
            return f"{name} has {snap[name][0, 0]}, not {value}"
        snap[name][0, 0] = expected[name][0, 0]
    return wrong(snap, expected)

def meet(other):
    other.send(b"x")
    assert other.recv(1) == b"x"

def generation(number, written):
    before, after = f"layer.{2 * number}.weight", f"layer.{2 * number + 1}.weight"
    written |= write(100 + number, before)
    assert number == generations or snap[before][1, 1] == expected[before][1, 1]
    ours, theirs = socket.socketpair()

    def child():
        assert not written or snap[before][0, 0] == 100 + number
        mine = write(200 + number, before, after)
        meet(theirs)
        return generation(number + 1, written | mine)

    pid = forked(child) if number < generations else None
    if pid:
        written |= write(300 + number, before, after)
        meet(ours)
        snap.prefetch("layer.9.weight", wait=True)
    return differing(written) or (pid and ended(pid))

snap.prefetch("ids")  # under way
print(generation(0, {}))
"""


@pytest.mark.parametrize("mode", ["r", "c"])
@pytest.mark.parametrize("options", [{}, {"install": "move"}, CAST], ids=["copy", "move", "composed"])
def test_three_generations_read_right_bytes(
    huge_path: Path, snapshot_path: Path, mode: str, options: dict[str, Any]
) -> None:
    path = huge_path if "install" in options else snapshot_path
    assert run(GENERATIONS, path, 3, mode=mode, **options) == "0\n"


@pytest.mark.parametrize("options", [{"mode": "r"}, {"mode": "c", **CAST}], ids=["plain", "composed"])
def test_both_sides_read_right_bytes_from_a_store(url: str, options: dict[str, Any]) -> None:
    assert run(GENERATIONS, url, 1, **options, **REMOTE) == "0\n"


OUTLIVE = """
snap = opened(sys.argv[1])
expected = expected_of(snap)
assert not wrong(snap, {"ids": expected["ids"]})
hear, tell = os.pipe()

def daemon():
    signal.alarm(50)  # nobody waits for it, or ends it
    os.close(tell)
    assert os.read(hear, 1) == b""  # all its ancestors are gone
    print(wrong(snap, expected), flush=True)

assert ended(forked(lambda: forked(daemon) and None)) == 0
"""


def test_daemon_outlives_its_ancestors(snapshot_path: Path) -> None:
    assert run(OUTLIVE, snapshot_path) == "[]\n"


def test_daemon_outlives_its_ancestors_and_their_fetcher(url: str) -> None:
    assert run(OUTLIVE, url, **CAST, **REMOTE) == "[]\n"


IN_FLIGHT = """
for _ in range(int(sys.argv[3])):
    snap = opened(sys.argv[1])
    expected = expected_of(snap)
    with Touchers(snap, expected, 8) as touchers:
        snap.prefetch()
        pids = [forked(lambda: wrong(snap, expected)) for _ in range(3)]
    assert not touchers.found
    assert [ended(pid) for pid in pids] == [0, 0, 0]
    snap.close()
print("right")
"""


@pytest.mark.parametrize("options", [{}, {"install": "move"}, CAST], ids=["copy", "move", "composed"])
def test_forks_while_eight_threads_touch(
    huge_path: Path, snapshot_path: Path, options: dict[str, Any]
) -> None:
    path = huge_path if "install" in options else snapshot_path
    assert run(IN_FLIGHT, path, 5, deadline=100, **options) == "right\n"


@pytest.mark.parametrize("options", [{}, CAST], ids=["plain", "composed"])
def test_forks_while_eight_threads_touch_a_store(url: str, options: dict[str, Any]) -> None:
    assert run(IN_FLIGHT, url, 1, deadline=100, **options, **REMOTE) == "right\n"


def test_forks_while_threads_are_in_malloc_and_stdio(snapshot_path: Path) -> None:
    """Their locks are held by threads that the child does not have."""
    code = """
snap = opened(sys.argv[1])
expected = expected_of(snap)
libc = ctypes.CDLL(None)  # calls release the GIL
libc.fopen.restype = libc.malloc.restype = ctypes.c_void_p
null = ctypes.c_void_p(libc.fopen(b"/dev/null", b"w"))
text, stop = b"x" * 300_000, threading.Event()

def allocate():
    while not stop.is_set():
        libc.free(ctypes.c_void_p(libc.malloc(50_000)))

def write():
    while not stop.is_set():
        libc.fputs(text, null)

threads = [threading.Thread(target=body) for body in (allocate, allocate, write, write)]
for thread in threads: thread.start()
pids = [forked(lambda: wrong(snap, {"ids": expected["ids"]})) for _ in range(15)]
stop.set()
for thread in threads: thread.join()
print({ended(pid) for pid in pids})
"""
    assert run(code, snapshot_path) == "{0}\n"


def test_child_closes_evicts_prefetches_and_opens_more(snapshot_path: Path, huge_path: Path) -> None:
    code = """
from lazymem._native import engine_counts
snap, other = opened(sys.argv[1]), opened(sys.argv[1], dtype="float64")
expected = expected_of(snap)
float(snap["layer.0.weight"][0, 0])

def child():
    snap.evict("layer.0.weight")
    assert snap.chunk_states()[0] == 0
    snap.prefetch(wait=True)
    other.close()
    with lazymem.open(sys.argv[3]) as more:
        found = wrong(more, expected) + wrong(snap, expected)
        more.evict()
        found += wrong(more, expected)
    snap.close()
    return found or engine_counts() != (0, 0)

pid = forked(child)
print(ended(pid), wrong(snap, expected), other["scalar"])
"""
    assert run(code, snapshot_path, huge_path) == "0 [] 2.5\n"


def test_multiprocessing_workers_read_right_bytes(snapshot_path: Path) -> None:
    """A snapshot, arrays and handles as arguments; by inheritance, where a worker is forked."""
    code = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
snap = opened(sys.argv[1])
forking.inherited["arrays"] = snap
arrays = {name: snap[name] for name in ("layer.3.weight", "ids", "empty", "scalar")}
for method in ("fork", "forkserver", "spawn"):
    context = multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        print(
            method,
            pool.apply(differing, (snap,)),
            pool.apply(differing, (arrays,)),
            pool.apply(differing_handle, (snap.handle("layer.5.weight"),)),
        )
with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
    print(sum(pool.map(differing_inherited, [f"layer.{n}.weight" for n in range(10)])))
print(differing(snap))
"""
    lines = [f"{method} [] [] False" for method in ("fork", "forkserver", "spawn")]
    assert run(code, snapshot_path).splitlines() == [*lines, "0", "[]"]


def test_programs_are_started_in_every_way(snapshot_path: Path) -> None:
    """By fork with Python in the child, which touches; by vfork and posix_spawn; on a terminal of its own."""
    code = """
import pty, subprocess
snap = opened(sys.argv[1], readahead=0)
expected = expected_of(snap)
assert not wrong(snap, {"layer.0.weight": expected["layer.0.weight"]})

def look():
    assert not wrong(snap, {name: expected[name] for name in ("layer.0.weight", "layer.1.weight")})

for keywords in (
    {},
    {"close_fds": False},
    {"start_new_session": True},
    {"preexec_fn": look},
    {"preexec_fn": look, "close_fds": False},
):
    assert subprocess.run(["echo", "here"], capture_output=True, **keywords).stdout == b"here\\n"
assert ended(os.posix_spawnp("true", ["true"], {})) == 0
assert os.spawnlp(os.P_WAIT, "true", "true") == os.system("true") == 0
assert ended(forked(lambda: look() or os.execlp("true", "true"))) == 0
assert ended(forked(look, fork=lambda: pty.fork()[0])) == 0
assert ended(forked(look, fork=lambda: os.forkpty()[0])) == 0
print(wrong(snap, expected))
"""
    assert run(code, snapshot_path) == "[]\n"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers_read_right_bytes(snapshot_path: Path, method: str) -> None:
    """torch's own way to pass tensors to a worker included: it moves their bytes to shared memory."""
    pytest.importorskip("torch")
    code = """
import torch
from torch.utils.data import DataLoader
import lazymem.torch
snap = opened(sys.argv[1])
array, tensor = snap["layer.2.weight"], lazymem.torch.load_file(sys.argv[1])["layer.3.weight"]
right = expected_of(snap)
right = torch.tensor(right["layer.2.weight"]), torch.tensor(right["layer.3.weight"])
method = sys.argv[3]
rows = Rows(snap.handle("layer.2.weight") if method == "spawn" else array, tensor)
workers = 2 if method == "fork" else 1
loader = DataLoader(
    rows, 128, shuffle=True, num_workers=workers, multiprocessing_context=method, persistent_workers=True
)
seen = 0
for epoch in range(2):
    for numbers, *batch in loader:
        assert all(torch.equal(part, whole[numbers]) for part, whole in zip(batch, right))
        seen += len(numbers)
print(seen, torch.equal(tensor, right[1]), np.array_equal(array, right[0].numpy()))
"""
    assert run(code, snapshot_path, method, deadline=110) == "2048 True True\n"


# ---- fork="drop" ----

DROP = """
clone = ctypes.CDLL(None).syscall  # no handler of fork runs: to the child, missing pages would be zeros
numbers = {"x86_64": 56, "aarch64": 220}
def bare():
    return clone(numbers[platform.machine()], int(signal.SIGCHLD), 0, 0, 0, 0)

def refused(call):
    try:
        call()
    except lazymem.SnapshotClosed as error:
        return "fork='drop'" in str(error)
    return False

def at_home_elsewhere():
    with lazymem.open(sys.argv[1], storage_options=snap_options.get("storage_options")) as own:
        return wrong(own, {"ids": expected["ids"]})

snap_options = json.loads(sys.argv[2])
"""


def test_dropped_memory_is_not_in_children_however_they_are_made(snapshot_path: Path, tmp_path: Path) -> None:
    """Without fork="drop" the child of the bare system call exits with 1: it has read zeros."""
    lazymem_plain = tmp_path / "plain.lzm"
    code = (
        DROP
        + """
from lazymem._native import engine_counts
lazymem.build(make_arrays(), sys.argv[3], codec="none")
for path, options in (
    (sys.argv[1], {}),
    (sys.argv[1], {"mode": "c", "dtype": "float64"}),
    (sys.argv[1], {"backend": "eager"}),
    (sys.argv[3], {}),
    (sys.argv[3], {"mode": "c"}),
):
    snap = lazymem.open(path, fork="drop", **options)
    expected = expected_of(snap)
    array = snap["ids"]
    assert array[1] == 1
    for fork in (os.fork, bare):
        for place in (1, 250_000):  # populated and not
            pid = fork()
            if pid == 0:
                os._exit(int(array[place] != place))
            assert ended(pid) == -signal.SIGSEGV, (path, options, place)

    def child():
        assert engine_counts() == (0, 0)
        refusals = refused(lambda: snap["ids"]), refused(snap.prefetch), refused(snap.stats)
        snap.close()
        return refusals != (True, True, True) or at_home_elsewhere()

    assert ended(forked(child)) == 0
    assert ended(forked(lambda: refused(lambda: snap["ids"]) is not True, fork=bare)) == 0
    assert not wrong(snap, expected)
    del array
    snap.close()
print("right")
"""
    )
    assert run(code, snapshot_path, lazymem_plain) == "right\n"


def test_dropped_and_inherited_snapshots_side_by_side(url: str, snapshot_path: Path) -> None:
    code = (
        DROP
        + """
snap, local = opened(sys.argv[1], fork="drop"), lazymem.open(sys.argv[3], readahead=0)
expected = expected_of(local)
array = snap["ids"]

def child():
    return refused(lambda: snap["ids"]) is not True or wrong(local, expected) or at_home_elsewhere()

pid = forked(child)
print(ended(pid), wrong(snap, expected), wrong(local, expected))
"""
    )
    assert run(code, url, snapshot_path, **REMOTE) == "0 [] []\n"


# ---- what it costs ----


def test_fork_copies_hardly_more_pages_with_a_snapshot_open(snapshot_path: Path) -> None:
    """A child that only execs would pay for them. 750, when the handler marked every range as free."""
    code = """
import os, resource, sys
import numpy as np
if sys.argv[1]:
    import lazymem
    snap = lazymem.open(sys.argv[1])
hear, tell = os.pipe()
if os.fork() == 0:
    os.write(tell, b"%d" % resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    os._exit(0)
print(int(os.read(hear, 20)))
"""
    with_snapshot, without = (int(check_child(code, path)) for path in (snapshot_path, ""))
    assert with_snapshot - without < 450
