# SPDX-License-Identifier: Apache-2.0
"""The *estate* of a pager that has died: address spaces that nobody but a pager looks after. Those are
children of forks, restored machines, and clients that have gone from the socket but not from their memory.

While a pager lives it leaves word of each: a ledger (ledger.h), written by the core, and for each snapshot
what it was asked for, both in files in memory. Its twin, which has the same descriptors, outlives it and
listens at `SOCKET.estate-*`. Whoever connects there is sent each descriptor with the number that it had, a
packet each, then -1; and answers with the numbers that are in good hands now, and -1. What is not, the twin
keeps, for the pager after that.

A client with a connection has its userfaultfd, and comes by itself; what is known of its memory awaits it.
"""

from __future__ import annotations

import errno
import glob
import json
import logging
import os
import secrets
import socket
import struct
from collections.abc import Callable, Mapping
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
                if os.stat(path).st_uid not in (0, os.geteuid()):
                    continue  # somebody else's, who could have us wait
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


@dataclass(frozen=True, slots=True)
class _File:
    """number: that it had in the pager that died."""

    number: int
    fd: int


@dataclass
class _Left:
    """What came: userfaultfds by their inodes, ledgers with their files, what was asked for."""

    uffds: dict[int, _File] = field(default_factory=dict)
    ledgers: list[tuple[_File, list[native.Ledger]]] = field(default_factory=list)
    wanted: dict[int, Wanted] = field(default_factory=dict)

    def spaces(self) -> dict[int, native.Ledger]:
        """The ledger that counts, for each userfaultfd by its inode."""
        found: dict[int, native.Ledger] = {}
        every = (one for _, ledgers in self.ledgers for one in ledgers)
        for one in sorted(every, key=lambda ledger: (ledger.inode != 0, ledger.begun_ns)):
            inode = self.inode_of(one)  # a child's own ledger, if it has one, comes later
            if inode is not None:
                found[inode] = one
        return found

    def inode_of(self, ledger: native.Ledger) -> int | None:
        numbered = (inode for inode, uffd in self.uffds.items() if uffd.number == ledger.uffd)
        return ledger.inode or next(numbered, None)


def _take(server: Server, connection: socket.socket) -> None:
    with ExitStack() as stack:
        left = _receive(connection, stack)
        if not left.ledgers:
            return
        spaces = left.spaces()
        ours = {
            inode: one for inode, one in spaces.items() if one.features & native.LEFT and inode in left.uffds
        }
        stocks: dict[int, Stock] = {}
        for serial in {part.serial for one in ours.values() for part in one.parts} & left.wanted.keys():
            try:
                stocks[serial] = server.stocks.get(left.wanted[serial])
            except LazymemError as error:
                logger.warning("memory that another pager served cannot be served: %s", error)
            else:
                stack.callback(server.stocks.leave, stocks[serial])
        native.stop()  # until the twin has let go, nobody is to read what only one may read
        try:
            done = _restore(left, ours, stocks)
            done |= _know(server, left, done)
            for number in (*done, _END):
                connection.sendall(_NUMBER.pack(number))
            connection.recv(1)  # it has closed them
        finally:
            native.start(server.core_threads)


def _know(server: Server, left: _Left, done: set[int]) -> set[int]:
    """Keep what is known of clients with connections until they come. The numbers of files that are ours."""
    ours: set[int] = set()
    for file, (one, *children) in left.ledgers:
        if one.features & native.LEFT:
            continue
        before = server.known.get(one.inode)
        if before is not None and before[0].begun_ns > one.begun_ns:
            ours.add(file.number)
            continue
        inodes = map(left.inode_of, children)
        kept = None
        if all(inode not in left.uffds or left.uffds[inode].number in done for inode in inodes):
            native.settle_ledger(file.fd)
            kept = os.dup(file.fd)  # should this pager die before the client comes, the next one finds it
            ours.add(file.number)
        if before is not None and before[1] is not None:
            os.close(before[1])
        server.known[one.inode] = one, kept
    return ours


def _receive(connection: socket.socket, stack: ExitStack) -> _Left:
    left = _Left()
    while True:
        try:
            packet, fds, flags, _ = socket.recv_fds(connection, _NUMBER.size, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return left  # its twin had nothing, and has ended
        for fd in fds:
            stack.callback(os.close, fd)
        if flags & socket.MSG_CTRUNC:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        if len(packet) != _NUMBER.size or not fds:
            return left
        (number,) = _NUMBER.unpack(packet)
        if not os.readlink(f"/proc/self/fd/{fds[0]}").startswith("/memfd:"):
            left.uffds[os.fstat(fds[0]).st_ino] = _File(number, fds[0])
            continue
        data = os.pread(fds[0], os.fstat(fds[0]).st_size, 0)
        with suppress(ValueError, KeyError, TypeError, NativeError):  # or it was not finished
            if data.startswith(b"{"):
                told = json.loads(data)
                left.wanted[told["serial"]] = Wanted.told(told["wanted"])
            else:
                left.ledgers.append((_File(number, fds[0]), native.read_ledger(data)))


def _restore(left: _Left, spaces: Mapping[int, native.Ledger], stocks: Mapping[int, Stock]) -> set[int]:
    """The numbers of the userfaultfds whose spaces are served now."""
    restored: list[tuple[native.Ledger, int]] = []
    renamed: dict[int, int] = {}
    done: set[int] = set()
    for inode, one in spaces.items():
        uffd = left.uffds[inode]
        if not _is_served(uffd.fd):
            if not all(part.serial in stocks for part in one.parts):
                continue
            try:
                number = restore_space(uffd.fd, one.parts, lambda serial: stocks[serial].open())
            except (LazymemError, NativeError) as error:
                logger.warning("an address space that another pager had left cannot be served: %s", error)
                continue
            restored.append((one, number))
            if one.space:
                renamed[one.space] = number
        done.add(uffd.number)
    for one, number in restored:
        native.resume_space(number, renamed.get(one.parent, 0), one.features)
    return done


def _is_served(uffd: int) -> bool:
    """By this pager: two twins had it, as one pager died before the other's twin had let go."""
    try:
        space = native.claim_space(uffd)
    except NativeError:
        return True
    if space is not None:
        native.leave_space(space)
    return space is not None
