# SPDX-License-Identifier: Apache-2.0
"""Unix sockets with a path: one pager at a path, and what a dead one left there is no obstacle."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from ..errors import PagerUnavailable

_TURN_SECONDS: Final = 2.0


def listen_at(path: str, kind: socket.SocketKind, mode: int) -> socket.socket:
    """A listening socket of that kind; mode: who may connect, as of a file.

    Raises `PagerUnavailable` if another pager is there, or the path is no place for a socket.
    """
    with _turn_at(path):
        _make_room(path, kind)
        return _bound(path, kind, mode)


@contextmanager
def _turn_at(path: str) -> Iterator[None]:
    """Nobody else looks, in that folder, who listens: what one has bound, and does not listen at yet, another
    would take for what a dead one has left, and take it away.

    As far as it goes: the folder may not be ours to read, and somebody may hold its lock for long.
    """
    try:
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        end = time.monotonic() + _TURN_SECONDS
        while time.monotonic() < end:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        yield
    finally:
        os.close(folder)


def _make_room(path: str, kind: socket.SocketKind) -> None:
    with suppress(FileNotFoundError), socket.socket(socket.AF_UNIX, kind) as other:
        try:
            other.connect(path)
        except ConnectionRefusedError as error:
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise PagerUnavailable(f"{path}: is no socket; name another path") from error
            os.unlink(path)  # what a pager that died has left
        except OSError as error:
            if error.errno == errno.EPROTOTYPE:
                raise PagerUnavailable(f"{path}: is somebody else's socket; name another path") from None
            if error.errno != errno.ENOENT:
                raise PagerUnavailable(f"{path}: cannot listen there: {error.strerror or error}") from error
        else:
            raise PagerUnavailable(
                f"{path}: a pager listens there already; --take-over takes its clients over"
            )


def _bound(path: str, kind: socket.SocketKind, mode: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, kind)
    try:
        before = os.umask(0o777 & ~mode)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise PagerUnavailable(f"{path}: cannot listen there: {error.strerror or error}") from error
    return listener
