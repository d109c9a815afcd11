# SPDX-License-Identifier: Apache-2.0
"""Unix sockets with a path: one pager at a path, and what a dead one left there is no obstacle."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress

from ..errors import PagerUnavailable


def listen_at(path: str, kind: socket.SocketKind, mode: int) -> socket.socket:
    """A listening socket of that kind; mode: who may connect, as of a file.

    Raises `PagerUnavailable` if another pager is there, or the path is no place for a socket.
    """
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
