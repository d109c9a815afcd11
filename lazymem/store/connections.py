# SPDX-License-Identifier: Apache-2.0
"""The lean client for byte ranges: keep-alive connections whose bodies go straight into given memory.

http.client does HTTP/1.1; this adds what it lacks: a pool per host, proxies by environment variable, a
handle to break a request off, and sentences for what went wrong. One request, one attempt: the only thing
repeated is a request on a kept connection that turns out to be dead.

Everything a server says is hostile: http.client limits the lines and headers it takes (64 KiB, 100);
who uses an `Answer` limits the body.
"""

from __future__ import annotations

import contextlib
import http.client
import select
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Final

from ..errors import LazymemError, OptionError, ReadError
from .base import Attempt, Transient
from .dial import dial, shut
from .failures import FAILURES, TunnelRefused, sentence, transient
from .origin import Origin, split_url
from .proxies import Proxy, proxy_for
from .wording import clean

_IDLE_SECONDS: Final = 15.0  # S3 closes a connection after about 20
_IDLE_MOST: Final = 64  # kept connections to one host
_DRAIN_MOST: Final = 64 << 10  # of a body nobody wants, to keep its connection
_STEP: Final = 1 << 20  # how often `Attempt.received` is brought up to date


class _Connection(http.client.HTTPConnection):
    """To one origin, perhaps through a proxy. Connects when told to, not by itself."""

    auto_open = 0
    idle_since = 0.0

    def __init__(self, origin: Origin, proxy: Proxy | None) -> None:
        self.default_port = 443 if origin.scheme == "https" else 80  # which Host does not name
        super().__init__(origin.host, origin.port)
        self.origin = origin
        self.proxy = proxy

    def establish(self, context: Callable[[], ssl.SSLContext], attempt: Attempt, timeout: float) -> None:
        via = self.proxy or self.origin
        self.sock = dial(via.host, via.port, attempt, timeout)
        if self.origin.scheme == "http":
            return
        if self.proxy is not None:
            self._dig_tunnel(self.proxy)
        sock = context().wrap_socket(
            self.sock, server_hostname=self.origin.host, do_handshake_on_connect=False
        )
        self.sock = sock
        attempt.bind(partial(shut, sock))
        sock.do_handshake()

    def _dig_tunnel(self, proxy: Proxy) -> None:
        host = (
            self.origin.host.encode("idna").decode()
            if ":" not in self.origin.host
            else f"[{self.origin.host}]"
        )
        lines = [f"CONNECT {host}:{self.origin.port} HTTP/1.1", f"Host: {host}:{self.origin.port}"]
        lines += [f"{name}: {value}" for name, value in proxy.headers.items()]
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        response = http.client.HTTPResponse(self.sock, method="CONNECT")
        try:
            response.begin()
            if response.status != 200:
                raise TunnelRefused(f"{response.status} {response.reason}")
        finally:
            response.close()  # the socket stays, and nobody speaks in it before we do

    def is_dead(self) -> bool:
        """Whether the kept connection was closed, or says something that nobody asked for."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))


class Answer:
    """One answer: status and headers are there, the body waits. A context manager, to be left in any case.

    origin: who gave it.
    """

    def __init__(
        self, pool: Connections, connection: _Connection, response: http.client.HTTPResponse, shown: str,
        attempt: Attempt, timeout: float,
    ) -> None:  # fmt: skip
        self._pool = pool
        self._connection = connection
        self._response = response
        self._shown = shown
        self._attempt = attempt
        self._timeout = timeout
        self.status = response.status
        self.origin = connection.origin

    def header(self, name: str) -> str | None:
        """None if it is not there. Raises `ReadError` if it is there twice and differs."""
        values = set(self._response.headers.get_all(name) or ())
        if len(values) > 1:
            raise ReadError(
                f"{self._shown}: {self.origin} gives two different values of {name}; the store, or what is "
                "between here and there, is broken",
                url=self._shown,
            )
        return values.pop() if values else None

    @property
    def phrase(self) -> str:
        """The status in words, as the server puts it."""
        return clean(f"{self.status} {self._response.reason}", 80)

    def read_into(self, out: memoryview) -> int:
        """Fill `out` from the body; how many bytes came before it ended. Raises `Transient`."""
        got = 0
        try:
            while got < len(out):
                count = self._response.readinto(out[got : got + _STEP])
                if not count:
                    break
                got += count
                self._attempt.received += count
        except FAILURES as error:
            raise transient(error, self._shown, self.origin, self._attempt, self._timeout) from None
        if self._attempt.aborted:
            raise Transient(f"{self._shown}: the request was broken off")
        return got

    def read(self, most: int) -> bytes:
        """Up to `most` bytes of the body."""
        out = bytearray(most)
        return bytes(out[: self.read_into(memoryview(out))])

    def has_more(self) -> bool:
        """Whether the body goes on after what was read."""
        return not self._response.isclosed() and bool(self.read(1))

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            length = self._response.length
            if exc_type is None and length is not None and length <= _DRAIN_MOST:
                with contextlib.suppress(Transient):
                    self.read(length + 1)  # only a read that meets the end frees the connection
        finally:
            self._attempt.bind(None)  # before the descriptor can become another's
            if self._response.isclosed() and not self._response.will_close and not self._attempt.aborted:
                self._pool.keep(self._connection)
            else:
                self._connection.close()
            self._response.close()


class Connections:
    """Kept connections to any number of hosts, shared by threads.

    context: makes what TLS needs, once, when the first https request is made.
    """

    def __init__(self, context: Callable[[], ssl.SSLContext], environment: Mapping[str, str]) -> None:
        self._make_context = context
        self._environment = environment
        self._lock = threading.Lock()
        self._context: ssl.SSLContext | None = None
        self._kept: dict[Origin, list[_Connection]] = {}
        self._users = 0

    def acquire(self) -> None:
        """Another user; each is to `release` once."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """The last user's leaving closes what is kept."""
        with self._lock:
            self._users -= 1
            idle = [] if self._users else [one for kept in self._kept.values() for one in kept]
            if idle:
                self._kept = {}
        for connection in idle:
            connection.close()

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        shown: str,
        attempt: Attempt,
        timeout: float,
    ) -> Answer:
        """Send a request without a body and wait for the answer's head.

        shown: names the object in messages. timeout: seconds without a byte. Raises `Transient`, `ReadError`
        where the host is not to be trusted, `OptionError` for a URL or proxy that cannot be.
        """
        try:
            origin, target = split_url(url)
        except ValueError as error:
            raise OptionError(f"{shown}: the URL cannot be used: {clean(str(error))}; check it") from None
        proxy = proxy_for(*origin, self._environment)
        sent = {"User-Agent": "lazymem", "Accept-Encoding": "identity", **headers}
        if proxy is not None and origin.scheme == "http":
            target = f"http://{origin}{target}"
            sent.update(proxy.headers)
        kept = self._take(origin)
        try:
            if kept is not None:
                try:
                    return self._exchange(kept, method, target, sent, shown, attempt, timeout)
                except (ConnectionError, http.client.BadStatusLine, ssl.SSLError):
                    if attempt.aborted:
                        raise
                    # The server had closed it, and a request that it did not take may be sent again.
            connection = _Connection(origin, proxy)
            try:
                connection.establish(self._shared_context, attempt, timeout)
            except BaseException:
                attempt.bind(None)
                connection.close()
                raise
            return self._exchange(connection, method, target, sent, shown, attempt, timeout)
        except LazymemError:  # ours, of the certificates; some are OSErrors too
            raise
        except FAILURES as error:
            raise sentence(error, shown, origin, proxy, attempt, timeout) from None

    def _exchange(
        self, connection: _Connection, method: str, target: str, headers: Mapping[str, str], shown: str,
        attempt: Attempt, timeout: float,
    ) -> Answer:  # fmt: skip
        try:
            connection.sock.settimeout(timeout)
            attempt.bind(partial(shut, connection.sock))
            attempt.requests += 1
            connection.request(method, target, headers=headers)
            response = connection.getresponse()
        except BaseException:
            attempt.bind(None)
            connection.close()
            raise
        return Answer(self, connection, response, shown, attempt, timeout)

    def _shared_context(self) -> ssl.SSLContext:
        with self._lock:
            if self._context is None:
                self._context = self._make_context()
            return self._context

    def _take(self, origin: Origin) -> _Connection | None:
        while True:
            with self._lock:
                kept = self._kept.get(origin)
                if not kept:
                    return None
                connection = kept.pop()  # the one used last, so that the others can be found idle
            if time.monotonic() - connection.idle_since < _IDLE_SECONDS and not connection.is_dead():
                return connection
            connection.close()

    def keep(self, connection: _Connection) -> None:
        """Take a connection whose answer was read to its end."""
        connection.idle_since = now = time.monotonic()
        with self._lock:
            kept = self._kept.setdefault(connection.origin, [])
            kept.append(connection)
            old = [one for one in kept[:-1] if now - one.idle_since > _IDLE_SECONDS]
            old += kept[: len(kept) - _IDLE_MOST]
            if not self._users:
                old = list(kept)
            for one in set(old):
                kept.remove(one)
        for one in set(old):
            one.close()
