# SPDX-License-Identifier: Apache-2.0
"""The pager's control plane: connections in, snapshots and memory to the core. One thread a connection.

A client is believed nothing: packets are checked (`wire`), ranges by the core. What it does to its own memory
can harm it alone.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from .._native import CODES, NativeError
from .._native import pager as native
from ..errors import OF_CODE, AccessDenied, LazymemError, OutOfMemory, PagerUnavailable
from ..paging import wire
from ..paging.wire import Answer, Ask
from .access import Access, Peer
from .stock import Stock, Stocks, Wanted

logger = logging.getLogger("lazymem")

_SWEEP_SECONDS: Final = 1.0
_MAPS_MOST: Final = 1024  # of one client
_CODE_OF: Final = {kind: code for code, name in CODES.items() if (kind := OF_CODE.get(name)) is not None}


@dataclass(frozen=True, slots=True)
class Limits:
    """clients: connections at a time. memory: see `Stocks`."""

    clients: int = 1024
    memory: int | None = None


@dataclass(eq=False)
class Session:
    """One client: its connection, what it has open, where it is shown."""

    peer: Peer
    connection: socket.socket | None
    protocol: str = "lazymem"
    stock: Stock | None = None
    space: int | None = None
    maps: int = 0
    since: float = field(default_factory=time.time)


class Server:
    """A pager at one socket. passes_device: clients may have a descriptor of /dev/userfaultfd."""

    def __init__(
        self,
        path: str,
        access: Access,
        limits: Limits,
        *,
        threads: int | None = None,
        passes_device: bool = False,
    ) -> None:
        self.path = os.path.abspath(path)
        self.access = access
        self.stocks = Stocks(limits.memory, threads)
        self._limits = limits
        self._passes_device = passes_device
        self._lock = threading.Lock()
        self.sessions: set[Session] = set()
        self.listener: socket.socket | None = None
        self.ending = threading.Event()
        self._handlers: dict[int, Callable[[Session, Ask, int | None], tuple[Answer, int | None]]] = {
            wire.HELLO: self._hello,
            wire.OPEN: self._open,
            wire.MAP: self._map,
            wire.PREFETCH: self._prefetch,
            wire.WHY: self._why,
            wire.STATUS: self._status,
        }

    # ---- listen ----

    def listen(self) -> None:
        """Be at the path. Raises `PagerUnavailable` if another pager is there."""
        with suppress(FileNotFoundError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
            try:
                other.connect(self.path)
            except ConnectionRefusedError:
                os.unlink(self.path)  # what a pager that died has left
            except OSError as error:
                if error.errno == errno.EPROTOTYPE:
                    raise PagerUnavailable(
                        f"{self.path}: is somebody else's socket; name another path"
                    ) from None
                if error.errno != errno.ENOENT:
                    raise PagerUnavailable(f"{self.path}: cannot listen there: {error.strerror}") from error
            else:
                raise PagerUnavailable(
                    f"{self.path}: a pager listens there already; --take-over takes its clients over"
                )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            before = os.umask(0o777 & ~self.access.mode)
            try:
                listener.bind(self.path)
            finally:
                os.umask(before)
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise PagerUnavailable(f"{self.path}: cannot listen there: {error.strerror}") from error
        self.listener = listener

    def serve(self) -> None:
        """Take clients in until `ending` is set. Blocks."""
        assert self.listener is not None
        self.listener.settimeout(_SWEEP_SECONDS)
        while not self.ending.is_set():
            try:
                connection, _ = self.listener.accept()
            except TimeoutError:
                self._sweep()
                continue
            except OSError as error:
                if self.ending.is_set():
                    return
                logger.warning("a client could not be taken in: %s", error)
                time.sleep(0.05)
                continue
            self._take_in(connection)
            self._sweep()

    def _take_in(self, connection: socket.socket) -> None:
        session = Session(Peer.of(connection), connection)
        with self._lock:
            full = len(self.sessions) >= self._limits.clients
            if not full:
                self.sessions.add(session)
        if full:
            with suppress(OSError):
                wire.send(
                    connection, wire.failed(0, errno.EUSERS, "this pager has all the clients it may").pack()
                )
            connection.close()
            return
        self.start(session)

    def start(self, session: Session) -> None:
        """Serve a session by a thread of its own."""
        with self._lock:
            self.sessions.add(session)
        threading.Thread(target=self.talk, args=(session,), daemon=True).start()

    _swept = 0.0

    def _sweep(self) -> None:
        if time.monotonic() - self._swept > _SWEEP_SECONDS:
            self._swept = time.monotonic()
            self.stocks.sweep()

    # ---- one client ----

    def talk(self, session: Session) -> None:
        """Answer a client until it ends."""
        assert session.connection is not None
        session.connection.settimeout(None)
        try:
            while self._answer_one(session, session.connection):
                pass
        except OSError as error:
            logger.info("client %d: %s", session.peer.pid, error)
        finally:
            self.end(session)

    def end(self, session: Session) -> None:
        """Its connection has ended; its memory need not have."""
        with self._lock:
            self.sessions.discard(session)
        if session.space is not None:
            native.leave_space(session.space)
        if session.stock is not None:
            self.stocks.leave(session.stock)
        if session.connection is not None:
            session.connection.close()

    def _answer_one(self, session: Session, connection: socket.socket) -> bool:
        descriptor: int | None = None
        sent: int | None = None
        asked = 0
        try:
            packet, descriptor = wire.receive(connection)
            if not packet:
                return False
            ask = wire.unpack_ask(packet)
            asked = ask.id
            self.access.check_peer(session.peer)
            if ask.kind == wire.TAKE_OVER:
                from .handover import give

                give(self, session, ask)
                return False
            handler = self._handlers.get(ask.kind)
            if handler is None:
                raise wire.BadPacket(f"a packet asks for {ask.kind}, which this version does not know")
            answer, sent = handler(session, ask, descriptor)
        except wire.BadPacket as error:
            answer = wire.failed(asked, errno.EPROTO, str(error))
        except LazymemError as error:
            answer = wire.failed(asked, _code_of(error), str(error))
        except NativeError as error:
            answer = wire.failed(asked, error.code, str(error))
        finally:
            if descriptor is not None:
                os.close(descriptor)
        try:
            wire.send(connection, answer.pack(), sent)
        finally:
            if sent is not None:
                os.close(sent)
        return answer.code not in (-errno.EPROTO, -errno.EACCES)

    def _hello(self, session: Session, ask: Ask, _: int | None) -> tuple[Answer, int | None]:
        device = None
        if ask.flags & native.WANT_DEVICE and self._passes_device:
            with suppress(OSError):
                device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        return Answer(ask.id, flags=native.FOLLOWS_FORK if _may_follow_forks() else 0), device

    def _open(self, session: Session, ask: Ask, _: int | None) -> tuple[Answer, int | None]:
        if session.stock is not None:
            raise wire.BadPacket("a connection opens one snapshot; make another connection")
        wanted = Wanted.of(wire.json_of(ask.payload))
        self.access.check_snapshot(session.peer, wanted.location)
        session.stock = self.stocks.get(wanted)
        memory = session.stock.open()
        answer = Answer(
            ask.id, length=memory.size, content=session.stock.content_size, page=memory.chunk_size
        )
        return answer, native.memory_descriptor(memory)

    def _map(self, session: Session, ask: Ask, descriptor: int | None) -> tuple[Answer, int | None]:
        if session.stock is None:
            raise wire.BadPacket("MAP comes after OPEN")
        if session.space is None and descriptor is None:
            raise wire.BadPacket("the first MAP brings a userfaultfd")
        if session.space is not None and descriptor is not None:
            raise wire.BadPacket("a connection is for one userfaultfd; make another connection")
        session.maps += 1
        if session.maps > _MAPS_MOST:
            raise wire.BadPacket(f"a connection maps at most {_MAPS_MOST} ranges")
        if descriptor is not None:
            session.space, _ = native.open_space(descriptor, agree=not ask.flags & native.ADOPT)
        assert session.space is not None
        flags = ask.flags & (native.SHARED | native.REMOVED_ZERO | native.ADOPT | native.MORE)
        native.map_memory(
            session.space, ask.address, ask.length, session.stock.open(), ask.offset, ask.page or 4096, flags
        )
        return Answer(ask.id), None

    def _stock_of(self, session: Session) -> Stock:
        if session.stock is None:
            raise wire.BadPacket("this question comes after OPEN")
        return session.stock

    def _prefetch(self, session: Session, ask: Ask, _: int | None) -> tuple[Answer, int | None]:
        stock = self._stock_of(session)
        try:
            stock.prefetch(ask.offset, ask.length, wait=bool(ask.flags & native.WAIT))
        except NativeError as error:
            begin = (error.chunk or 0) * stock.open().chunk_size
            failed = wire.failed(ask.id, error.code, str(error))
            return Answer(ask.id, content=begin, code=failed.code, payload=failed.payload), None
        return Answer(ask.id), None

    def _why(self, session: Session, ask: Ask, _: int | None) -> tuple[Answer, int | None]:
        return Answer(ask.id, payload=self._stock_of(session).why(ask.offset).encode()), None

    def _status(self, session: Session, ask: Ask, _: int | None) -> tuple[Answer, int | None]:
        if not self.access.is_ours(session.peer):
            raise AccessDenied("a pager's status is for its own user and root", url="pager")
        return Answer(ask.id), in_memory(json.dumps(self.status()).encode())

    def status(self) -> dict[str, Any]:
        """What `lazymem pager status --json` prints."""
        with self._lock:
            sessions = [one for one in self.sessions if one.stock is not None]
        stocks = self.stocks.by_serial()
        by_space = {one.space: one for one in sessions if one.space is not None}
        spaces = native.spaces()
        return {
            "pid": os.getpid(),
            "socket": self.path,
            "clients": len(by_space),
            "waiting": sum(one.waiting for one in spaces),
            "faults": sum(one.faults for one in spaces),
            "latency": _summed(one.latency for one in spaces),
            "snapshots": [_describe_stock(one) for one in stocks.values()],
            "spaces": [_describe_space(one, by_space.get(one.space)) for one in spaces],
        }


def in_memory(data: bytes) -> int:
    """A memfd that holds `data`, at its beginning."""
    fd = os.memfd_create("lazymem-status", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _describe_stock(stock: Stock) -> dict[str, Any]:
    memory = stock.open()
    stats = memory.stats()
    fd = native.memory_descriptor(memory)
    try:
        resident = os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)
    return {
        "url": stock.url, "bytes": memory.size, "resident": resident, "spaces": native.users(memory),
        "chunks_demand": stats.chunks_demand, "chunks_prefetch": stats.chunks_prefetch,
        "chunks_failed": stats.chunks_failed, "bytes_read": stats.bytes_read,
    }  # fmt: skip


def _describe_space(one: native.SpaceReport, session: Session | None) -> dict[str, Any]:
    client = None
    if session is not None:
        client = {"pid": session.peer.pid, "uid": session.peer.uid, "protocol": session.protocol,
                  "since": session.since, "url": session.stock.url if session.stock else None}  # fmt: skip
    return {
        "space": one.space, "parent": one.parent or None, "client": client, "follows_fork": one.follows_fork,
        "mapped": one.mapped, "pieces": one.pieces, "served": one.served, "faults": one.faults,
        "waiting": one.waiting, "failed": one.failed, "latency": list(one.latency),
    }  # fmt: skip


def _summed(histograms: Any) -> list[int]:
    return [sum(column) for column in itertools.zip_longest(*histograms, fillvalue=0)]


def _code_of(error: LazymemError) -> int:
    if isinstance(error, OutOfMemory):
        return -errno.ENOMEM
    if isinstance(error, AccessDenied) and error.url == "pager":
        return -errno.EACCES
    for kind in type(error).__mro__:
        if kind in _CODE_OF and kind is not LazymemError:
            return _CODE_OF[kind]
    return -errno.EIO


def _may_follow_forks() -> bool:
    """Whether the kernel lets this process have EVENT_FORK: CAP_SYS_PTRACE."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            effective = next(line for line in status if line.startswith("CapEff:"))
    except (OSError, StopIteration):
        return False
    return bool(int(effective.split()[1], 16) >> 19 & 1)
