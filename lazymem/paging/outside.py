# SPDX-License-Identifier: Apache-2.0
"""What a process asks a pager about the memory of another, such as a debugger about what it has stopped."""

from __future__ import annotations

import errno
import json
import os
from contextlib import closing

from ..errors import OptionError, PagerUnavailable
from ..fetcher.client import store_error
from . import wire
from .client import ask, connect
from .wire import Ask


def populate(
    path: str, *, pid: int | None = None, space: int | None = None, address: int = 0, length: int = 0
) -> int:
    """Have the pager at `path` put memory of one of its clients in place; the client may be stopped.

    The process is named by its id, or by its space, which `lazymem pager status` shows. Whole chunks are
    brought, of [address, address + length) or, with length 0, of all that it shows of snapshots. Returns how
    many bytes of the range are in place then: /proc/PID/mem and ptrace, which wait for no page, read them.
    Blocks until all is decoded. Raises `PagerUnavailable`; `OptionError` if nobody has that number; and where
    a chunk cannot be had, after all others are in place, `ReadError`.
    """
    if (pid is None) == (space is None):
        raise OptionError("one process is named, by its id or by its space")
    who = {"pid": pid} if space is None else {"space": space}
    path = os.path.abspath(path)
    with closing(connect(path)) as connection:
        connection.settimeout(None)  # it may be the decoding of a whole model
        question = Ask(wire.POPULATE, 1, address, length, payload=json.dumps(who).encode())
        answer, _ = ask(connection, path, question)
    if answer.code in (-errno.EACCES, -errno.EPROTO):
        raise PagerUnavailable(f"{path}: {answer.text}")
    if answer.code < 0:
        raise store_error(path, answer.code, answer.text)
    return answer.length
