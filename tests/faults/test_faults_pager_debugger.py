# SPDX-License-Identifier: Apache-2.0
"""A client of the pager that is stopped, and looked at by a debugger, where nothing has touched it yet.

What the kernel does for it (Linux 6.18). process_vm_readv and process_vm_writev take pages by
pin_user_pages_remote with `locked`, so that they may sleep until a page is there. Reads and writes of
/proc/PID/mem, PTRACE_PEEKDATA and POKEDATA, and by these gdb, take them by access_remote_vm: without it,
because they need the mapping to stay. handle_userfault cannot have such a caller wait (no
FAULT_FLAG_ALLOW_RETRY), sends no message, and the call fails: EIO. Who serves the memory makes no difference.
So a debugger asks the pager first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..children import check_child, run_child
from .pager_process import running_pager
from .test_faults_damage import damaged  # noqa: F401

pytestmark = pytest.mark.needs_userfaultfd

COMMON = """
import ctypes, errno, json, os, re, shutil, signal, struct, subprocess, sys, tempfile
import numpy as np
import lazymem
from lazymem.paging.outside import populate
from tests.arrays import make_arrays
from tests.faults.pager_process import Client, running_pager

path, socket, *more = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
right = make_arrays()
ids = right["ids"]
everything = sum(array.nbytes for array in right.values())

class Range(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]

for call in (libc.process_vm_readv, libc.process_vm_writev):
    call.argtypes = [ctypes.c_int, *[ctypes.POINTER(Range), ctypes.c_ulong] * 2, ctypes.c_ulong]
    call.restype = ctypes.c_ssize_t
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long
PEEK, POKE, ATTACH, DETACH = 2, 5, 16, 17

def process_vm(call, pid, address, array):
    "Between memory of that process and an array of ours; bytes, or what went wrong."
    done = call(pid, Range(array.ctypes.data, array.nbytes), 1, Range(address, array.nbytes), 1, 0)
    return done if done >= 0 else os.strerror(ctypes.get_errno())

def read_vm(pid, address, like):
    into = np.empty_like(like)
    done = process_vm(libc.process_vm_readv, pid, address, into)
    return done == like.nbytes and np.array_equal(into, like)

def of_mem(pid, address, length=8):
    "By /proc/PID/mem: bytes, or an errno's name."
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        return os.pread(fd, length, address)
    except OSError as error:
        return errno.errorcode[error.errno]
    finally:
        os.close(fd)

def to_mem(pid, address, data):
    fd = os.open(f"/proc/{pid}/mem", os.O_WRONLY)
    try:
        return os.pwrite(fd, data, address)
    except OSError as error:
        return errno.errorcode[error.errno]
    finally:
        os.close(fd)

def peek(pid, address):
    ctypes.set_errno(0)
    word = libc.ptrace(PEEK, pid, address, None)
    number = ctypes.get_errno()
    return errno.errorcode[number] if number else word

def stop(pid):
    os.kill(pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])

def is_refused_or_right(found, expected):
    "What the kernel says today; what a later one may do as well; never zeros."
    return found in ("EIO", expected)
"""


@pytest.fixture(scope="module")
def pager() -> Iterator[str]:
    """The socket of a pager of root's, or whoever runs the tests."""
    with running_pager() as socket:
        yield socket


def test_stopped_client_is_read_and_written_by_process_vm(snapshot_path: Path, pager: str) -> None:
    """Every thread of it is stopped; what was not written stays right. Mode "r" is not written."""
    code = (
        COMMON
        + """
for mode in "c", "r":
    client = Client(path, socket, mode)
    at = client.ask("addresses()")
    stop(client.pid)
    wrong = [name for name in list(right)[:8] if not read_vm(client.pid, at[name], right[name])]
    wrote = process_vm(libc.process_vm_writev, client.pid, at["ids"] + 8 * 99_999, np.array([-1, -2]))
    wrong += [] if read_vm(client.pid, at["ids"] + 8 * 100_001, ids[100_001:]) else ["after"]
    os.kill(client.pid, signal.SIGCONT)
    changed = {"ids": {"99999": -1, "100000": -2}} if mode == "c" else {}
    print(mode, wrong, wrote, client.ask(f"wrong({changed})"))
    client.kill()
"""
    )
    assert check_child(code, snapshot_path, pager).splitlines() == ["c [] 16 []", "r [] Bad address []"]


def test_stopped_client_is_read_and_written_by_proc_mem_and_ptrace(snapshot_path: Path, pager: str) -> None:
    """Once the pager was asked to populate: a range, which leaves the rest as it was, and all of it. What was
    written before stays."""
    code = (
        COMMON
        + """
def word(index):
    return struct.pack("q", ids[index])

client = Client(path, socket)
client.ask("write('ids', 5, -5)")
begin = client.ask("addresses()")["ids"]
at = lambda index: begin + 8 * index
pid = client.pid
assert libc.ptrace(ATTACH, pid, None, None) == 0
os.waitpid(pid, 0)
print("before", is_refused_or_right(of_mem(pid, at(200_000)), word(200_000)),
      is_refused_or_right(peek(pid, at(200_000)), 200_000),
      is_refused_or_right(to_mem(pid, at(250_000), b"12345678"), 8))
print("populated", populate(socket, pid=pid, address=at(200_000) + 3, length=5))
print("range", of_mem(pid, at(200_000)) == word(200_000), peek(pid, at(200_000)) == 200_000,
      is_refused_or_right(of_mem(pid, at(100_000)), word(100_000)))
print("all", populate(socket, pid=pid) >= everything)
print("mem", of_mem(pid, begin, ids.nbytes) == ids.tobytes().replace(word(5), struct.pack("q", -5), 1))
print("wrote", to_mem(pid, at(250_000), struct.pack("q", -1)),
      libc.ptrace(POKE, pid, at(260_000), 2**64 - 2), peek(pid, at(260_000)))
assert libc.ptrace(DETACH, pid, None, None) == 0
print(client.ask("wrong({'ids': {'5': -5, '250000': -1, '260000': -2}})"))
client.kill()
other = Client(path, socket)
print(other.ask("wrong()"))
other.kill()
"""
    )
    assert check_child(code, snapshot_path, pager).splitlines() == [
        "before True True True",
        "populated 5",
        "range True True True",
        "all True",
        "mem True",
        "wrote 8 0 -2",
        "[]",
        "[]",
    ]


def test_gdb_reads_and_writes_what_nobody_has_touched(
    snapshot_path: Path, pager: str, tmp_path: Path
) -> None:
    gdb = shutil.which("gdb")
    if gdb is None:
        pytest.skip("needs gdb")
    code = (
        COMMON
        + """
dump, gdb = more
client = Client(path, socket)
at = client.ask("addresses()")
untouched, weights = at["ids"] + 8 * 250_000, at["layer.3.weight"]
ask = f"{sys.executable} -m lazymem pager populate --socket {socket} --pid {client.pid}"
commands = [
    "set debuginfod enabled off",
    f"x/gd {untouched}",
    f"shell {ask} --address {untouched:#x}",
    f"x/gd {untouched}",
    f"x/gd {weights}",
    f"shell {ask} -q",
    f"dump binary memory {dump} {weights} {weights + right['layer.3.weight'].nbytes}",
    f"set var *(long *){untouched} = -7",
    "detach",
]
command = [gdb, "-nx", "-p", str(client.pid), "-batch", *(p for one in commands for p in ("-ex", one))]
done = subprocess.run(command, capture_output=True, text=True)
said = done.stdout + done.stderr
if "ptrace: Operation not permitted" in said:
    sys.exit(77)
shown = re.findall(rf"{untouched:#x}:\\t(\\d+)$", said, re.M)
refused = said.count(f"Cannot access memory at address {untouched:#x}")  # before it was populated
print(set(shown), len(shown) + refused == 2 or said, "4,096 bytes are in place" in said)
print(open(dump, "rb").read() == right["layer.3.weight"].tobytes())
print(client.ask("wrong({'ids': {'250000': -7}})"))
client.kill()
"""
    )
    done = run_child(code, snapshot_path, pager, tmp_path / "dump", gdb)
    if done.returncode == 77:
        pytest.skip("ptrace is not allowed here")
    assert (done.returncode, done.stdout) == (0, "{'250000'} True True\nTrue\n[]\n"), done.stderr


def test_tracer_of_the_same_pager_reads_into_untouched_memory_of_its_own(
    snapshot_path: Path, pager: str
) -> None:
    """Both sides of one system call wait for the same pager."""
    code = (
        COMMON
        + """
client = Client(path, socket)
at = client.ask("addresses()")
mine = lazymem.open(path, pager=socket, mode="c")
assert libc.ptrace(ATTACH, client.pid, None, None) == 0
os.waitpid(client.pid, 0)
print(process_vm(libc.process_vm_readv, client.pid, at["layer.1.weight"], mine["layer.2.weight"]))
print(process_vm(libc.process_vm_writev, client.pid, at["layer.4.weight"], mine["layer.3.weight"]))
libc.ptrace(DETACH, client.pid, None, None)
same = [np.array_equal(mine["layer.2.weight"], right["layer.1.weight"])]
same += [np.array_equal(mine[name], right[name]) for name in right if name != "layer.2.weight"]
moved = "bool((arrays['layer.4.weight'] == arrays['layer.3.weight']).all())"
print(all(same), client.ask("wrong()"), client.ask(moved))
client.kill()
"""
    )
    size = 1024 * 512 * 4
    assert check_child(code, snapshot_path, pager) == f"{size}\n{size}\nTrue ['layer.4.weight'] True\n"


def test_child_of_a_fork_is_populated_by_its_space(snapshot_path: Path, pager: str) -> None:
    """No connection tells its process id; it is stopped before it has touched anything."""
    if os.geteuid() != 0:
        pytest.skip("events of a fork need CAP_SYS_PTRACE")
    code = (
        COMMON
        + """
from lazymem.paging import wire
from lazymem.paging.client import ask, connect
from lazymem.paging.wire import Ask

def status(socket):
    _, fd = ask(connect(socket), socket, Ask(wire.STATUS))
    with open(fd, "rb") as file:
        return json.load(file)

client = Client(path, socket)
at = client.ask("addresses()")
in_child = "[os.kill(os.getpid(), 19), wrong()][1]"
client.say(in_child + " if (pid := os.fork()) == 0 else [pid, os.waitpid(pid, 2)]")
pid, _ = json.loads(client.hear())
spaces = status(socket)["spaces"]
(mine,) = [one["space"] for one in spaces if one["client"] and one["client"]["pid"] == client.pid]
(space,) = [one["space"] for one in spaces if one["parent"] == mine]
try:
    populate(socket, pid=pid)
except lazymem.errors.OptionError as error:
    print("known by its space alone" in str(error))
print(is_refused_or_right(of_mem(pid, at["ids"], ids.nbytes), ids.tobytes()))
print(populate(socket, space=space) >= everything)
print(of_mem(pid, at["ids"], ids.nbytes) == ids.tobytes())
os.kill(pid, signal.SIGCONT)
print(client.hear(), client.ask("wrong()"))
os.kill(pid, signal.SIGKILL)
client.kill()
"""
    )
    assert check_child(code, snapshot_path, pager) == "True\nTrue\nTrue\nTrue\n[]\n []\n"


def test_populating_names_what_cannot_be_had_and_brings_the_rest(
    damaged: tuple[Path, int],  # noqa: F811
    pager: str,
) -> None:
    path, chunk = damaged
    code = (
        COMMON
        + """
client = Client(path, socket)
at = client.ask("addresses()")
stop(client.pid)
try:
    populate(socket, pid=client.pid)
except lazymem.errors.ReadError as error:
    print(error)
print(of_mem(client.pid, at["layer.3.weight"] + 65536))
print(of_mem(client.pid, at["ids"], ids.nbytes) == ids.tobytes())
client.kill()
"""
    )
    said, damage, after = check_child(code, path, pager).splitlines()
    assert f"chunk {chunk} (array 'layer.3.weight')" in said
    assert (damage, after) == ("EIO", "True")


def test_populating_is_for_the_clients_own_user(snapshot_path: Path, pager: str) -> None:
    """A user may have an own process populated, and nobody else's."""
    if os.geteuid() != 0:
        pytest.skip("only root can be two users")
    code = (
        COMMON
        + """
from tests.users import become

def as_nobody(call):
    pid = os.fork()
    if pid == 0:
        become()
        try:
            print(call())
        except lazymem.errors.LazymemError as error:
            print(f"{type(error).__name__}: {error}")
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(pid, 0)

path = tempfile.mkdtemp() + "/snapshot.lzm"
shutil.copy(sys.argv[1], path)
os.chmod(os.path.dirname(path), 0o755)
with running_pager(path, everybody=True) as socket:
    client = Client(path, socket)
    client.ask("addresses()")
    as_nobody(lambda: populate(socket, pid=client.pid))

    def own():
        snap = lazymem.open(path, pager=socket)
        return populate(socket, pid=os.getpid()) >= everything

    as_nobody(own)
    client.kill()
shutil.rmtree(os.path.dirname(path))
"""
    )
    refused, own = check_child(code, snapshot_path, pager).splitlines()
    assert refused.startswith("PagerUnavailable: "), refused
    assert "another user's" in refused
    assert own == "True"
