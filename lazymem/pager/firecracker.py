# SPDX-License-Identifier: Apache-2.0
"""The handshake that Firecracker makes when it restores a machine's snapshot with the backend "Uffd".

What it does (src/vmm/src/persist.rs): it maps the guest's memory, makes a userfaultfd with EVENT_REMOVE and
no other feature, registers the memory with it, connects to a Unix stream socket, sends one JSON array of
regions together with the userfaultfd, and never looks at the socket again: some versions close it, others
leave it open. It keeps the userfaultfd, so should the pager die the guest waits and never sees zeros.

A region is {"base_host_virt_addr", "size", "offset", "page_size", "page_size_kib"}, all in bytes, the offset
that of the memory file. Older versions have no "page_size", and before 1.7 there was no page size at all;
"page_size_kib" has been bytes in every version, but other programs go by its name, and no size is both.

The balloon gives memory back by MADV_DONTNEED: such pages are zeros from then on, not the file's.

The memory file is what the guest's addresses show, so the snapshot has to be one of one file: its byte at an
offset is the file's.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from .._native import NativeError
from .._native import pager as native
from ..errors import LazymemError, OptionError
from .access import Peer
from .listening import listen_at
from .server import Halted, Server, Session
from .stock import Stock, Wanted

logger = logging.getLogger("lazymem")

#: The most that a handshake may have: of some 120 bytes a region. Firecracker sends one region or two.
_HANDSHAKE_MAX: Final = 65536
#: How long it may take to arrive.
_PATIENCE: Final = 10.0
_LOOK_SECONDS: Final = 1.0
_PAGES: Final = {4096: 4096, 4: 4096, 2 << 20: 2 << 20, 2048: 2 << 20}


class BadHandshake(Exception):
    """What arrived is no handshake that can be served; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Region:
    """`size` bytes of a process's memory at `address` show the memory file from `offset` on."""

    address: int
    size: int
    offset: int
    page: int


class Firecracker:
    """A socket where machines are restored from one snapshot. server: counts them among its clients, notices
    when they end, and has to be serving."""

    def __init__(self, server: Server, path: str, wanted: Wanted) -> None:
        """Opens the snapshot. Raises as `lazymem.open` does, and `OptionError` if it is of anything else."""
        self.path = os.path.abspath(path)
        self._server = server
        server.talkers["firecracker"] = self.talk
        self._stock = server.stocks.get(wanted)
        self.listener: socket.socket | None = None
        try:
            check_is_one_file(self._stock)
        except BaseException:
            server.stocks.leave(self._stock)
            raise

    def listen(self) -> None:
        """Be at the path, where a pager that was taken over may have been. Raises `PagerUnavailable`."""
        self.listener = self._server.other_listeners.get(self.path)
        if self.listener is None:
            self.listener = listen_at(self.path, socket.SOCK_STREAM, self._server.access.mode)
            self._server.other_listeners[self.path] = self.listener

    def start(self) -> None:
        """`serve`, by a thread of its own."""
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        """Take machines in until the server ends. Blocks."""
        assert self.listener is not None
        self.listener.setblocking(False)
        while not self._server.ending.is_set():
            connection = self._server.accept(self.listener)
            if connection is None:
                continue
            session = Session(Peer.of(connection), connection, protocol="firecracker", stock=self._stock)
            self._server.stocks.use(self._stock)
            if self._server.admit(session):
                self._server.start(session)
            else:
                _complain(session, "this pager has all the clients it may; raise its --max-clients")
                self._server.stocks.leave(self._stock)
                connection.close()

    def talk(self, session: Session) -> None:
        """Take one machine in, of whichever of these sockets: what a session's thread does."""
        connection = session.connection
        assert connection is not None
        uffd: int | None = None
        try:
            self._server.await_handshake(session, _PATIENCE)
        except Halted:
            return  # another pager does, or this one does again
        except TimeoutError:
            _complain(session, f"within {_PATIENCE:.0f} s nothing came")
            self._server.end(session)
            return
        try:
            self._server.access.check_peer(session.peer)
            text, uffd = receive(connection, _PATIENCE)
            assert session.stock is not None
            _map(session, session.stock, parse(text, session.stock.content_size), uffd)
        except (BadHandshake, LazymemError, OSError) as error:
            _complain(session, error)
        finally:
            if uffd is not None:
                os.close(uffd)
            self._server.shaken(session)
            connection.close()
            if session.space is None:
                self._server.end(session)


def _map(session: Session, stock: Stock, regions: Sequence[Region], uffd: int) -> None:
    try:
        space, _ = native.open_space(uffd, agree=False)
    except NativeError as error:
        raise BadHandshake(
            f"the descriptor that came along is no userfaultfd whose handshake was made: {error}"
        ) from None
    try:
        for number, region in enumerate(regions):
            if not native.is_registered(space, region.address, region.size, region.page):
                raise BadHandshake(
                    f"regions[{number}]: {region.size} bytes at {region.address:#x} are not registered "
                    f"with the userfaultfd, or not memory with pages of {region.page} bytes"
                )
            # What the guest does meanwhile is read when all of it is known, and not before.
            more = 0 if region is regions[-1] else native.MORE
            try:
                native.map_memory(
                    space, region.address, region.size, stock.open(), region.offset, region.page,
                    native.ADOPT | native.REMOVED_ZERO | more,
                )  # fmt: skip
            except NativeError as error:
                raise BadHandshake(f"regions[{number}] cannot be served: {error}") from None
    except BaseException:
        native.close_space(space)
        raise
    native.leave_space(space)  # it never looks at the socket again: its memory is for pagers to look after
    session.space = space


def _complain(session: Session, what: object) -> None:
    url = "" if session.stock is None else f"{session.stock.url}: "
    logger.warning("%sprocess %d: %s", url, session.peer.pid, what)


def check_is_one_file(stock: Stock) -> None:
    """Raises `OptionError` for a snapshot whose bytes do not lie as in one file."""
    tables = stock.catalog.tables()
    if list(tables.offsets) != [0] or list(tables.lengths) != [stock.content_size]:
        raise OptionError(
            f"{stock.url}: is not the snapshot of one file, so a guest's addresses mean nothing in it; make "
            "one of the memory file: `lazymem build guest.mem guest.mem.lzm`"
        )


# ---- the handshake ----


def receive(connection: socket.socket, patience: float) -> tuple[bytes, int]:
    """A whole JSON text and the descriptor that came with it, which is the caller's to close.

    Raises `BadHandshake`, OSError. patience: seconds.
    """
    deadline = time.monotonic() + patience
    text, fds = b"", list[int]()
    try:
        while not _is_whole(text):
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                more, some, flags, _ = socket.recv_fds(
                    connection, _HANDSHAKE_MAX + 1 - len(text), 8, socket.MSG_CMSG_CLOEXEC
                )
            except TimeoutError:
                raise BadHandshake(
                    f"within {patience:.0f} s only {len(text)} bytes of a handshake arrived"
                ) from None
            fds += some
            text += more
            if len(fds) > 1 or flags & socket.MSG_CTRUNC:
                raise BadHandshake("several descriptors came along, and only the userfaultfd is wanted")
            if len(text) > _HANDSHAKE_MAX:
                raise BadHandshake(f"a handshake has more than {_HANDSHAKE_MAX} bytes")
            if not more:
                raise BadHandshake(
                    f"the connection ended after {len(text)} bytes, which are no JSON array of regions"
                )
        if not fds:
            raise BadHandshake("regions came, but no userfaultfd with them")
        return text, fds.pop()
    finally:
        for fd in fds:
            os.close(fd)


def _is_whole(text: bytes) -> bool:
    if not text.rstrip().endswith(b"]"):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def parse(text: bytes, content_size: int) -> list[Region]:
    """The regions. Raises `BadHandshake` for what a memory file of `content_size` bytes cannot show."""
    found = json.loads(text)
    if not isinstance(found, list) or not found:
        raise BadHandshake("a handshake names no regions")
    regions = [_region(f"regions[{number}]", one, content_size) for number, one in enumerate(found)]
    placed = sorted(regions, key=lambda region: region.address)
    for one, following in itertools.pairwise(placed):
        if one.address + one.size > following.address:
            raise BadHandshake(f"regions at {one.address:#x} and {following.address:#x} overlap")
    return regions


def _region(name: str, one: Any, content_size: int) -> Region:
    if not isinstance(one, dict):
        raise BadHandshake(f"{name} is not a JSON object")
    address, size, offset = (_number(name, one, field) for field in ("base_host_virt_addr", "size", "offset"))
    page = _page(name, one)
    for field, value in (("base_host_virt_addr", address), ("size", size), ("offset", offset)):
        if value % page:
            raise BadHandshake(f"{name}: {field} is {value}, not a multiple of its pages' {page} bytes")
    if not size:
        raise BadHandshake(f"{name} has no bytes")
    if offset + size > content_size:
        raise BadHandshake(
            f"{name} shows the memory file up to {offset + size}, and the snapshot has {content_size} bytes; "
            "is it this machine's?"
        )
    return Region(address, size, offset, page)


def _number(name: str, one: dict[str, Any], field: str) -> int:
    value = one.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise BadHandshake(f"{name}: {field} is {str(value)[:40]}, not a number of bytes")
    return value


def _page(name: str, one: dict[str, Any]) -> int:
    value = one.get("page_size", one.get("page_size_kib", 4096))
    page = _PAGES.get(value) if isinstance(value, int) else None
    if page is None:
        raise BadHandshake(f"{name}: pages of {str(value)[:40]}; they have 4096 bytes, or 2097152")
    return page
