# SPDX-License-Identifier: Apache-2.0
"""Clients that mean a pager no good (tests/faults/hostile.py): it answers in a sentence, serves others as if
nothing had been, and nothing of them stays behind."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

import lazymem
from lazymem._native import NativeError
from lazymem._native import pager as native
from lazymem.errors import PagerUnavailable
from lazymem.pager.access import Access
from lazymem.pager.mapping import open_space
from lazymem.pager.server import Limits, Server
from lazymem.paging import client, wire
from lazymem.paging.wire import Ask

from .. import pagers
from ..once import made_once
from .hostile import CASES, SIZE
from .pager_host import PagerHost

pytestmark = pytest.mark.needs_userfaultfd

ROOT = Path(__file__).parents[2]
HUGE = Path("/proc/sys/vm/nr_hugepages")
SEED = int(os.environ.get("LAZYMEM_SEED", random.SystemRandom().randrange(1 << 30)))

NO_USERFAULTFD = "is no userfaultfd, or one whose handshake (UFFDIO_API) was made already"
NONE_BEFORE = "is no userfaultfd that a pager had before"
OF_ANOTHER_KIND = "is not all mapped, or not all anonymous, or its pages have not 4096 bytes"
#: What a pager says, or a part of it; "": nothing is said, or nobody is there to hear it.
SAYS = {
    "noise": "this is not the protocol",
    "truncated": "a packet has 55 bytes, and a question at least 56",
    "one byte": "a packet has 1 bytes",
    "wrong magic": "this is not the protocol",
    "wrong version": "a packet is of version 99; this is version 1",
    "wrong kind": "a packet asks for 99",
    "reserved": "reserved field is not 0",
    "length beyond": "payload has 0 bytes, not 2147483648",
    "length short": "payload has 7 bytes, not 0",
    "long": "a packet is too long",
    "nothing, with a descriptor": "done",
    "two descriptors": "more than one descriptor",
    "ten descriptors": "more than one descriptor",
    "map before open": "MAP comes after OPEN",
    "prefetch before open": "comes after OPEN",
    "why before open": "comes after OPEN",
    "no json": "a payload is not JSON",
    "deep json": "a payload is not JSON",
    "json list": "a payload is not a JSON object",
    "no url": "names no url",
    "url is a number": "names no url",
    "url has a zero": "names no url",
    "relative": "give an absolute path",
    "a surrogate": "is not a path",
    "a folder": "the folder holds no",
    "a device": "not a regular file",
    "long url": "a url has at most 4096 characters",
    "unknown scheme": "gopher:// is not supported",
    "chunk size": "chunk_size is -3",
    "format": "the format is 'no such'",
    "options": "storage_options is no object",
    "option": "timeout is 'long'",
    "options of a kind": "endpoint_url is a int",
    "identities": "is another for the pager than for you",
    "identities of a kind": "identities is no list of strings",
    "a pipe": "is a named pipe, not a regular file",
    "populate of nobody": "4000000000",
    "open twice": "a connection opens one snapshot",
    "far prefetch": "done",
    "address near the end": "MAP: no process has memory up to",
    "length near the end": "MAP: no process has memory up to",
    "kernel's address": OF_ANOTHER_KIND,
    "odd address": "MAP: address is 4097, not a multiple",
    "odd length": "MAP: length is 4097, not a multiple",
    "odd offset": "MAP: offset is 1, not a multiple",
    "no length": "MAP: length is 0",
    "beyond the snapshot": "MAP: the snapshot's memory has",
    "offset near the end": "MAP: the snapshot's memory has",
    "odd page": "MAP: page is 8192",
    "huge page of half its size": "MAP: length is 1048576, not a multiple of the page's 2097152 bytes",
    "nothing there": OF_ANOTHER_KIND,
    "shared, and is anonymous": "not all a private mapping of what OPEN brought",
    "adopted without a handshake": NONE_BEFORE,
    "null device": NO_USERFAULTFD,
    "memfd": NO_USERFAULTFD,
    "socket": NO_USERFAULTFD,
    "userfaultfd device": NO_USERFAULTFD,
    "null device, adopted": NONE_BEFORE,
    "memfd, adopted": NONE_BEFORE,
    "socket, adopted": NONE_BEFORE,
    "userfaultfd device, adopted": NONE_BEFORE,
    "handshake made already": NO_USERFAULTFD,
    "no memory of ours adopted": "done",
    "first map without a descriptor": "the first MAP brings a userfaultfd",
    "second map with a descriptor": "a connection is for one userfaultfd",
    "map twice": "shows something already",
    "map overlapping": "shows something already",
    "many maps": "a connection maps at most 1024 ranges",
    "a file's memory": OF_ANOTHER_KIND,
    "the pager's memory": OF_ANOTHER_KIND,
    "small pages, and are huge": OF_ANOTHER_KIND,
    "a descriptor that blocks": "right",
    "another file of the client's for the pager's": "7",  # SIGBUS
    "hang-ups": "",
    "silence": "",
    "answers that nobody takes": "",
    "killed while it maps": "",
    "random": "",
}


def test_hostile_clients_are_told_why_and_others_are_served(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """And nothing of them is left behind: no descriptors, spaces, snapshots, threads, tracebacks."""
    folder = tmp_path
    np.random.default_rng(5).integers(0, 256, 3 * SIZE, np.uint8).tofile(folder / "data")
    lazymem.build(folder / "data", folder / "data.lzm", chunk_size=64 << 10)

    def make(target: Path) -> None:
        command = ["cc", "-std=gnu11", "-O1", "-I", ROOT / "lazymem" / "_native"]
        subprocess.run([*command, ROOT / "examples" / "pager_client.c", "-o", target], check=True)

    other = made_once(tmp_path_factory, "pager_client", make)
    with PagerHost(folder) as pager, some_huge_pages():
        descriptors = pager.descriptors()
        good = serve_somebody(pager, folder / "data.lzm", other)
        threads = pager.threads()
        said = attack(pager, folder / "data.lzm", other, good)
        rest(pager, descriptors)
        threads_after, log = pager.threads(), pager.log()
    wrong = {name: words for name, words in said.items() if not is_right(name, words)}
    assert wrong == {}, f"LAZYMEM_SEED={SEED}"
    assert SAYS.keys() == said.keys() == CASES.keys()
    assert threads_after <= threads + 2, "more than those of the test's own questions"
    assert "Traceback" not in log


def is_right(name: str, words: str) -> bool:
    if name == "small pages, and are huge" and words.startswith("no huge pages"):
        return True
    return SAYS[name] in words and (words == "") == (SAYS[name] == "")


class some_huge_pages:
    def __enter__(self) -> None:
        self._before = HUGE.read_text()
        try:
            HUGE.write_text(str(int(self._before) + 2))
        except OSError:
            self._before = ""

    def __exit__(self, *_: object) -> None:
        if self._before:
            HUGE.write_text(self._before)


def serve_somebody(pager: PagerHost, snapshot: Path, other: Path) -> str:
    command = [other, pager.socket, snapshot]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def attack(pager: PagerHost, snapshot: Path, other: Path, good: str) -> dict[str, str]:
    arguments = [pager.socket, str(pager.pid), str(snapshot), str(other), good, str(SEED)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.hostile", *arguments],
        capture_output=True, text=True, timeout=100, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + pager.log()
    found: dict[str, str] = json.loads(done.stdout)
    return found


def rest(pager: PagerHost, descriptors: int) -> None:
    """Until the pager has no clients any more, no snapshots, and as many descriptors as when it was new."""

    def is_at_rest() -> bool:
        status = pager.status()
        return status["spaces"] == status["snapshots"] == [] and pager.descriptors() <= descriptors

    pager.wait_until(is_at_rest, f"something stays behind, with LAZYMEM_SEED={SEED}")


def test_client_waits_while_others_wait_to_be_taken_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "pager")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, ExitStack() as waiting:
        listener.bind(path)
        listener.listen(0)
        with suppress(BlockingIOError):
            while True:
                waiting.enter_context(stranger(path))
        with pytest.raises(PagerUnavailable, match="too many others wait"):
            client.connect(path, -1)
        monkeypatch.setattr(time, "sleep", lambda _: waiting.enter_context(listener.accept()[0]))
        client.connect(path).close()


def test_pager_that_can_have_no_more_threads_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Limits of processes and of containers count them, and whoever may connect uses them up."""
    path = tmp_path / "pager"
    server = Server(str(path), Access(), Limits())
    server.listen()
    assert server.listener is not None
    serving = threading.Thread(target=server.serve)
    serving.start()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pagers.Raw(path) as refused:
                assert refused.is_over()
        assert server.sessions == set()
        assert "could not be taken in: can't start new thread" in caplog.text
        with pagers.Raw(path) as client_of_it:
            assert client_of_it.ask(Ask(wire.HELLO)).code == 0
    finally:
        server.stop()
        serving.join()
        server.listener.close()
        server.leave()


def test_pager_that_can_have_no_more_descriptors_does_not_blame_the_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise NativeError(-errno.EMFILE)

    monkeypatch.setattr(native, "open_space", full)
    with pytest.raises(NativeError, match="this pager can have no more descriptors"):
        open_space(0, adopted=False)


def refuse(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def stranger(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setblocking(False)
    try:
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection
