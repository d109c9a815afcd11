# SPDX-License-Identifier: Apache-2.0
"""A pager and workers, each a forked process: none outlives who made it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from .harness import CaseFailed

_PR_SET_PDEATHSIG: Final = 1


def _fork(work: Callable[[socket.socket], None]) -> tuple[int, socket.socket]:
    """A child that works, and our end of its connection. It ends with this process."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    try:
        ours.close()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        work(theirs)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)  # whoever wants an answer has it, or finds that there is none


def _end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@contextlib.contextmanager
def running_pager() -> Iterator[tuple[str, int]]:
    """A pager that has nothing open yet: its socket, and its process id."""

    def serve(tell: socket.socket) -> None:
        from lazymem._native import pager as native
        from lazymem.pager.access import Access
        from lazymem.pager.server import Limits, Server

        native.start()
        server = Server(path, Access(), Limits())
        server.listen()
        tell.sendall(b"1")
        server.serve()

    with tempfile.TemporaryDirectory(prefix="lazymem-bench-pager-") as folder:
        path = f"{folder}/socket"
        pid, hear = _fork(serve)
        try:
            with hear:
                if hear.recv(1) != b"1":
                    raise CaseFailed("the pager did not start")
            yield path, pid
        finally:
            _end(pid)


class Team:
    """Workers that prepare, and then do their part at the same time, when `start` is called.

    prepare(number): in worker `number`; returns what it is to do, whose result is sent back. They live until
    the block ends.
    """

    def __init__(self, count: int, prepare: Callable[[int], Callable[[], Any]]) -> None:
        self._prepare = prepare
        self._count = count
        self._members: list[tuple[int, socket.socket]] = []

    @property
    def pids(self) -> Sequence[int]:
        return [pid for pid, _ in self._members]

    def __enter__(self) -> Team:
        try:
            for number in range(self._count):
                self._members.append(_fork(lambda connection, number=number: self._work(connection, number)))  # type: ignore[misc]
            for _, connection in self._members:
                self._hear(connection)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid, connection in self._members:
            connection.close()
            _end(pid)

    def _work(self, connection: socket.socket, number: int) -> None:
        try:
            part = self._prepare(number)
            self._say(connection, None)
            connection.recv(1)
            self._say(connection, part())
        except Exception:
            self._say(connection, CaseFailed(traceback.format_exc()))
        connection.recv(1)  # what it holds is looked at meanwhile

    def start(self) -> None:
        """Have all of them do their part."""
        for _, connection in self._members:
            connection.sendall(b"1")

    def wait(self) -> list[Any]:
        """What each came to, in the order of their numbers. Raises `CaseFailed`."""
        return [self._hear(connection) for _, connection in self._members]

    @staticmethod
    def _say(connection: socket.socket, value: Any) -> None:
        data = pickle.dumps(value)
        connection.sendall(len(data).to_bytes(8, "little") + data)

    @staticmethod
    def _hear(connection: socket.socket) -> Any:
        with connection.makefile("rb") as stream:
            size = stream.read(8)
            if len(size) < 8:
                raise CaseFailed("a worker died")
            value = pickle.loads(stream.read(int.from_bytes(size, "little")))
        if isinstance(value, CaseFailed):
            raise value
        return value


def pss_mib(pids: Sequence[int]) -> float:
    """Memory of processes: a page that several share counts as each one's part of it."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024
