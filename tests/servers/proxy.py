# SPDX-License-Identifier: Apache-2.0
"""A network that misbehaves as it is told: an HTTP/1.1 proxy between the tests and a real server.

It passes requests on as they come, the Host header included, so that signatures stay valid; it counts
and remembers every one; and it does to the answers what the first matching rule says. Rules may be
changed while requests run: each request looks once, when its head has arrived.

One thread a connection, and to each one connection to the server. What was not asked for is not done:
no retries, no buffering of bodies.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from .mischief import Fault, Request, Rule
from .processes import free_port

__all__ = ["Fault", "HostileProxy", "Request", "Rule"]

PIECE: Final = 64 * 1024
_REASONS: Final = {400: "Bad Request", 403: "Forbidden", 404: "Not Found", 429: "Too Many Requests",
                   500: "Internal Server Error", 503: "Slow Down"}  # fmt: skip


class _Broken(Exception):
    """The connection has been ended on purpose, or by the other side."""


class HostileProxy:
    """Listens on a free port of loopback; a context manager. `log` and `rules` may be used at any time."""

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        self.log: list[Request] = []
        self.rules: list[Rule] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._jitter = random.Random(0)
        self._listener = socket.socket()
        self.port = free_port()
        self._listener.bind(("127.0.0.1", self.port))  # port 0 would be given back by `down`

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """How many clients are connected now."""
        with self._lock:
            return len(self._connections)

    def add(self, fault: Fault, *, method: str | None = None, ranged: bool | None = None,
            where: Callable[[Request], bool] | None = None, probability: float = 1.0,
            times: int | None = None, skip: int = 0, seed: int = 0) -> Rule:  # fmt: skip
        """Append a rule; see `Rule`. The first that applies to a request decides."""
        rule = Rule(fault, method, ranged, where, probability, times, skip, seed)
        with self._lock:
            self.rules.append(rule)
        return rule

    def heal(self) -> None:
        """No more rules. Requests that are under way keep theirs."""
        with self._lock:
            self.rules.clear()

    def requests(self, method: str | None = None, key: str | None = None) -> list[Request]:
        """The log, or those of one method, or of one object (the end of the path)."""
        with self._lock:
            return [
                request
                for request in self.log
                if (method is None or request.method == method)
                and (key is None or request.path.endswith(f"/{key}"))
            ]

    def down(self) -> None:
        """Break all connections; refuse new ones. The port stays ours."""
        # On Linux a listening socket that is shut down is a bound one again, which refuses.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._break_all()

    def up(self) -> None:
        """Accept connections (again)."""
        self._listener.listen(256)
        self._acceptor = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._acceptor.start()

    def __enter__(self) -> HostileProxy:
        self.up()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Break all connections and end all threads. Idempotent."""
        self._stopping.set()
        with contextlib.suppress(OSError):  # it is down already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        self._break_all()
        for thread in self._threads:
            thread.join()

    def _break_all(self) -> None:
        with self._lock:
            for client in self._connections:
                _break(client)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # shut down
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._serve, args=(client,), name="proxy", daemon=True)
            with self._lock:
                self._connections.add(client)
                self._threads = [one for one in self._threads if one.is_alive()] + [thread]
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with (
                socket.create_connection(self._server) as server,
                client.makefile("rb") as from_client,
                server.makefile("rb") as from_server,
            ):
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                exchange = _Exchange(client, server, from_client, from_server, self._stopping)
                while self._exchange(exchange):
                    pass
        except (OSError, _Broken):
            pass
        finally:
            with self._lock:
                self._connections.discard(client)
            client.close()

    def _exchange(self, exchange: _Exchange) -> bool:
        """One request and its answer; whether another may follow."""
        head = exchange.read_request()
        if head is None:
            return False
        method, target, headers = head
        request = Request(method, target, dict(headers), time.monotonic())
        with self._lock:
            self.log.append(request)
            rule = next((rule for rule in self.rules if rule.applies(request)), None)
            request.fault = rule.fault if rule else None
            delay = self._jitter.random()
        fault = request.fault or Fault()
        delay = fault.delay + fault.jitter * delay
        try:
            if delay:
                exchange.wait(delay)
            return exchange.answer(request, headers, fault)
        finally:
            request.ended = time.monotonic()


class _Exchange:
    """A client's connection and the server's, and how bytes get from one to the other."""

    def __init__(
        self,
        client: socket.socket,
        server: socket.socket,
        from_client: io.BufferedReader,
        from_server: io.BufferedReader,
        stopping: threading.Event,
    ) -> None:
        self._client = client
        self._server = server
        self._from_client = from_client
        self._from_server = from_server
        self._stopping = stopping

    def read_request(self) -> tuple[str, str, list[tuple[str, str]]] | None:
        """Method, target and headers, in the order they came; None: the client has gone."""
        line = self._from_client.readline()
        if not line:
            return None
        method, target, _ = line.decode("latin-1").split(" ", 2)
        return method, target, _read_headers(self._from_client)

    def answer(self, request: Request, headers: list[tuple[str, str]], fault: Fault) -> bool:
        if fault.silence:
            self._hold()
        if dict(headers).get("expect", "").lower() == "100-continue":
            self._client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault.garbage is not None:
            self._client.sendall(fault.garbage)
            raise _Broken
        if fault.status is not None:
            self._skip_body(headers)
            self._refuse(request, fault)
            return True
        self._pass_request(request, [pair for pair in headers if pair[0] not in fault.forget])
        return self._pass_answer(request, fault)

    def wait(self, seconds: float) -> None:
        """Raises `_Broken` if the proxy is stopped, or the client gives up, in the meantime."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._stopping.wait(min(left, 0.1)) or self._client_has_gone():
                raise _Broken

    def _hold(self) -> None:
        """Say nothing more, until the client gives up."""
        self.wait(float("inf"))

    def _client_has_gone(self) -> bool:
        try:
            return not self._client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False

    def _skip_body(self, headers: list[tuple[str, str]]) -> None:
        for _ in _read_body(self._from_client, dict(headers), has_body=True):
            pass

    def _refuse(self, request: Request, fault: Fault) -> None:
        assert fault.status is not None
        body = f"<Error><Code>{fault.code}</Code><Message>the proxy says so</Message></Error>"
        lines = [
            f"HTTP/1.1 {fault.status} {_REASONS.get(fault.status, 'Error')}",
            "Content-Type: application/xml",
            f"Content-Length: {len(body)}",
        ]
        if fault.retry_after is not None:
            lines.append(f"Retry-After: {fault.retry_after}")
        request.status = fault.status
        head = "\r\n".join(lines) + "\r\n\r\n"
        self._client.sendall((head + ("" if request.method == "HEAD" else body)).encode())

    def _pass_request(self, request: Request, headers: list[tuple[str, str]]) -> None:
        # Expect was answered by us: two answers to one request are more than this proxy wants to follow.
        kept = [f"{name}: {value}" for name, value in headers if name != "expect"]
        self._server.sendall("\r\n".join([f"{request.method} {request.target} HTTP/1.1", *kept, "", ""])
                             .encode("latin-1"))  # fmt: skip
        for piece in _read_body(self._from_client, dict(headers), has_body=True):
            self._server.sendall(piece)

    def _pass_answer(self, request: Request, fault: Fault) -> bool:
        line = self._from_server.readline()
        if not line:
            raise _Broken
        headers = _read_headers(self._from_server)
        shown = [pair for pair in headers if pair[0] not in fault.headers]
        shown += [(name, value) for name, value in fault.headers.items() if value is not None]
        request.status = int(line.split(b" ", 2)[1])
        lines = [f"{name}: {value}\r\n" for name, value in shown]
        self._client.sendall(line + "".join(lines).encode("latin-1") + b"\r\n")
        has_body = request.method != "HEAD" and request.status not in (204, 304)
        size = PIECE if fault.rate is None else max(1, min(PIECE, int(fault.rate / 20)))
        for piece in _read_body(self._from_server, dict(headers), has_body=has_body, size=size):
            self._pass_piece(request, fault, piece)
        return dict(headers).get("connection", "").lower() != "close"

    def _pass_piece(self, request: Request, fault: Fault, piece: bytes) -> None:
        begin = request.body_bytes
        if fault.flip is not None and begin <= fault.flip < begin + len(piece):
            changed = bytearray(piece)
            changed[fault.flip - begin] ^= 1
            piece = bytes(changed)
        ends = [at for at in (fault.reset, fault.stall, fault.truncate) if at is not None]
        last = bool(ends) and min(ends) <= begin + len(piece)
        if last:
            piece = piece[: min(ends) - begin]
        if fault.rate is not None:
            self.wait(len(piece) / fault.rate)
        request.body_bytes += len(piece)  # before the client can see them, and look here
        self._client.sendall(piece)
        if last and fault.stall is not None:
            self._hold()
        if last and fault.reset is not None:
            _break(self._client)
        if last:
            raise _Broken


def _break(connection: socket.socket) -> None:
    """End it with a reset, whatever its thread waits for. Its descriptor stays, for that thread to close."""
    with contextlib.suppress(OSError):  # it is broken already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # connect(2) to AF_UNSPEC dissolves a connection: it wakes who waits, and sends a reset where
        # shutdown(2) would send an orderly end. Python's connect does not know that family.
        unspecified = bytes(16)
        ctypes.CDLL(None).connect(connection.fileno(), unspecified, len(unspecified))


def _read_headers(file: io.BufferedReader) -> list[tuple[str, str]]:
    headers = []
    while (line := file.readline()) not in (b"\r\n", b"\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        headers.append((name.strip().lower(), value.strip()))
    return headers


def _read_body(
    file: io.BufferedReader, headers: Mapping[str, str], *, has_body: bool, size: int = PIECE
) -> Iterator[bytes]:
    """A message's body in pieces of at most `size`, as it is on the wire (chunked stays chunked)."""
    if not has_body:
        return
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while True:
            line = file.readline()
            length = int(line.partition(b";")[0], 16)
            yield line + file.read(length + 2)
            if length == 0:
                return
    left = int(headers.get("content-length", "0"))
    while left:
        piece = file.read1(min(left, size))
        if not piece:
            raise _Broken
        left -= len(piece)
        yield piece
