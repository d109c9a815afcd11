# SPDX-License-Identifier: Apache-2.0
"""What a network client could do at best: bare sockets, a presigned URL, bytes received where they belong."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import urlsplit

import numpy as np

from .bounds import Bytes, fresh_memory, in_threads
from .harness import Meter
from .remote_contenders import CONNECTIONS, PIECE, Touches
from .remote_meter import measured
from .remote_server import BUCKET, Model, Place

_RANGE: Final = 8 << 20  # bytes of one request


class _Connection:
    """HTTP by hand: a request for a range, and its bytes received where they belong."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname, parts.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._request = f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: {parts.netloc}\r\nRange: bytes="
        self._head = bytearray(8192)

    def get(self, start: int, out: memoryview) -> None:
        self._socket.sendall(f"{self._request}{start}-{start + len(out) - 1}\r\n\r\n".encode())
        got = end = 0
        while end < 4:
            got += self._receive(memoryview(self._head)[got:])
            end = self._head.find(b"\r\n\r\n", 0, got) + 4
        if not self._head.startswith(b"HTTP/1.1 206"):
            raise ValueError(self._head[:100])
        done = got - end
        out[:done] = self._head[end:got]
        while done < len(out):
            done += self._receive(out[done:], socket.MSG_WAITALL)

    def _receive(self, out: memoryview, flags: int = 0) -> int:
        if got := self._socket.recv_into(out, 0, flags):
            return got
        raise EOFError("the server has closed the connection")


def _presigned(place: Place, key: str) -> str:
    os.environ.update(place.environment())
    url: str = place.client().generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": key})
    return url


def load(meter: Meter, place: Place, model: Model, names: Sequence[str]) -> list[Bytes]:
    """Nothing but receiving: a presigned URL and the places of the bytes are known beforehand."""
    base = len(model.header())
    start, stop = model.stretch(names[0]).start, model.stretch(names[-1]).stop
    return [receive(meter, place, Model.SAFETENSORS, base + start, base + stop)]


def receive(meter: Meter, place: Place, key: str, start: int, stop: int) -> Bytes:
    """Bytes start to stop of an object into fresh memory."""
    url = _presigned(place, key)
    step = min(_RANGE, -(-(stop - start) // CONNECTIONS))
    with measured(meter, place):
        target = fresh_memory(stop - start, huge=False)  # as every client here has it
        out = memoryview(target)

        def connect() -> Callable[[int], None]:
            connection = _Connection(url)
            return lambda number: connection.get(start + number * step, out[number * step :][:step])

        in_threads(CONNECTIONS, -(-len(out) // step), connect)
    return target


def touch(meter: Meter, place: Place, model: Model, touches: Touches) -> list[Bytes]:
    """One connection, one request a piece."""
    url, base = _presigned(place, Model.SAFETENSORS), len(model.header())
    pieces = [np.empty(PIECE, np.uint8) for _ in touches]
    with measured(meter, place):
        connection = _Connection(url)
        for piece, (name, offset) in zip(pieces, touches, strict=True):
            connection.get(base + model.stretch(name).start + offset, memoryview(piece))
    return pieces
