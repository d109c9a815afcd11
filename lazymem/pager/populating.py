# SPDX-License-Identifier: Apache-2.0
"""Memory of a client put in place from outside, for a debugger: the kernel has /proc/PID/mem and ptrace wait
for no page. No thread of the client need run, so it may be stopped."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from .._native import NativeError
from .._native import pager as native
from ..errors import AccessDenied, OptionError
from ..paging import wire
from ..paging.wire import Answer, Ask

if TYPE_CHECKING:
    from .server import Server, Session

_ADDRESSES = 1 << 64


def populate(server: Server, session: Session, ask: Ask) -> Answer:
    """Answers POPULATE. Blocks until the chunks are decoded.

    Raises `BadPacket`; `OptionError` where nobody has that number, `AccessDenied` where it is another user's.
    """
    end = min(ask.address + ask.length, _ADDRESSES - 1) if ask.length else _ADDRESSES - 1
    in_place, failure = 0, None
    for space in _spaces_of(server, session, ask):
        reason = _decode(server, space, ask.address, end)
        failure = failure or reason
        try:
            in_place += native.populate(space, ask.address, end - ask.address)
        except NativeError as error:
            if error.code == -errno.EAGAIN:
                failure = failure or (error.code, f"space {space} keeps changing its memory; ask again")
            elif error.code != -errno.ESRCH:  # its process has just ended
                raise
    if failure is not None:
        code, sentence = failure
        failed = wire.failed(ask.id, code, sentence)
        return Answer(ask.id, length=in_place, code=failed.code, payload=failed.payload)
    return Answer(ask.id, length=in_place)


def _spaces_of(server: Server, session: Session, ask: Ask) -> list[int]:
    wanted = wire.json_of(ask.payload)
    by_space = server.clients()
    reports = {one.space: one for one in native.spaces()}
    kind, number = next(((kind, wanted.get(kind)) for kind in ("pid", "space") if kind in wanted), ("pid", 0))
    if not isinstance(number, int) or isinstance(number, bool):
        raise wire.BadPacket(f"a question's {kind!r} is not a whole number")
    if kind == "space":
        found = [number] if number in reports else []
    else:
        found = [space for space, client in by_space.items() if client.peer.pid == number]
    for space in found:
        first = space
        while first not in by_space and first in reports and reports[first].parent:
            first = reports[first].parent  # a child of a fork belongs to whom its parent does
        owner = by_space.get(first)
        if not server.access.is_ours(session.peer) and (owner is None or owner.peer.uid != session.peer.uid):
            raise AccessDenied(f"{kind} {number} is another user's", url="pager")
    if not found:
        raise OptionError(
            f"this pager has no client with process id {number}; a child of a fork is known by its space "
            "alone: `lazymem pager status`"
            if kind == "pid"
            else f"this pager has no space {number}; `lazymem pager status` lists them"
        )
    return found


def _decode(server: Server, space: int, start: int, end: int) -> tuple[int, str] | None:
    """Have all chunks that the space shows there decoded: None, or what `Stock.prefetch_all` says."""
    failure = None
    for part in native.parts(space):
        first, last = max(part.address, start), min(part.address + part.length, end)
        if first >= last or part.flags & native.IS_ZERO:
            continue
        with server.stocks.held(part.serial) as stock:
            if stock is None:
                continue  # the process has just ended
            failure = stock.prefetch_all(part.offset + (first - part.address), last - first) or failure
    return failure
