# SPDX-License-Identifier: Apache-2.0
"""One object by ranges over our own connections: which requests are sent, and what becomes of the answers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ..errors import LazymemError, ReadError
from .base import Attempt, Opened
from .checks import (
    changed,
    check_asked,
    check_span,
    check_version,
    condition_of,
    identity_of,
    is_empty,
    parse_length,
    parse_span,
    short,
)
from .connections import Answer, Connections
from .wording import clean


class RangeReader(ABC):
    """Implements `store.base.Reader` over `Connections`; what differs between stores is `_send`."""

    client = "http.client"

    def __init__(self, url: str, connections: Connections) -> None:
        self._url = url
        self._connections = connections
        self._is_closed = False
        connections.acquire()

    @property
    def url(self) -> str:
        return self._url

    @abstractmethod
    def _send(self, method: str, headers: dict[str, str], attempt: Attempt, timeout: float) -> Answer:
        """Send a request for the object. Answers of other statuses than 200, 206, 412 and 416 are raised."""

    def open(self, tail: int, *, timeout: float, attempt: Attempt | None = None) -> Opened:
        attempt = attempt or Attempt()
        wanted = max(tail, 1)  # "-0" is no range
        with self._send("GET", {"Range": f"bytes=-{wanted}"}, attempt, timeout) as answer:
            if answer.status == 206:
                return _cut(self._opened_by_tail(answer, wanted), tail)
            if answer.status == 416 and is_empty(answer.header("content-range")):
                return Opened(0, identity_of(answer.header), b"")
            length = parse_length(answer.header("content-length"))
            if answer.status == 200 and length is not None and length <= wanted:  # all of it, then
                return _cut(Opened(length, identity_of(answer.header), self._body(answer, length)), tail)
        return self._open_by_size(tail, attempt, timeout)

    def _opened_by_tail(self, answer: Answer, wanted: int) -> Opened:
        span = parse_span(answer.header("content-range"))
        if span is None or span.end != span.size or span.begin != max(0, span.size - wanted):
            told = clean(answer.header("content-range") or "none", 60)
            raise ReadError(
                f"{self._url}: the last {wanted} bytes were asked for, but the server sent a range of {told}",
                url=self._url,
            )
        length = answer.header("content-length")
        if length is not None and parse_length(length) != span.end - span.begin:
            raise ReadError(
                f"{self._url}: the server announced {clean(length, 30)} bytes for a range of "
                f"{span.end - span.begin}",
                url=self._url,
            )
        body = self._body(answer, span.end - span.begin)
        return Opened(span.size, identity_of(answer.header), body)

    def _body(self, answer: Answer, length: int) -> bytes:
        out = bytearray(length)
        self._fill(answer, memoryview(out))
        return bytes(out)

    def _fill(self, answer: Answer, out: memoryview) -> None:
        got = answer.read_into(out)
        if got < len(out):
            raise short(self._url, got, len(out))
        if answer.has_more():
            raise ReadError(
                f"{self._url}: the server sent more than the {len(out)} bytes asked for", url=self._url
            )

    def _open_by_size(self, tail: int, attempt: Attempt, timeout: float) -> Opened:
        """For an empty object, and for servers that know no ranges which count from the end."""
        with self._send("HEAD", {}, attempt, timeout) as answer:
            size = parse_length(answer.header("content-length"))
            identity = identity_of(answer.header)
            if answer.status != 200 or size is None:
                raise ReadError(
                    f"{self._url}: the server does not tell its size ({answer.phrase})", url=self._url
                )
        opened = Opened(size, identity, b"")
        wanted = min(max(tail, 1), size)
        if wanted:
            out = bytearray(wanted)
            self.read_into(size - wanted, memoryview(out), opened, attempt, timeout=timeout)
            opened = Opened(size, identity, bytes(out))
        return _cut(opened, tail)

    def read_into(
        self, offset: int, out: memoryview, opened: Opened, attempt: Attempt, *, timeout: float
    ) -> None:
        end = offset + len(out)
        check_asked(self._url, offset, len(out), opened)
        if not out:
            return
        headers = {"Range": f"bytes={offset}-{end - 1}", **condition_of(opened.identity)}
        with self._send("GET", headers, attempt, timeout) as answer:
            if answer.status == 206:
                check_span(self._url, offset, end, opened, answer.header)
            elif answer.status == 200 and (offset, end) == (0, opened.size):
                size = parse_length(answer.header("content-length"))
                check_version(self._url, opened, opened.size if size is None else size, answer.header)
            else:
                raise self._no_range(answer)
            self._fill(answer, out)

    def _no_range(self, answer: Answer) -> LazymemError:
        if answer.status == 412:
            return changed(self._url, "the server has another version")
        if answer.status == 416:
            return changed(self._url, "it is shorter now")
        return ReadError(
            f"{self._url}: the server answers a request for a range with the whole object, so it cannot be "
            "read in place; download it first",
            url=self._url,
        )

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._connections.release()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url!r})"


def _cut(opened: Opened, tail: int) -> Opened:
    """Without the byte that had to be asked for where none was wanted."""
    return opened if tail else Opened(opened.size, opened.identity, b"")
