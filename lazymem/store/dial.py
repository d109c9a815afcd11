# SPDX-License-Identifier: Apache-2.0
"""A TCP connection that can be broken off while it comes to be.

Relies on: shutdown(2) wakes whoever waits for a socket that connects, reads or writes, and what comes after
it fails at once; on a socket that has not begun to connect it does nothing.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Any, Final

from .base import Attempt

_LEAST_WAIT: Final = 1.0  # seconds for one of several addresses of a host


def shut(sock: socket.socket) -> None:
    """Wake whoever waits for the socket, from any thread."""
    with suppress(OSError):
        # Not the method of an SSLSocket: it takes away what the other thread is using.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def dial(host: str, port: int, attempt: Attempt, timeout: float) -> socket.socket:
    """A connected socket, bound to `attempt`.

    timeout: seconds for the look-up and the connection together. Raises `OSError`, `UnicodeError` (a host
    that no name can be); socket.gaierror, a kind of `OSError`, where the look-up failed.
    """
    deadline = time.monotonic() + timeout
    addresses = _look_up(host, port, attempt, timeout)
    failure: OSError = OSError(f"{host} has no address")
    for tried, (family, kind, protocol, _, address) in enumerate(addresses):
        left = deadline - time.monotonic()
        share = max(left / (len(addresses) - tried), min(left, _LEAST_WAIT))
        if share <= 0 or attempt.aborted:
            break
        sock = socket.socket(family, kind, protocol)
        try:
            _connect(sock, address, attempt, share)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(timeout)
            return sock
        except OSError as error:
            failure = error
            attempt.bind(None)
            sock.close()
        except BaseException:
            attempt.bind(None)
            sock.close()
            raise
    raise failure


def _connect(sock: socket.socket, address: Any, attempt: Attempt, timeout: float) -> None:
    sock.setblocking(False)
    with suppress(BlockingIOError):
        sock.connect(address)
    attempt.bind(partial(shut, sock))  # not earlier: see above
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    if not poll.poll(timeout * 1000):
        raise TimeoutError("timed out")
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))
    if attempt.aborted:
        raise ConnectionAbortedError("broken off")


def _look_up(host: str, port: int, attempt: Attempt, timeout: float) -> list[Any]:
    """The host's addresses. A resolver may hang for half a minute and cannot be interrupted, so it is asked
    on a thread of its own, which is left behind if need be."""
    with suppress(socket.gaierror):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    host.encode("idna")  # what getaddrinfo does, but where its UnicodeError reaches the caller
    answers: queue.SimpleQueue[list[Any] | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except OSError as error:
            answers.put(error)

    threading.Thread(target=ask, name="lazymem-resolver", daemon=True).start()
    attempt.bind(partial(answers.put, ConnectionAbortedError("broken off")))
    try:
        answer = answers.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError("the look-up of the name timed out") from None
    finally:
        attempt.bind(None)
    if isinstance(answer, OSError):
        raise answer
    return answer
