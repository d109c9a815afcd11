# SPDX-License-Identifier: Apache-2.0
"""What the machine does to a snapshot that is open: a broken disk, no memory, no descriptors, no threads, no
userfaultfd. Right bytes, or a named error, or a signal after a line; and all is well when the cause has gone.

The C core's own calls fail one by one in tests/native/test_failures.c; here it is the whole of it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import lazymem

from ..children import check_child, run_child

CHUNK = 1 << 16
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("preload") / "failing.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", HERE / "failing.c", "-o", target], check=True
    )
    return str(target)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arrays of five chunks that hold no zero byte."""
    path = tmp_path_factory.mktemp("small") / "small.lzm"
    bytes_ = np.random.default_rng(3).integers(1, 255, (2, 5 * CHUNK), dtype=np.uint8)
    lazymem.build({"first": bytes_[0], "second": bytes_[1]}, path, codec="lz4", chunk_size=CHUNK)
    return path


COMMON = """
import ctypes, os, resource, shutil, signal, sys
import numpy as np
import lazymem
from lazymem.errors import LazymemError

path = sys.argv[1]
expected = np.random.default_rng(3).integers(1, 255, (2, 5 * (1 << 16)), dtype=np.uint8)

def is_right(snap):
    return np.array_equal(snap["first"], expected[0]) and np.array_equal(snap["second"], expected[1])

def address(snap, chunk):
    return snap["first"].__array_interface__["data"][0] + chunk * (1 << 16) + 5
"""


def test_each_cause_is_named_in_the_line_survived_and_healed(
    small: Path, preload: str, tmp_path: Path
) -> None:
    """A touch of a chunk of "second", in an application that handles SIGBUS by itself and goes on."""
    code = (
        COMMON
        + """
helper = ctypes.CDLL(sys.argv[2])
helper.look.argtypes = [ctypes.c_void_p]
failing = ctypes.c_int.in_dll(helper, "failing_errno")
helper.survive()
log = os.open(sys.argv[3], os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
os.dup2(log, 2)
sys.stderr = sys.stdout
good = open(path, "rb").read()

def mend():
    with open(path, "r+b") as file:
        file.write(good)

def corrupt():
    with open(path, "r+b") as file:
        file.write(bytes(b ^ 0xFF for b in good))

def set_errno(number):
    failing.value = number

def no_memory():
    used = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))

def memory():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

causes = {
    "EIO": (lambda: set_errno(5), lambda: set_errno(0), "errno 5 (Input/output error)", lazymem.ReadError),
    "checksum": (corrupt, mend, "do not match their checksum", lazymem.SnapshotChanged),
    "cut": (lambda: os.truncate(path, 5000), mend, "ends before the chunk does", lazymem.SnapshotChanged),
    "memory": (no_memory, memory, "errno 12 (Cannot allocate memory)", lazymem.ReadError),
}
for name, (break_it, undo, cause, kind) in causes.items():
    snap = lazymem.open(path, readahead=0, backend="uffd-user")
    at = snap.info("second").offset
    chunk = at // (1 << 16) + 2
    where = snap.buffer
    base = np.frombuffer(where, np.uint8).__array_interface__["data"][0]
    byte = expected[1][chunk * (1 << 16) - at]
    os.ftruncate(2, 0)
    break_it()
    seen = helper.look(base + chunk * (1 << 16))
    undo_now = name == "memory"
    if undo_now:  # or Python could not go on
        undo()
    assert seen == -signal.SIGBUS, (name, seen)
    line = open(sys.argv[3]).read()
    bytes_ = f"bytes {chunk << 16} to {(chunk + 1 << 16) - 1} "
    for part in (path, f"chunk {chunk} ", "array 'second'", bytes_, cause):
        assert part in line, (name, part, line)
    assert line.count("\\n") == 1, line
    # Given back, the pages lose their poison: the chunk is tried again, and not faulted on for ever.
    assert ctypes.CDLL(None).madvise(ctypes.c_void_p(base + (chunk << 16)), 1 << 16, 4) == 0
    assert helper.look(base + chunk * (1 << 16)) == (byte if undo_now else -signal.SIGBUS), name
    if not undo_now:
        try:
            snap.prefetch("second", wait=True)
            print(name, "no error")
        except kind as error:
            assert path in str(error) and "chunk" in str(error), error
        undo()
    snap.prefetch(wait=True)
    assert helper.look(base + chunk * (1 << 16)) == byte, name
    assert is_right(snap), name
    snap = where = None  # and with the last one the threads and their buffers go
print("healed")
"""
    )
    copy = tmp_path / "copy.lzm"
    copy.write_bytes(small.read_bytes())
    out = check_child(code, copy, preload, tmp_path / "log", env={"LD_PRELOAD": preload})
    assert out == "healed\n"


def test_file_replaced_by_rename_or_unlinked_stays_the_one_that_was_opened(
    small: Path, tmp_path: Path
) -> None:
    path, other = tmp_path / "a.lzm", tmp_path / "b.lzm"
    path.write_bytes(small.read_bytes())
    lazymem.build({"first": np.ones(9)}, other)
    with lazymem.open(path) as one, lazymem.open(path) as two:
        os.replace(other, path)
        assert one["first"].min() > 0
        path.unlink()
        assert two["second"].min() > 0
        two.prefetch(wait=True)


def test_address_space_of_every_size_is_right_bytes_or_a_named_error(small: Path) -> None:
    """RLIMIT_AS from what the process has to what it needs: no zeros, no hang, nothing without a name."""
    code = (
        COMMON
        + """
lazymem.open(path).close()  # all is imported
used = int(open("/proc/self/statm").read().split()[0]) * 4096
outcomes = []
for step in range(0, 24):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        os.dup2(write, 2)
        resource.setrlimit(resource.RLIMIT_AS, (used + step * 400_000, resource.RLIM_INFINITY))
        try:
            snap = lazymem.open(path, backend="uffd-user", threads=1)
            right = snap["first"][7] == expected[0][7]
            snap.prefetch("second", wait=True)
            right = right and snap["second"][-1] == expected[1][-1]
            os._exit(0 if right else 9)
        except (LazymemError, MemoryError):
            os._exit(3)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(8)
    os.close(write)
    status = os.waitpid(pid, 0)[1]
    line = os.read(read, 5000).decode() if status else ""
    os.close(read)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGBUS and "Cannot allocate memory" in line, (step, status, line)
        outcomes.append("signal")
    else:
        assert os.WEXITSTATUS(status) in (0, 3), (step, status, line)
        outcomes.append({0: "right", 3: "error"}[os.WEXITSTATUS(status)])
assert outcomes[0] == "error" and outcomes[-1] == "right", outcomes
print(*sorted(set(outcomes)))
"""
    )
    assert set(check_child(code, small).split()) >= {"error", "right"}


def test_every_small_number_of_descriptors_is_right_bytes_or_a_named_error(small: Path) -> None:
    code = (
        COMMON
        + """
for backend in ("uffd-user", "auto"):
    with lazymem.open(path, backend=backend) as snap:  # all is imported
        snap.prefetch(wait=True)
outcomes = []
for most in range(3, 20):
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, 4096))
        try:
            snap = lazymem.open(path, threads=1)
            right = is_right(snap)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, 4096))
            snap.prefetch(wait=True)
            if os.fork() == 0:  # which has to open its own
                os._exit(0)
            os._exit(0 if right else 9)
        except LazymemError as error:
            if "ulimit -n" not in str(error) and "Too many open files" not in str(error):
                os.write(2, repr(error).encode())
                os._exit(8)
            resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
            os._exit(3 if is_right(lazymem.open(path)) else 9)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) in (0, 3), (most, status)
    outcomes.append(os.WEXITSTATUS(status))
assert outcomes[0] == 3 and outcomes[-1] == 0, outcomes
print("named")
"""
    )
    assert check_child(code, small) == "named\n"


def test_threads_that_cannot_be_started_are_named_and_missed_only_until_they_can(
    small: Path, preload: str
) -> None:
    """No thread at all, one, two ...: at open, and in the child of a fork."""
    code = (
        COMMON
        + """
left = ctypes.c_int.in_dll(ctypes.CDLL(sys.argv[2]), "threads_left")
named = right = 0
for count in range(0, 6):
    left.value = count
    try:
        snap = lazymem.open(path, threads=2, backend="uffd-user")
        right += is_right(snap)
    except LazymemError as error:
        assert "no thread can be started" in str(error), error
        named += 1
    left.value = 1_000_000
    with lazymem.open(path) as other:
        assert is_right(other)
    snap = other = None
assert named and right, (named, right)

snap = lazymem.open(path, backend="uffd-user")
snap["first"][0]
for count in range(0, 3):
    left.value = count
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        left.value = 1_000_000
        try:
            snap.prefetch(wait=True)
        except LazymemError as error:
            assert "cannot be served any more" in str(error), error
            with lazymem.open(path) as again:  # the process is not lost with it
                assert is_right(again)
        os._exit(0 if is_right(snap) else 9)
    left.value = 1_000_000
    status = os.waitpid(pid, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGSEGV, status
    print("lost" if status else "right", flush=True)
"""
    )
    done = run_child(code, small, preload, env={"LD_PRELOAD": preload})
    assert done.returncode == 0, done.stderr
    outcomes = done.stdout.split()
    assert outcomes[0] == "lost"
    assert outcomes[-1] == "right"
    assert done.stderr.count("after fork, in the child") == outcomes.count("lost")


def test_userfaultfd_refused_half_way_leaves_what_is_open_as_it_is(small: Path) -> None:
    """A seccomp filter that comes when some regions are open: as a sandbox that closes behind its program."""
    code = (
        COMMON
        + """
import platform, struct
snap = lazymem.open(path, readahead=0, backend="uffd-user")
snap["first"][0]
# load nr; == userfaultfd: EPERM; else allow (struct sock_filter, linux/filter.h)
number = {"x86_64": 323, "aarch64": 282}[platform.machine()]
ops = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | 1), (0x06, 0, 0, 0x7FFF0000)]
program = b"".join(struct.pack("HBBI", *op) for op in ops)
buffer = ctypes.create_string_buffer(program)
prog = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(ops), ctypes.addressof(buffer)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, prog, 0, 0) == 0, ctypes.get_errno()
assert is_right(snap)  # faults go on
with lazymem.open(path, backend="uffd-user") as more:  # by the descriptor that is open
    assert is_right(more)
with lazymem.open(path) as other:  # whatever way there is
    assert is_right(other)
snap2 = lazymem.open(path, readahead=0, backend="uffd-user")
snap2["first"][0]
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    try:
        snap2.prefetch(wait=True)
        print("prefetched", flush=True)
    except lazymem.ReadError as error:
        print("named" if "cannot be served any more" in str(error) else error, flush=True)
    with lazymem.open(path, backend="eager") as again:
        assert is_right(again)
    snap2["second"].sum()
    os._exit(0)
status = os.waitpid(pid, 0)[1]
assert os.WTERMSIG(status) == signal.SIGSEGV, status
assert is_right(snap2)
snap = snap2 = more = other = None
try:
    lazymem.open(path, backend="uffd-user")
except lazymem.BackendUnavailable as error:
    print("refused" if "is not to be had here" in str(error) else error)
with lazymem.open(path) as other:
    print(is_right(other))
"""
    )
    done = run_child(code, small)
    assert (done.returncode, done.stdout) == (0, "named\nrefused\nTrue\n"), done.stderr
    assert "after fork, in the child" in done.stderr


def test_the_signal_goes_to_whoever_handled_it_before(small: Path, tmp_path: Path) -> None:
    """Nobody: the process ends by it. faulthandler: a traceback first. And stderr may be closed."""
    path = tmp_path / "damaged.lzm"
    data = bytearray(small.read_bytes())
    data[CHUNK * 7 : CHUNK * 7 + 9] = bytes(9)
    path.write_bytes(data)
    code = (
        COMMON
        + """
import faulthandler
for way in ("default", "faulthandler", "closed"):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 2)
        if way == "faulthandler":
            faulthandler.enable()
        if way == "closed":
            os.close(2)
        snap = lazymem.open(path, readahead=0)
        def touching_function():
            return int(snap["first"].sum()) + int(snap["second"].sum())
        touching_function()
        os._exit(0)
    os.close(write)
    status = os.waitpid(pid, 0)[1]
    said = b""
    while piece := os.read(read, 5000):
        said += piece
    os.close(read)
    print(way, os.WIFSIGNALED(status) and signal.Signals(os.WTERMSIG(status)).name,
          said.count(b"lazymem: SIGBUS follows"), b"touching_function" in said)
"""
    )
    done = run_child(code, path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "default SIGBUS 1 False\nfaulthandler SIGBUS 1 True\nclosed SIGBUS 0 False\n"
