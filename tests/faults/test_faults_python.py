# SPDX-License-Identifier: Apache-2.0
"""What Python does around a touch: its ways to end, its own debugging aids, interpreters and threads that are
not its first; and a debugger that stops all of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ..children import check_child, run_child
from .network import Child
from .test_faults_damage import damaged  # noqa: F401

if TYPE_CHECKING:
    from ..servers.s3 import Bucket

COMMON = """
import ctypes, json, os, sys, threading
import numpy as np
import lazymem
from tests.faults.forking import *

libc = ctypes.CDLL(None)
libc.strlen.argtypes = [ctypes.c_void_p]

def c_thread(function, argument):
    # A thread that Python does not know: no thread state, no GIL.
    handle = ctypes.c_ulong()
    assert libc.pthread_create(ctypes.byref(handle), None, function, ctypes.c_void_p(argument)) == 0
    return handle
"""


# ---- interpreters and threads ----


def test_subinterpreter_reads_or_says_why_not(snapshot_path: Path) -> None:
    """numpy, and from Python 3.12 on modules of the old kind, refuse: by name, and nothing else is harmed."""
    code = (
        COMMON
        + """
try:
    import _xxsubinterpreters as interpreters
except ImportError:
    import _interpreters as interpreters
snap = opened(sys.argv[1])
hear, tell = os.pipe()
one = interpreters.create()
interpreters.run_string(one, f'''
import os
try:
    import lazymem
    with lazymem.open({sys.argv[1]!r}) as snap:
        said = "right" if snap["ids"][7] == 7 else "wrong"
except ImportError as error:
    said = " ".join(str(error).split())
os.write({tell}, said.encode())
''')
print(os.read(hear, 10_000).decode())
interpreters.destroy(one)
print(wrong(snap, expected_of(snap)), ended(forked(lambda: wrong(snap, expected_of(snap)))))
"""
    )
    said, after = check_child(code, snapshot_path).splitlines()
    assert said == "right" or "more than once per process" in said or "support loading in subint" in said
    assert after == "[] 0"


def test_threads_made_by_c_touch_while_the_gil_is_held(tmp_path: Path) -> None:
    code = (
        COMMON
        + """
text = np.random.default_rng(0).integers(1, 255, 3_000_001, np.uint8)
text[-1] = 0
lazymem.build({"text": text}, sys.argv[1], chunk_size=1 << 16)
snap = lazymem.open(sys.argv[1])
begin = snap["text"].ctypes.data
threads = [c_thread(libc.strlen, begin + n * 300_000) for n in range(8)]
join = ctypes.PyDLL(None).pthread_join  # keeps the GIL
lengths = [ctypes.c_void_p() for _ in threads]
for thread, length in zip(threads, lengths):
    assert join(thread, ctypes.byref(length)) == 0
print([length.value + n * 300_000 for n, length in enumerate(lengths)] == [3_000_000] * 8)
"""
    )
    assert check_child(code, tmp_path / "text.lzm") == "True\n"


# ---- the ends of an interpreter ----

# From Python 3.12 on os.fork warns where there are threads, and the engine's are some.
FORK_QUIETLY = {"PYTHONWARNINGS": "ignore::DeprecationWarning"}

ENDINGS = """
import atexit, gc

def begin():
    global snap, arrays, keeping
    snap = opened(sys.argv[1], readahead=0)
    arrays = dict(snap)
    keeping = [memoryview(arrays["ids"])]  # views of views: no order of collecting them may matter
    name = "layer.8.weight"

    def check_at_exit():
        if not np.array_equal(arrays[name], right[name]):
            os._exit(7)

    def touch(seed):
        names = list(arrays)
        np.random.default_rng(seed).shuffle(names)
        while True:
            for one in names:
                arrays[one].sum()
            snap.evict()

    atexit.register(check_at_exit)
    for seed in range(3):
        threading.Thread(target=touch, args=(seed,), daemon=True).start()
    for number in range(8):
        c_thread(libc.strlen, arrays[f"layer.{number}.weight"].ctypes.data)
    snap.prefetch()

def exit_in_a_thread():
    thread = threading.Thread(target=sys.exit)
    thread.start()
    thread.join()

def finalize(end):
    begin()
    end()
    sys.exit(0)  # through atexit and the interpreter's finalization

right = expected_of(opened(sys.argv[1]))
endings = {
    "end": int,
    "exit in a thread": exit_in_a_thread,
    "os._exit": lambda: os._exit(0),
    "frozen": gc.freeze,
}
for name in sys.argv[3:]:
    pid = os.fork()
    if pid == 0:
        finalize(endings[name])
    print(name, ended(pid), flush=True)
"""


def test_interpreter_ends_with_faults_in_flight(snapshot_path: Path) -> None:
    """In daemon threads, threads of C and a prefetch; arrays are alive, and a handler at exit touches."""
    endings = "end", "exit in a thread", "os._exit", "frozen"
    done = run_child(COMMON + ENDINGS, snapshot_path, "{}", *endings, env=FORK_QUIETLY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(f"{name} 0\n" for name in endings)


def test_interpreter_ends_with_requests_in_flight(s3: Bucket, snapshot_path: Path) -> None:
    s3.put("model.lzm", snapshot_path.read_bytes())
    done = run_child(COMMON + ENDINGS, s3.url("model.lzm"), "{}", "end", env=FORK_QUIETLY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "end 0\n"


# ---- Python's own aids ----


def test_debugging_aids_of_python_change_nothing(snapshot_path: Path) -> None:
    """Development mode, warnings as errors, a debugging malloc, tracemalloc, weak references, a frozen
    collector."""
    code = (
        COMMON
        + """
import gc, tracemalloc, weakref
assert sys.flags.dev_mode
snap = opened(sys.argv[1])
expected = expected_of(snap)
tracemalloc.start()
gc.disable()
array = snap["layer.1.weight"]
reference = weakref.ref(array)
gc.freeze()
assert not wrong(snap, expected)
assert tracemalloc.get_traced_memory()[0] < 4 << 20  # lazy memory is not Python's: 24 MB of it were populated
del array
assert reference() is None
gc.unfreeze()
gc.enable()
gc.collect()
snap.close()
print("closed")
"""
    )
    env = {
        "PYTHONDEVMODE": "1",
        "PYTHONWARNINGS": "error",
        "PYTHONMALLOC": "debug",
    }
    done = run_child(code, snapshot_path, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")


@pytest.mark.parametrize("when", ["before", "after"])
def test_faulthandler_prints_its_traceback_after_our_line(
    damaged: tuple[Path, int],  # noqa: F811
    when: str,
) -> None:
    code = """
import faulthandler, sys
if sys.argv[2] == "before":
    faulthandler.enable()
import lazymem
snap = lazymem.open(sys.argv[1], readahead=0)
if sys.argv[2] == "after":
    faulthandler.enable()

def touch_what_is_damaged():
    snap["layer.3.weight"].sum()

touch_what_is_damaged()
"""
    done = run_child(code, damaged[0], when)
    assert done.returncode == -signal.SIGBUS
    ours = done.stderr.index("lazymem: SIGBUS follows")
    theirs = done.stderr.index("Fatal Python error: Bus error")
    assert ours < theirs < done.stderr.index("in touch_what_is_damaged")


# ---- a debugger ----


def test_gdb_reads_what_is_there_and_lets_go(snapshot_path: Path) -> None:
    """It stops the engine as well: what is not populated it cannot read, and is told so at once. A call into
    the process has all threads run, so that populates."""
    gdb = shutil.which("gdb")
    if gdb is None:
        pytest.skip("needs gdb")
    code = """
snap = lazymem.open(url, readahead=0)
array = snap["ids"]
assert array[1] == 1
tell(array.ctypes.data)
wait()
tell(wrong(snap))
"""
    with Child(code, snapshot_path, "{}") as child:
        address = int(child.hear())
        missing = address + 8 * 250_000
        commands = [
            "set debuginfod enabled off",
            f"x/gd {address + 8}",
            "backtrace 1",
            f"x/gd {missing}",
            f"print ((unsigned long (*)(void *))strlen)((void *){missing})",
            f"x/gd {missing}",
            "detach",
        ]
        done = subprocess.run(
            [
                gdb,
                "-nx",
                "-p",
                str(child.pid),
                "-batch",
                *(part for one in commands for part in ("-ex", one)),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if "ptrace: Operation not permitted" in done.stderr:
            pytest.skip("ptrace is not allowed here")
        said = done.stdout + done.stderr
        assert f"{address + 8:#x}:\t1" in said, said
        assert "#0 " in said, said
        assert f"Cannot access memory at address {missing:#x}" in said, said
        assert f"{missing:#x}:\t250000" in said, said
        child.say()
        assert child.hear() == "[]"
        assert child.finish() == 0
    assert os.path.exists(snapshot_path)
