# SPDX-License-Identifier: Apache-2.0
"""Clients of one pager share what it decodes, and none can change it for another."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ..children import check_child

pytestmark = pytest.mark.needs_userfaultfd

COMMON = """
import ctypes, json, mmap, os, re, sys
import numpy as np
import lazymem
from lazymem.paging import wire
from lazymem.paging.client import ask, connect
from lazymem.paging.wire import Ask
from lazymem.pager.access import Peer
from tests.arrays import make_arrays
from tests.faults.forking import ended, wrong
from tests.faults.pager_process import Client, running_pager
from tests.users import become

right = make_arrays()
url = sys.argv[1]

def pss_of(pid, name):
    "Bytes of a process's mappings of a file of that name, each page divided by how many share it."
    total, counts = 0, False
    for line in open(f"/proc/{pid}/smaps"):
        mapping = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if mapping:
            counts = name in line
        elif counts and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    return total

def memfd_of(socket):
    connection = connect(socket)
    for question in Ask(wire.HELLO), Ask(wire.OPEN, payload=json.dumps({"url": url}).encode()):
        answer, fd = ask(connection, socket, question)
        assert answer.code == 0, answer.text
    return fd, answer.length
"""


def test_eight_workers_hold_one_copy(snapshot_path: Path) -> None:
    """By PSS, in which a page counts as much as one sharer's part of it: the workers' and the pager's
    together are one copy, in whatever mode they have opened it. By engines of their own it would be eight."""
    code = (
        COMMON
        + """
N = 8
with running_pager() as socket:
    hear, tell = os.pipe()
    wait, go = os.pipe()
    workers = []
    for number in range(N):
        pid = os.fork()
        if pid == 0:
            os.close(go)
            snap = lazymem.open(url, pager=socket, mode="rc"[number % 2])
            bad = wrong(snap, right)
            os.write(tell, f"{len(snap.buffer)} {bad}\\n".encode())
            os.read(wait, 1)
            os._exit(0)
        workers.append(pid)
    said = open(hear)
    bad = []
    for number in range(N):
        size, found = said.readline().split(" ", 1)
        size = int(size)
        bad.append(found.strip())
    pager = Peer.of(connect(socket)).pid
    parts = {pid: pss_of(pid, "memfd:lazymem") for pid in [*workers, pager]}
    os.close(go)
    for pid in workers:
        os.waitpid(pid, 0)
    # The page cache counts once: what is resident and nobody maps would not show in any PSS.
    fd, length = memfd_of(socket)
    print(json.dumps({"size": size, "pss": sum(parts.values()), "least": min(parts[pid] for pid in workers),
                      "file": os.fstat(fd).st_blocks * 512, "bad": bad}))
"""
    )
    found = json.loads(check_child(code, snapshot_path))
    assert found["bad"] == ["[]"] * 8
    assert found["least"] > 0  # the mappings were found
    assert 0.9 * found["size"] < found["pss"] < 1.2 * found["size"]
    assert found["file"] < 1.2 * found["size"]


def test_write_of_one_is_seen_by_no_other(snapshot_path: Path) -> None:
    """To pages that the writer had read, and to such as nobody had; the others read before and after, and one
    opens it afterwards."""
    code = (
        COMMON
        + """
with running_pager() as socket:
    writer, reader = Client(url, socket), Client(url, socket)
    found = [writer.ask("int(arrays['ids'][7])"), reader.ask("wrong() if arrays['ids'][9] == 9 else 9")]
    writer.ask("write('ids', 7, -7)")
    writer.ask("write('layer.2.weight', 100_000, 2.5)")  # decoded, untouched here
    other = Client(url, socket)
    other.ask("write('layer.3.weight', 5, 4.5)")
    found.append(writer.ask("wrong({'ids': {'7': -7}, 'layer.2.weight': {'100000': 2.5}})"))
    found += [reader.ask("wrong()"), other.ask("wrong({'layer.3.weight': {'5': 4.5}})")]
    late = Client(url, socket, "r")
    found += [late.ask("wrong()"), late.ask("write('ids', 7, 1)")]
    for client in writer, reader, other, late:
        client.kill()
    print(found)
"""
    )
    said = check_child(code, snapshot_path)
    assert said == "[7, [], [], [], [], [], 'ValueError: assignment destination is read-only']\n"


def test_client_cannot_write_to_the_pagers_memory(snapshot_path: Path) -> None:
    """Neither by the descriptor that it was given, nor by another one of the same file; not even as root."""
    code = (
        COMMON
        + """
def attempts(fd, length):
    "What each comes to: an errno's name, or that it worked."
    by_path = f"/proc/self/fd/{fd}"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def raised(number):
        if number != 0:
            raise OSError(number, "")

    def protect():
        at = libc.mmap(None, ctypes.c_size_t(4096), 1, 1, fd, ctypes.c_long(0))
        raised(0 if libc.mprotect(at, 4096, 3) == 0 else ctypes.get_errno())

    def punch(other):
        done = libc.fallocate(other, 3, ctypes.c_long(0), ctypes.c_long(4096))
        raised(0 if done == 0 else ctypes.get_errno())

    def opened_and(call):
        other = os.open(by_path, os.O_RDWR)
        call(other)

    calls = {
        "write": lambda: os.write(fd, b"x"),
        "truncate": lambda: os.ftruncate(fd, 0),
        "map": lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        "protect": protect,
        "open": lambda: opened_and(lambda other: None),
        "open, write": lambda: opened_and(lambda other: os.write(other, b"x")),
        "open, map": lambda: opened_and(lambda other: mmap.mmap(other, 4096, mmap.MAP_SHARED)),
        "open, truncate": lambda: opened_and(lambda other: os.ftruncate(other, 0)),
        "open, punch": lambda: opened_and(punch),
    }
    worked = []
    for name, call in calls.items():
        try:
            call()
        except OSError:
            continue
        worked.append(name)
    return worked

with running_pager(url, everybody=True) as socket:
    client = Client(url, socket)
    client.ask("wrong()")
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        become()
        fd, length = memfd_of(socket)
        print("nobody", attempts(fd, length), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
    print("own user", attempts(*memfd_of(socket)))
    print(client.ask("wrong()"), Client(url, socket).ask("wrong()"))
"""
    )
    if os.geteuid() != 0:
        pytest.skip("only root can be two users")
    assert check_child(code, snapshot_path).splitlines() == ["nobody []", "own user ['open']", "[] []"]


def test_process_whose_pager_has_died_ends_without_waiting_for_another(snapshot_path: Path) -> None:
    """A snapshot that is let go of, or that the interpreter's end finds open, is not kept for the pager's
    deadline of 60 seconds: unmapping waits until somebody has read of it."""
    code = (
        COMMON
        + """
with running_pager() as socket:
    kept, dropped = lazymem.open(url, pager=socket), lazymem.open(url, pager=socket)
    kept["ids"].sum()
del dropped
print("dropped")
"""
    )
    assert check_child(code, snapshot_path, deadline=30) == "dropped\n"
