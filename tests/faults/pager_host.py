# SPDX-License-Identifier: Apache-2.0
"""A pager in a process of its own, whose log, descriptors, threads and spaces a test looks at."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from lazymem.paging import wire
from lazymem.paging.wire import Answer, Ask

# Serves lazymem's protocol at its first argument, and machines at PATH=SNAPSHOT for each of the others.
_CODE = """
import logging, sys
from lazymem._native import pager as native
from lazymem.pager.access import Access
from lazymem.pager.firecracker import Firecracker
from lazymem.pager.server import Limits, Server
from lazymem.pager.stock import Wanted

logging.basicConfig(format="%(message)s", level=logging.WARNING)
native.start()
server = Server(sys.argv[1], Access(), Limits())
server.listen()
for argument in sys.argv[2:]:
    path, _, snapshot = argument.partition("=")
    machines = Firecracker(server, path, Wanted(snapshot))
    machines.listen()
    machines.start()
print("ready", flush=True)
server.serve()
"""


class PagerHost:
    """snapshots: of machines, by the name of the socket where Firecracker is to find the pager."""

    def __init__(self, folder: Path, snapshots: dict[str, object] | None = None) -> None:
        self.socket = str(folder / "control")
        self._log = folder / "log"
        machines = [f"{folder / name}={snapshot}" for name, snapshot in (snapshots or {}).items()]
        with open(self._log, "w") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-c", _CODE, self.socket, *machines],
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self._popen.stdout is not None
        if self._popen.stdout.readline() != "ready\n":
            raise AssertionError(f"the pager ended, status {self._popen.wait()}\n{self.log()}")
        self.pid = self._popen.pid

    def __enter__(self) -> PagerHost:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._popen.kill()
        self._popen.communicate()

    def log(self) -> str:
        return self._log.read_text()

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(20)
        connection.connect(self.socket)
        return connection

    def status(self) -> dict[str, Any]:
        with self.connect() as connection:
            wire.send(connection, Ask(wire.STATUS).pack())
            packet, fd = wire.receive(connection)
            assert fd is not None, wire.unpack_answer(packet).text
            with os.fdopen(fd, "rb") as file:
                found: dict[str, Any] = json.load(file)
        return found

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, f"{what}\n{self.log()}"
            time.sleep(0.02)

    def wait_without_clients(self) -> None:
        """Until every space has gone, and whoever had one does not count as a client any more."""

        def nobody_is_there() -> bool:
            status = self.status()
            return status["spaces"] == [] and status["clients"] == 0

        self.wait_until(nobody_is_there, "clients are left")


def ask(connection: socket.socket, question: Ask, descriptor: int | None = None) -> Answer:
    """The answer, without the descriptor that may come along."""
    wire.send(connection, question.pack(), descriptor)
    packet, fd = wire.receive(connection)
    if fd is not None:
        os.close(fd)
    return wire.unpack_answer(packet)


def hear_the_end(connection: socket.socket) -> bytes:
    """What comes until the other side hangs up."""
    heard = b""
    with suppress(ConnectionResetError):
        while more := connection.recv(65536):
            heard += more
    return heard
