# SPDX-License-Identifier: Apache-2.0
"""The pager's control plane: connections in, snapshots and memory to the core. One thread a connection.

A client is believed nothing: packets are checked (`wire`), ranges by the core. What it does to its own memory
can harm it alone.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

from .._native import CODES, NativeError
from .._native import pager as native
from ..errors import OF_CODE, AccessDenied, LazymemError, OutOfMemory, PagerUnavailable
from ..paging import wire
from ..paging.wire import Answer, Ask
from .access import Access, Peer
from .files import in_memory
from .listening import listen_at
from .mapping import Known, adopt_space, map_memory, open_space
from .populating import populate
from .status import status_of
from .stock import Stock, Stocks, Wanted

logger = logging.getLogger("lazymem")

_SWEEP_SECONDS: Final = 1.0
_MAPS_MOST: Final = 1024  # of one client
_REFUSED_MOST: Final = 64  # connections that are being told that there is no room
_CODE_OF: Final = {kind: code for code, name in CODES.items() if (kind := OF_CODE.get(name)) is not None}


@dataclass(frozen=True, slots=True)
class Limits:
    """clients: connections at a time. memory: see `Stocks`."""

    clients: int = 1024
    memory: int | None = None


@dataclass(eq=False)
class Session:
    """One client: its connection, what it has open, where it is shown. connection: None where a client's ends
    while its memory is served (`firecracker`): it counts until its space is gone."""

    peer: Peer
    connection: socket.socket | None
    protocol: str = "lazymem"
    stock: Stock | None = None
    space: int | None = None
    maps: int = 0
    since: float = field(default_factory=time.time)
    #: Its space was served before it came.
    claimed: bool = False
    #: What it asked and has no answer to yet. Under the server's lock, like the next three.
    asked: Ask | None = None
    #: There was no room for it; it is told so.
    refused: bool = False
    #: A handover is under way: the answer is another pager's to give.
    handed: bool = False
    #: It has no thread; `Server.resume` gives it one.
    parked: bool = False


class Halted(Exception):
    """A handover begins."""


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
        self.core_threads = threads or 0
        self._limits = limits
        self._passes_device = passes_device
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._halted = False
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # readable: look at _halted and ending
        self.sessions: set[Session] = set()
        #: Of clients that have not come yet to this pager, but were another's that died.
        self.known: Known = {}
        self.listener: socket.socket | None = None
        self._place: tuple[int, int] | None = None  # device and inode of our socket
        self.ending = threading.Event()
        #: Other sockets that listen, by their paths: a handover takes them along, and leaves them here.
        self.other_listeners: dict[str, socket.socket] = {}
        #: What a session's thread does, by the session's protocol.
        self.talkers: dict[str, Callable[[Session], None]] = {"lazymem": self.talk}
        self._handlers: dict[int, Callable[[Session, Ask, int | None], tuple[Answer, int | None]]] = {
            wire.HELLO: self._hello,
            wire.OPEN: self._open,
            wire.MAP: self._map,
            wire.PREFETCH: self._prefetch,
            wire.WHY: self._why,
            wire.STATUS: self._status,
            wire.POPULATE: self._populate,
        }

    # ---- listen ----

    def listen(self) -> None:
        """Be at the path. Raises `PagerUnavailable` if another pager is there."""
        self.listen_by(listen_at(self.path, socket.SOCK_SEQPACKET, self.access.mode))

    def listen_by(self, listener: socket.socket) -> None:
        """Be at the path by a socket that is bound to it."""
        listener.setblocking(False)
        os.chmod(self.path, self.access.mode)
        place = os.stat(self.path)
        self._place = place.st_dev, place.st_ino
        self.listener = listener

    def leave(self) -> None:
        """Take the socket's file away, if it is still ours."""
        if self._place is not None:
            with suppress(OSError):
                place = os.stat(self.path)
                if (place.st_dev, place.st_ino) == self._place:
                    os.unlink(self.path)
                    for path in self.other_listeners:
                        os.unlink(path)

    def serve(self) -> None:
        """Take clients in until `ending` is set. Blocks."""
        assert self.listener is not None
        while not self.ending.is_set():
            connection = self.accept(self.listener)
            if connection is not None:
                self._take_in(connection)
            self._sweep()

    def accept(self, listener: socket.socket) -> socket.socket | None:
        """Who comes there within a second, but nobody during a handover. The listener does not block."""
        self._await_input(listener, _SWEEP_SECONDS)
        with self._lock:
            while self._halted:
                self._changed.wait()
            if self.ending.is_set():
                return None
            try:
                return listener.accept()[0]
            except BlockingIOError:
                return None
            except OSError as error:
                logger.warning("a client could not be taken in: %s", error)
                self._changed.wait(0.05)
                return None

    def stop(self) -> None:
        """Have `serve` return, once no handover is under way. For signal handlers, too."""
        self.ending.set()
        os.eventfd_write(self._bell, 1)

    def _await_input(self, one: socket.socket, seconds: float | None = None) -> None:
        """Until there is something to read, or the bell rings."""
        poll = select.poll()
        poll.register(one, select.POLLIN)
        poll.register(self._bell, select.POLLIN)
        poll.poll(None if seconds is None else seconds * 1000)

    def _take_in(self, connection: socket.socket) -> None:
        session = Session(Peer.of(connection), connection)
        session.refused = not self.admit(session)
        if session.refused and sum(one.refused for one in list(self.sessions)) >= _REFUSED_MOST:
            connection.close()
        else:
            self.start(session)

    def admit(self, session: Session) -> bool:
        """Whether there is room for it, which it has from then on."""
        with self._lock:
            full = sum(not one.refused for one in self.sessions) >= self._limits.clients
            if not full:
                self.sessions.add(session)
        return not full

    def start(self, session: Session) -> None:
        """Serve a session by a thread of its own, if its client may still ask."""
        with self._lock:
            self.sessions.add(session)
        talk = self.talkers.get(session.protocol)
        if talk is not None and session.connection is not None:
            try:
                threading.Thread(target=talk, args=(session,), daemon=True).start()
            except RuntimeError as error:  # as many as a limit allows; the others are still served
                logger.warning("client %d could not be taken in: %s", session.peer.pid, error)
                self.end(session)

    def await_handshake(self, session: Session, seconds: float) -> None:
        """Until something comes of a client that says one thing and no more; from then on, until `shaken`, no
        handover begins. Raises `TimeoutError`, and `Halted` where one has begun before."""
        assert session.connection is not None
        self._await_input(session.connection, seconds)
        with self._lock:
            if self._halted:
                session.parked = True
                raise Halted
            if not select.select([session.connection], [], [], 0)[0]:
                raise TimeoutError
            session.asked = Ask(wire.MAP)

    def shaken(self, session: Session) -> None:
        """Its memory is served, or never will be."""
        with self._lock:
            session.asked = session.connection = None
            self._changed.notify_all()

    # ---- a handover ----

    def halt(self) -> list[Session]:
        """Have nobody taken in and no question taken or answered until `resume`. Sessions of clients.

        What is being asked (`Session.asked`) may be asked of another pager as well. Raises
        `PagerUnavailable` if a handover is under way already.
        """
        with self._lock:
            if self._halted or self.ending.is_set():
                raise PagerUnavailable(f"{self.path}: is ending, or being taken over")
            self._halted = True
            os.eventfd_write(self._bell, 1)
            while any(one.asked is not None and one.asked.kind == wire.MAP for one in self.sessions):
                self._changed.wait()  # it changes the space, and takes no time
            sessions = [
                one
                for one in self.sessions
                if not one.refused and (one.asked is None or one.asked.kind != wire.TAKE_OVER)
            ]
            for one in sessions:
                one.handed = True
            return sessions

    def resume(self) -> None:
        """Go on after `halt`, or end if `ending` is set."""
        with self._lock:
            self._halted = False
            if self.ending.is_set():
                self._changed.notify_all()
                return
            os.eventfd_read(self._bell)
            parked = [one for one in self.sessions if one.parked]
            for one in self.sessions:
                one.handed = one.parked = False
            self._changed.notify_all()
        for one in parked:
            self.start(one)

    def give_up(self) -> None:
        """All of it is another pager's: `serve` returns."""
        self._place = None
        self.stop()
        self.resume()

    _swept = 0.0

    def _sweep(self) -> None:
        if time.monotonic() - self._swept > _SWEEP_SECONDS:
            self._swept = time.monotonic()
            self._end_those_without_memory()
            self.stocks.sweep()

    def _end_those_without_memory(self) -> None:
        with self._lock:
            silent = [one for one in self.sessions if one.connection is None]
        if silent:
            there = {one.space for one in native.spaces()}
            for session in silent:
                if session.space not in there:
                    self.end(session)

    # ---- one client ----

    def talk(self, session: Session) -> None:
        """Answer a client until it ends, or a handover begins."""
        assert session.connection is not None
        session.connection.setblocking(False)
        try:
            # A question that another pager took, or this one before a handover that came to nothing.
            going = session.asked is None or self._answer(session, session.connection, session.asked, None)
            while going:
                self._await_input(session.connection)
                going = self._answer_one(session, session.connection)
        except Halted:
            return
        except OSError as error:
            logger.info("client %d: %s", session.peer.pid, error)
        except Exception:
            logger.exception("client %d: a defect of lazymem; please report it", session.peer.pid)
        self.end(session)

    def end(self, session: Session) -> None:
        """Its connection has ended; its memory need not have."""
        with self._lock:
            if session not in self.sessions:
                return  # its own thread and the one that sweeps may both find that it is over
            self.sessions.discard(session)
            self._changed.notify_all()
        if session.space is not None:
            native.leave_space(session.space)
        if session.stock is not None:
            self.stocks.leave(session.stock)
        if session.connection is not None:
            session.connection.close()

    def _answer_one(self, session: Session, connection: socket.socket) -> bool:
        with self._lock:
            if self._halted:
                session.parked = True
                raise Halted
            try:
                packet, descriptor = wire.receive(connection)
            except BlockingIOError:
                return True
            except wire.BadPacket as error:
                wire.send(connection, wire.failed(0, errno.EPROTO, str(error)).pack())
                return False
            except OSError as error:
                if error.errno == errno.EMFILE:
                    wire.send(connection, wire.failed(0, errno.EUSERS, wire.NO_DESCRIPTORS).pack())
                raise
            if not packet:
                return False
            try:
                session.asked = ask = wire.unpack_ask(packet)
            except wire.BadPacket as error:
                if descriptor is not None:
                    os.close(descriptor)
                wire.send(connection, wire.failed(0, errno.EPROTO, str(error)).pack())
                return False
        return self._answer(session, connection, ask, descriptor)

    def _answer(self, session: Session, connection: socket.socket, ask: Ask, descriptor: int | None) -> bool:
        sent: int | None = None
        try:
            self._check(session, ask)
            if ask.kind == wire.TAKE_OVER:
                from .handover import give

                give(self, session, ask)
                return False
            handler = self._handlers.get(ask.kind)
            if handler is None:
                raise wire.BadPacket(f"a packet asks for {ask.kind}, which this version does not know")
            answer, sent = handler(session, ask, descriptor)
        except wire.BadPacket as error:
            answer = wire.failed(ask.id, errno.EPROTO, str(error))
        except LazymemError as error:
            answer = wire.failed(ask.id, _code_of(error), str(error))
        except NativeError as error:
            answer = wire.failed(ask.id, error.code, str(error))
        finally:
            if descriptor is not None:
                os.close(descriptor)
        try:
            with self._lock:
                if session.handed:
                    session.parked = True
                    raise Halted
                session.asked = None
                self._changed.notify_all()
                wire.send(connection, answer.pack(), sent)  # a client that does not read its answers is left
        finally:
            if sent is not None:
                os.close(sent)
        return answer.code not in (-errno.EPROTO, -errno.EACCES, -errno.EUSERS)

    def _check(self, session: Session, ask: Ask) -> None:
        self.access.check_peer(session.peer)
        ours = ask.kind in (wire.STATUS, wire.TAKE_OVER) and self.access.is_ours(session.peer)
        if session.refused and not ours:
            raise NativeError(
                -errno.EUSERS, None,
                f"this pager serves {self._limits.clients} clients already; raise its --max-clients",
            )  # fmt: skip

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
        location = self.access.check_snapshot(
            session.peer, wanted.location, with_options=bool(wanted.storage_options)
        )
        stock = self.stocks.get(
            replace(wanted, location=location), any_chunks=self.access.is_ours(session.peer)
        )
        with self._lock:
            if session.handed:  # another pager opens it, unless that comes to nothing: then it is asked again
                self.stocks.leave(stock)
                session.parked = True
                raise Halted
            session.stock = stock
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
        if descriptor is not None and ask.flags & native.ADOPT:
            session.space = adopt_space(descriptor, session.stock.open(), self.known)
            session.claimed = session.space is not None
        if session.space is None:
            assert descriptor is not None
            session.space = open_space(descriptor, adopted=bool(ask.flags & native.ADOPT))
        # Of a claimed space more is known than its client can say.
        if not (session.claimed and ask.flags & native.ADOPT):
            map_memory(session.space, ask, session.stock.open())
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
        with self.stocks.all_held() as stocks:
            found = status_of(self.path, self.clients(), stocks)
        return Answer(ask.id), in_memory(json.dumps(found).encode())

    def _populate(self, session: Session, ask: Ask, _: int | None) -> tuple[Answer, int | None]:
        return populate(self, session, ask), None

    def clients(self) -> dict[int, Session]:
        """Those with memory and a connection, by their space."""
        with self._lock:
            return {one.space: one for one in self.sessions if one.space is not None}


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
