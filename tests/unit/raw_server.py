# SPDX-License-Identifier: Apache-2.0
"""A server that sends whatever bytes a test says: what no real one would send, and what broken ones do."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from lazymem.store.base import Attempt, Opened, Reader


class Hangup(Exception):
    """Raised by what answers: the connection ends, in good order or with a reset."""

    def __init__(self, reset: bool = False) -> None:
        super().__init__()
        self.reset = reset


@dataclass(frozen=True)
class Asked:
    """A request as it came. connection: which one, counted from 0."""

    method: str
    target: str
    headers: dict[str, str] = field(repr=False)
    connection: int = 0
    body: bytes = field(default=b"", repr=False)

    @property
    def range(self) -> tuple[int, int | None]:
        """First and last byte; (-n, None) for the last n."""
        first, _, last = self.headers["range"].removeprefix("bytes=").partition("-")
        return (-int(last), None) if not first else (int(first), int(last))


Answering = Callable[[Asked], "bytes | Iterable[bytes]"]


class RawServer:
    """Listens on loopback; a context manager. asked: all requests so far.

    tls: speak TLS with this context.
    """

    def __init__(
        self, answering: Answering, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
    ) -> None:
        self.answering = answering
        self.asked: list[Asked] = []
        self._tls = tls
        self._host = host
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    @property
    def endpoint(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self._host}:{self.port}"

    def hang_up(self) -> None:
        """End all connections; new ones are taken."""
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)  # TLS has its own, which waits

    def __enter__(self) -> RawServer:
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        self.hang_up()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        for number in range(1 << 30):
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(sock)
            thread = threading.Thread(target=self._serve, args=(sock, number), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, raw: socket.socket, number: int) -> None:
        sock = raw
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(raw, server_side=True)
                with self._lock:
                    self._open.add(sock)
            with sock.makefile("rb") as lines:
                while True:
                    asked = _read_head(lines, number)
                    if asked is None:
                        break
                    if asked.headers.get("expect") == "100-continue":
                        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                    if "content-length" in asked.headers:
                        asked = replace(asked, body=lines.read(int(asked.headers["content-length"])))
                    self.asked.append(asked)
                    answer = self.answering(asked)
                    for piece in [answer] if isinstance(answer, bytes) else answer:
                        sock.sendall(piece)
        except Hangup as hangup:
            if hangup.reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass
        finally:
            with self._lock:
                self._open -= {raw, sock}
            sock.close()


def _read_head(lines: Iterable[bytes], number: int) -> Asked | None:
    head: list[str] = []
    for line in lines:
        text = line.decode("latin-1").rstrip("\r\n")
        if not text:
            break
        head.append(text)
    if not head:
        return None
    method, target, _ = head[0].split(" ", 2)
    pairs = (line.split(": ", 1) for line in head[1:])
    return Asked(method, target, {name.lower(): value for name, value in pairs}, number)


def answer(status: str, body: bytes = b"", /, **headers: str | int | None) -> bytes:
    """The bytes of an answer; underscores in names become dashes; None: not that header."""
    lines: dict[str, str | int | None] = {"Content_Length": len(body), **headers}
    text = "".join(
        f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items() if value is not None
    )
    return f"HTTP/1.1 {status}\r\n{text}\r\n".encode("latin-1") + body


class Honest:
    """Answers ranges of `data` as a good server does; tests change what they are about."""

    def __init__(self, data: bytes, etag: str | None = '"v1"', modified: str | None = None) -> None:
        self.data = data
        self.etag = etag
        self.modified = modified

    def span(self, asked: Asked) -> tuple[int, int]:
        """The range that was asked for, within the data."""
        first, last = asked.range
        size = len(self.data)
        return (max(0, size + first), size) if last is None else (first, min(last + 1, size))

    def __call__(self, asked: Asked, **changed: str | int | None) -> bytes:
        given: dict[str, str | int | None] = {"ETag": self.etag, "Last_Modified": self.modified}
        if asked.method == "HEAD":
            return answer("200 OK", Content_Length=len(self.data), **given)
        if asked.headers.get("if-match", self.etag) != self.etag:
            return answer("412 Precondition Failed")
        begin, end = self.span(asked)
        if begin >= end:
            return answer("416 Range Not Satisfiable", Content_Range=f"bytes */{len(self.data)}")
        given["Content_Range"] = f"bytes {begin}-{end - 1}/{len(self.data)}"
        return answer("206 Partial Content", self.data[begin:end], **{**given, **changed})


def read(reader: Reader, offset: int, length: int, opened: Opened, *, timeout: float = 5.0) -> bytes:
    """One attempt for a range, whose buffer has a guard on both sides."""
    guard = b"\xa5" * 64
    buffer = bytearray(guard + b"\0" * length + guard)
    try:
        reader.read_into(offset, memoryview(buffer)[64 : 64 + length], opened, Attempt(), timeout=timeout)
    finally:
        assert buffer[:64] == guard
        assert buffer[64 + length :] == guard
    return bytes(buffer[64 : 64 + length])
