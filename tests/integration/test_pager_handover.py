# SPDX-License-Identifier: Apache-2.0
"""`lazymem pager serve --take-over`: one pager after another, and no client notices."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazymem._native import CODES
from lazymem.paging import wire
from lazymem.paging.wire import Ask
from tests.pagers import DEADLINE, Pager, Raw, line_of, refusal, running

pytestmark = pytest.mark.needs_userfaultfd

#: Threads that scan, give back and scan again; children and grandchildren that look at what nobody has read
#: when they are told to; memory of which a part was given back for good.
CLIENT = """
import ctypes, json, os, sys, threading
import numpy as np
import lazymem
from lazymem._native import pager as native
from lazymem.paging import client, wire
from lazymem.paging.wire import Ask

path, pager = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
number = ctypes.c_int
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, number, number, number, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
DONTNEED = 4

def say(*words):
    print(*words, flush=True)

whole = lazymem.open(path, backend="eager")
expected = np.frombuffer(whole.buffer, np.uint8)
snap = lazymem.open(path, pager=pager)
mine = np.frombuffer(snap.buffer, np.uint8)
start, size = mine.ctypes.data, len(mine) // 4096 * 4096

# ---- removed for good ----
connection = client.connect(pager)
client.ask(connection, pager, Ask(wire.HELLO, id=1))
question = Ask(wire.OPEN, id=2, payload=json.dumps({"url": path}).encode())
opened, memfd = client.ask(connection, pager, question)
at = libc.mmap(None, opened.length, 0, 0x22, -1, 0)
with native.userfaultfd() as (uffd, _):
    uffd = os.dup(uffd)
answer, _ = client.ask(
    connection, pager, Ask(wire.MAP, id=3, address=at, length=opened.length, flags=native.REMOVED_ZERO), uffd)
assert answer.code == 0, answer
assert libc.mprotect(at, opened.length, 3) == 0
removed = np.ctypeslib.as_array((ctypes.c_ubyte * opened.length).from_address(at))
half = opened.length // 8192 * 4096
removed[: half + 4096 * 8 : 4096].sum()
assert libc.madvise(at + half, 4096 * 16, DONTNEED) == 0  # eight pages were read, eight were not

# ---- children with unread pages ----
go, come = os.pipe()
here, there = os.pipe()
def family(generations, inherited=()):
    child = os.fork()
    if child:
        return child
    try:
        for fd in inherited:
            os.close(fd)
        inner = family(generations - 1) if generations > 1 else None
        os.write(there, b"x")
        os.read(go, 1)
        good = np.array_equal(mine, expected)
        if inner:
            good &= os.waitpid(inner, 0)[1] == 0
        os._exit(0 if good else 1)
    finally:
        os._exit(2)
children = [family(2, [come]), family(1, [come])]
for _ in range(3):
    os.read(here, 1)

ending, wrong, rounds, turn = threading.Event(), [], [0] * 3, threading.Condition()
def scan(number):
    third = size // 3 // 4096 * 4096
    first, end = third * number, third * (number + 1)
    order = np.random.default_rng(number).permutation(np.arange(first, end, 65536))
    while not ending.is_set():
        assert libc.madvise(start + first, third, DONTNEED) == 0
        for begin in order:
            stop = min(begin + 65536, end)
            if not np.array_equal(mine[begin:stop], expected[begin:stop]):
                wrong.append((number, begin))
        with turn:
            rounds[number] += 1
            turn.notify_all()
threads = [threading.Thread(target=scan, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
say("scanning")
for line in sys.stdin:
    if line == "rounds\\n":  # all of it, by whoever serves now
        with turn:
            before = list(rounds)
            turn.wait_for(lambda: all(now > then + 1 for now, then in zip(rounds, before)))
        say("rounds")
    elif line == "removed\\n":
        zeros = removed[half : half + 4096 * 16].any()
        rest = np.array_equal(removed[:half], expected[:half]) and np.array_equal(
            removed[half + 4096 * 16 : size], expected[half + 4096 * 16 : size])
        answer, _ = client.ask(connection, pager, Ask(wire.WHY, id=9))
        say("removed", zeros, rest, answer.id, answer.code)
    elif line == "children\\n":
        os.close(come)
        say("children", [os.waitpid(child, 0)[1] for child in children])
ending.set()
for thread in threads:
    thread.join()
say("end", wrong, snap._region._native.attachment.adoptions)
del mine
snap.close()
"""


class Client:
    """CLIENT, and what it answers."""

    def __init__(self, snapshot: Path, socket: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(snapshot), str(socket)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            assert line_of(self.process) == "scanning"
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """It and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def ask(self, word: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return line_of(self.process)

    def end(self) -> None:
        """All was right, and no connection was lost."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.stdin = None
        assert line_of(self.process) == "end [] 0"
        _, err = self.process.communicate(timeout=DEADLINE)
        assert (self.process.returncode, err) == (0, "")


@pytest.fixture
def socket(tmp_path: Path) -> Path:
    return tmp_path / "pager"


@pytest.fixture
def scanning(snapshot_path: Path, socket: Path) -> Iterator[tuple[Pager, Client]]:
    with running(socket) as pager:
        client = Client(snapshot_path, socket)
        try:
            yield pager, client
        finally:
            client.kill()


def test_take_over_drops_no_client_and_no_touch(scanning: tuple[Pager, Client], socket: Path) -> None:
    pager, client = scanning
    successors = []
    try:
        for _ in range(3):
            spaces = pager.status()["spaces"]
            successors.append(Pager(socket, "--take-over"))
            assert "with the clients of" in successors[-1].out
            assert pager.wait() == (0, "")
            pager = successors[-1]
            assert client.ask("rounds") == "rounds"
            after = pager.status()
            assert [len(after["spaces"]), after["clients"]] == [8, 2]
            assert all(one["follows_fork"] for one in after["spaces"])
            assert [one["mapped"] for one in after["spaces"]] == [one["mapped"] for one in spaces]
            assert sum(one["parent"] is not None for one in after["spaces"]) == 6
        assert client.ask("removed") == "removed False True 9 0"
        assert client.ask("children") == "children [0, 0]"
        client.end()
        assert pager.end() == (0, "")
        assert not socket.exists()
    finally:
        for one in successors:
            one.kill()


def give_up_at(socket: Path, step: str) -> None:
    """A new pager that dies once it has what comes after `step`."""
    with Raw(socket) as taker:
        for one in ("look", "give"):
            taker.send(Ask(wire.TAKE_OVER, payload=json.dumps({"step": one, "version": 2}).encode()))
            answer, memory = taker.receive()
            assert answer.code == 0
            assert memory is not None
            with open(memory, "rb") as file:
                told = json.loads(file.read())
            if one == step:
                break
        if step == "give":
            assert [one["parent"] == 0 for one in told["spaces"]].count(True) == 2


def test_old_pager_goes_on_if_the_new_one_fails(
    scanning: tuple[Pager, Client], socket: Path, snapshot_path: Path, tmp_path: Path
) -> None:
    pager, client = scanning
    give_up_at(socket, "look")
    assert client.ask("rounds") == "rounds"
    give_up_at(socket, "give")
    assert client.ask("rounds") == "rounds"
    status, sentence = refusal(socket, "--take-over", "--memory", "100K")
    assert status == 3
    assert "raise its --memory" in sentence
    other = tmp_path / "other.lzm"
    other.write_bytes(snapshot_path.read_bytes())
    with Raw(socket) as raw:
        opened = raw.ask(Ask(wire.OPEN, payload=json.dumps({"url": str(other)}).encode()))
        assert opened.code == 0
        other.unlink()
        status, sentence = refusal(socket, "--take-over")
        assert status == 3
        assert str(other) in sentence
        assert raw.ask(Ask(wire.WHY)).code == 0
    assert pager.process.poll() is None
    assert client.ask("removed") == "removed False True 9 0"
    assert client.ask("children") == "children [0, 0]"
    client.end()


def test_take_over_where_no_pager_is_just_starts_one(socket: Path) -> None:
    with running(socket, "--take-over") as pager:
        assert "clients of" not in pager.out
        assert pager.status()["clients"] == 0


def test_question_that_is_out_is_answered_by_the_new_pager(socket: Path) -> None:
    """Opening takes a while: a server that does not answer yet."""
    asked, answering = threading.Event(), threading.Event()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            answering.wait(DEADLINE)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever).start()
    url = f"http://127.0.0.1:{server.server_port}/model.lzm"
    try:
        with running(socket) as old, Raw(socket) as raw, Raw(socket) as other:
            raw.send(Ask(wire.OPEN, id=7, payload=json.dumps({"url": url}).encode()))
            assert asked.wait(DEADLINE)
            with running(socket, "--take-over"):
                assert old.wait() == (0, "")
                assert other.ask(Ask(wire.HELLO, id=8)).id == 8
                answering.set()
                answer, _ = raw.receive()
                assert answer.id == 7
                assert CODES[answer.code] == "GONE"
                assert raw.ask(Ask(wire.HELLO, id=9)).id == 9
    finally:
        answering.set()
        server.shutdown()
        server.server_close()
