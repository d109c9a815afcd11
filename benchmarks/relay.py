# SPDX-License-Identifier: Apache-2.0
"""A TCP relay in front of the S3 server: adds a round trip's time, and counts requests and bytes.

Loopback has no round-trip time, and so flatters whoever asks one thing after the other. The relay holds
every request back for `delay` seconds, and the first one of a connection twice as long, since
connecting would have cost a round trip too. Answers pass through at once and at full speed: the delay is
the time to the first byte. What it does not imitate: a line that is full, TCP's slow start, lost packets.

Answers go from socket to socket by splice(2), without the GIL and without a copy into this process, so
that the relay takes little of the processors that client and server share. Runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import multiprocessing
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Final

import numpy as np

_PIPE_BYTES: Final = 1 << 20
_HEAD_END: Final = b"\r\n\r\n"
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True)
class Traffic:
    """What passed: requests, connections, and bytes of answers, heads included."""

    requests: int
    connections: int
    received: int

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.requests - other.requests,
            self.connections - other.connections,
            self.received - other.received,
        )


class Relay:
    """Listens on a free port of loopback and leads to `port`; a context manager.

    Made by the parent, before the children that look at `traffic`: its counters are shared memory.
    """

    def __init__(self, port: int, delay: float) -> None:
        self.delay = delay
        self._target = ("127.0.0.1", port)
        self._counters = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.int64)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Relay:
        self._process = multiprocessing.get_context("fork").Process(
            target=self._run, args=(os.getpid(),), daemon=True
        )
        self._process.start()
        self._listener.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def traffic(self) -> Traffic:
        """All that passed so far."""
        requests, connections, received = (int(counter) for counter in self._counters[:3])
        return Traffic(requests, connections, received)

    def _run(self, parent: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before we asked to go with it
            return
        self._lock = threading.Lock()
        while True:
            client, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _count(self, which: int, number: int) -> None:
        with self._lock:
            self._counters[which] += number

    def _serve(self, client: socket.socket) -> None:
        self._count(1, 1)
        with client, socket.create_connection(self._target) as server:
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=self._answers, args=(server, client), daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                self._requests(client, server)
            _shut(server)
            back.join()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        # Requests for ranges have no body, and no client here sends one before it has its answer.
        wait, tail = 2 * self.delay, b""
        while data := client.recv(1 << 16):
            if self.delay and not tail:
                time.sleep(wait)
                wait = self.delay
            seen = tail + data
            self._count(0, seen.count(_HEAD_END))  # before the answer can be there, and be looked at
            server.sendall(data)
            tail = b"" if seen.endswith(_HEAD_END) else seen[-3:]

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        out, into = os.pipe()
        try:
            fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            while got := os.splice(server.fileno(), into, _PIPE_BYTES):
                self._count(2, got)
                while got:
                    got -= os.splice(out, client.fileno(), got)
        except OSError:
            pass
        finally:
            os.close(out)
            os.close(into)
            _shut(client)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other side was first
        end.shutdown(socket.SHUT_RDWR)
