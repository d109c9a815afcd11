# SPDX-License-Identifier: Apache-2.0
"""The *estate* of a pager that has died: address spaces that nobody but a pager looks after. Those are
children of forks, restored machines, and clients that have gone from the socket but not from their memory.

While a pager lives it leaves word of each: a ledger (ledger.h), written by the core, and for each snapshot
what it was asked for, both in files in memory. Its twin, which has the same descriptors, outlives it and
listens at `SOCKET.estate-*`. Whoever connects there is sent each descriptor with the number that it had, a
packet each, then -1; and answers with the numbers that are in good hands now, and -1. What is not, the twin
keeps, for the pager after that.

A client with a connection has its userfaultfd, and comes by itself.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Final

from .._native import NativeError
from .._native import pager as native
from ..errors import LazymemError, PagerUnavailable
from .access import Peer
from .listening import listen_at
from .mapping import restore_space
from .server import Server
from .stock import Stock, Wanted

logger = logging.getLogger("lazymem")

_NUMBER: Final = struct.Struct("=i")
_END: Final = -1
#: Seconds that a twin may take for a packet: it may still be waiting for its pager's end.
_PATIENCE: Final = 30.0


def bequeath(path: str) -> Callable[[], None]:
    """Have this process's twin listen for the next pager, should this one die; call the result at its end."""
    place = f"{path}.estate-{secrets.token_hex(3)}"
    try:
        listener = listen_at(place, socket.SOCK_SEQPACKET, 0o600)
    except PagerUnavailable as error:
        logger.warning("should this pager die, no other finds its clients' children: %s", error)
        return lambda: None
    native.bequeath(listener.detach())  # never closed: it is the twin's

    def end() -> None:
        if not native.spaces():  # else the twin takes it away when it ends
            with suppress(OSError):
                os.unlink(place)

    return end


def take_estates(server: Server) -> None:
    """Serve what pagers that listened at the server's path have left. Blocks while it opens their snapshots.

    To be called before clients are taken in, and once nobody else can be the pager there. What cannot be had
    is left where it is, and a line says so.
    """
    for path in sorted(glob.glob(f"{glob.escape(server.path)}.estate-*")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            try:
                connection.settimeout(_PATIENCE)
                connection.connect(path)
            except ConnectionRefusedError:  # its twin has died, too
                with suppress(OSError):
                    os.unlink(path)
                continue
            except OSError:
                continue
            try:
                if server.access.is_ours(Peer.of(connection)):
                    _take(server, connection)
            except OSError as error:
                logger.warning("%s: what a pager has left cannot be had: %s", path, error)


@dataclass
class _Left:
    """What came: userfaultfds by the number that they had, and what the files say."""

    uffds: dict[int, int] = field(default_factory=dict)
    ledgers: list[native.Ledger] = field(default_factory=list)
    wanted: dict[int, Wanted] = field(default_factory=dict)

    def spaces(self) -> list[native.Ledger]:
        """Those that nobody else looks after, each once."""
        found: dict[int, native.Ledger] = {}
        for one in sorted(self.ledgers, key=lambda ledger: (not ledger.is_child, ledger.generation)):
            if one.uffd in self.uffds:  # by the last one that counts
                found[one.uffd] = one
        return [one for one in found.values() if one.features & native.LEFT]


def _take(server: Server, connection: socket.socket) -> None:
    with ExitStack() as stack:
        left = _receive(connection, stack)
        spaces = left.spaces()
        if not spaces:
            return
        stocks: dict[int, Stock] = {}
        for serial in {part.serial for one in spaces for part in one.parts}:
            with suppress(KeyError):
                try:
                    stocks[serial] = server.stocks.get(left.wanted[serial])
                except LazymemError as error:
                    logger.warning("memory that another pager served cannot be served: %s", error)
                else:
                    stack.callback(server.stocks.leave, stocks[serial])
        native.stop()  # until the twin has let go, nobody is to read what only one may read
        try:
            taken = _restore(left, spaces, stocks)
            for number in (*taken, _END):
                connection.sendall(_NUMBER.pack(number))
            connection.recv(1)  # it has closed them
        finally:
            native.start(server.core_threads)
        logger.info("%d address spaces that another pager had left are served", len(taken))


def _receive(connection: socket.socket, stack: ExitStack) -> _Left:
    left = _Left()
    while True:
        try:
            packet, fds, _, _ = socket.recv_fds(connection, _NUMBER.size, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return left  # its twin had nothing, and has ended
        for fd in fds:
            stack.callback(os.close, fd)
        if len(packet) != _NUMBER.size or not fds:
            return left
        (number,) = _NUMBER.unpack(packet)
        if not os.readlink(f"/proc/self/fd/{fds[0]}").startswith("/memfd:"):
            left.uffds[number] = fds[0]
            continue
        data = os.pread(fds[0], os.fstat(fds[0]).st_size, 0)
        with suppress(ValueError, KeyError, TypeError, NativeError):  # or it was not finished
            if data.startswith(b"{"):
                told = json.loads(data)
                left.wanted[told["serial"]] = Wanted.told(told["wanted"])
            else:
                left.ledgers += native.read_ledger(data)


def _restore(left: _Left, spaces: Iterable[native.Ledger], stocks: dict[int, Stock]) -> list[int]:
    """The numbers of the userfaultfds whose spaces are served now."""
    restored: list[tuple[native.Ledger, int]] = []
    renamed: dict[int, int] = {}
    served: list[int] = []
    for one in spaces:
        try:
            if _is_served(left.uffds[one.uffd]):
                served.append(one.uffd)
                continue
            parts = [
                (part.address, part.length, part.offset, stocks[part.serial].open(), part.page, part.flags)
                for part in one.parts
            ]
            number = restore_space(left.uffds[one.uffd], parts)
        except (KeyError, NativeError) as error:
            if not isinstance(error, KeyError):
                logger.warning("an address space that another pager had left cannot be served: %s", error)
            continue
        restored.append((one, number))
        if one.space:
            renamed[one.space] = number
    for one, number in restored:
        native.resume_space(number, renamed.get(one.parent, 0), one.features)
    return served + [one.uffd for one, _ in restored]


def _is_served(uffd: int) -> bool:
    """By this pager: two twins had it, as one pager died before the other's twin had let go."""
    try:
        space = native.claim_space(uffd)
    except NativeError:
        return True
    if space is not None:
        native.leave_space(space)
    return space is not None
