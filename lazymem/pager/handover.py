# SPDX-License-Identifier: Apache-2.0
"""From one pager to the next, without a client noticing: spaces with their userfaultfds, connections, and the
socket that listens, so that nobody is ever refused.

The new pager asks TAKE_OVER four times, with {"step", "version"}:

    look    which snapshots there are. It opens them, which may take a while; the old one goes on serving.
    give    from here on the old one reads nothing and answers nobody; whoever touches a page waits. Its
            answer is JSON in a memfd, then one packet for each descriptor: the listening sockets, a
            userfaultfd for each space, a connection for each session, in the order of the JSON.
    commit  the new one has all that it needs. The answer makes it the pager; the old one ends.
    keep    instead of commit: the old one goes on, as it does if anything else comes, or nothing.

What the kernel has to say of a space meanwhile waits in its userfaultfd, in its order. The new pager wakes
whoever waits for a page, so that they ask again. Clients' memory showed the old pager's; what is missing
of it they get as copies of the new one's.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, replace
from typing import Any, Final

from .._native import NativeError
from .._native import pager as native
from ..errors import AccessDenied, LazymemError, PagerUnavailable
from ..paging import wire
from ..paging.wire import Answer, Ask
from .access import Peer
from .files import in_memory
from .mapping import restore_space
from .server import Server, Session
from .stock import Stock, Wanted

logger = logging.getLogger("lazymem")

_VERSION: Final = 2
#: Seconds that the old pager, whose clients wait meanwhile, gives the new one for a step once it has stopped.
_PATIENCE: Final = 30.0
#: And for opening the snapshots, while it still serves.
_LOOKING: Final = 600.0


# ---- the old pager ----


def give(server: Server, taker: Session, ask: Ask) -> None:
    """Hand everything to the pager that asks. Returns when it has it, or has not.

    Raises `AccessDenied` for another user's, `PagerUnavailable` where one has asked already, `BadPacket`.
    """
    if not server.access.is_ours(taker.peer):
        raise AccessDenied("a pager is taken over by its own user only", url="pager")
    assert taker.connection is not None
    connection = taker.connection
    if _step(ask) != "look":
        raise wire.BadPacket("a handover begins with a look")
    connection.settimeout(_LOOKING)
    looked = [asdict(stock.wanted) for stock in server.stocks.by_serial().values()]
    _send(connection, Answer(ask.id), in_memory(json.dumps({"snapshots": looked}).encode()))
    try:
        ask = _next(connection)
    except (OSError, wire.BadPacket):
        return  # it could not open something, and has said so at its own end
    if _step(ask) != "give":
        return
    connection.settimeout(_PATIENCE)
    sessions = server.halt()
    given = False
    try:
        native.stop()
        try:
            with ExitStack() as stack:
                everything, descriptors = _everything(server, sessions, stack)
                _send(connection, Answer(ask.id), in_memory(json.dumps(everything).encode()))
                for descriptor in descriptors:
                    wire.send(connection, Answer(ask.id).pack(), descriptor)
            ask = _next(connection)
            if _step(ask) == "commit":
                wire.send(connection, Answer(ask.id).pack())
                given = True
        except (OSError, NativeError, wire.BadPacket) as error:
            logger.warning("the pager that was to take over has not: %s", error)
        if given:
            for report in native.spaces():
                native.close_space(report.space)  # else the twin would wait for their processes to end
        else:
            native.start(server.core_threads)
            with suppress(OSError):
                wire.send(connection, wire.failed(ask.id, 1, "the old pager goes on").pack())
    finally:
        if given:
            server.give_up()
        else:
            server.resume()


def _everything(
    server: Server, sessions: list[Session], stack: ExitStack
) -> tuple[dict[str, Any], list[int]]:
    """What the new pager has to know, and the descriptors that go with it, in order."""
    assert server.listener is not None
    stocks = server.stocks.by_serial()
    order = {id(stock): index for index, stock in enumerate(stocks.values())}
    numbers = {serial: order[id(stock)] for serial, stock in stocks.items()}
    listeners = dict(server.other_listeners)
    descriptors = [server.listener.fileno(), *(one.fileno() for one in listeners.values())]
    spaces: list[dict[str, Any]] = []
    for report in native.spaces():
        try:
            descriptors.append(native.descriptor(report.space))
        except NativeError:
            continue  # its process has just ended
        stack.callback(os.close, descriptors[-1])
        parts = [
            (one.address, one.length, one.offset, numbers[one.serial], one.page, one.flags)
            for one in native.parts(report.space)
        ]
        spaces.append(
            {"space": report.space, "parent": report.parent, "features": report.features, "parts": parts}
        )
    there = {one["space"] for one in spaces}
    described = []
    for one in sessions:
        described.append(_describe(one, there, order))
        if one.connection is not None:
            descriptors.append(one.connection.fileno())
    everything = {
        "snapshots": [asdict(stock.wanted) for stock in stocks.values()], "spaces": spaces,
        "sessions": described, "listeners": list(listeners),
    }  # fmt: skip
    return everything, descriptors


def _describe(session: Session, there: set[int], order: Mapping[int, int]) -> dict[str, Any]:
    asked = session.asked
    return {
        "protocol": session.protocol,
        "peer": asdict(session.peer),
        "connected": session.connection is not None,
        "snapshot": None if session.stock is None else order[id(session.stock)],
        "space": session.space if session.space in there else None,
        "maps": session.maps,
        "claimed": session.claimed,
        "since": session.since,
        "asked": None if asked is None else base64.b64encode(asked.pack()).decode("ascii"),
    }


# ---- the new pager ----


def take(server: Server) -> bool:
    """Become the pager at `server.path`, with all that the one there has. False: there is none.

    The core is to be running. Raises what `lazymem.open` does for a snapshot that cannot be had any more,
    `PagerUnavailable`, and `OutOfMemory`; then the old pager goes on.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ExitStack() as stack:
        stack.enter_context(closing(connection))
        try:
            connection.connect(server.path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError as error:
            raise PagerUnavailable(
                f"{server.path}: cannot be connected to: {error.strerror or error}"
            ) from error
        owner = Peer.of(connection)
        if not server.access.is_ours(owner):  # it names what is opened then, by our rights
            raise PagerUnavailable(
                f"{server.path}: the pager there is user {owner.uid}'s; only that user can take it over"
            )
        try:
            connection.settimeout(_PATIENCE)
            _take(server, connection, stack)
        except (OSError, wire.BadPacket, NativeError) as error:
            if isinstance(error, LazymemError):
                raise
            raise PagerUnavailable(f"{server.path}: the pager there does not hand over: {error}") from error
    return True


def _take(server: Server, connection: socket.socket, stack: ExitStack) -> None:
    stocks: list[Stock] = []

    def open_all(wanted: list[dict[str, Any]]) -> list[Stock]:
        found = []
        for one in wanted:
            stock = server.stocks.get(Wanted.told(one))
            stack.callback(server.stocks.leave, stock)  # who goes on using it counts for itself
            found.append(stock)
        return found

    open_all(_ask(connection, "look")["snapshots"])
    everything = _ask(connection, "give")
    undo = stack.enter_context(ExitStack())
    stocks = open_all(everything["snapshots"])
    listener = socket.socket(fileno=_receive(connection))
    undo.callback(listener.close)
    others = {path: socket.socket(fileno=_receive(connection)) for path in everything["listeners"]}
    for other in others.values():
        undo.callback(other.close)
    renamed: dict[int, int] = {}
    for space in everything["spaces"]:
        renamed[space["space"]] = number = _take_space(connection, stocks, space)
        undo.callback(native.close_space, number)
    sessions = [_take_session(connection, stocks, renamed, one, undo) for one in everything["sessions"]]
    _commit(connection)
    undo.pop_all()
    server.listen_by(listener)
    server.other_listeners = others
    for space in everything["spaces"]:
        with suppress(NativeError):  # its process has ended meanwhile
            native.resume_space(renamed[space["space"]], renamed.get(space["parent"], 0), space["features"])
    for session in sessions:
        if session.stock is not None:
            server.stocks.use(session.stock)
        server.start(session)


def _take_space(connection: socket.socket, stocks: list[Stock], space: Mapping[str, Any]) -> int:
    uffd = _receive(connection)
    try:
        parts = [native.Part(*part) for part in space["parts"]]
        return restore_space(uffd, parts, lambda stock: stocks[stock].open())
    finally:
        os.close(uffd)


def _take_session(
    connection: socket.socket, stocks: list[Stock], renamed: Mapping[int, int], told: Mapping[str, Any],
    undo: ExitStack,
) -> Session:  # fmt: skip
    client = None
    if told["connected"]:
        client = socket.socket(fileno=_receive(connection))
        undo.callback(client.close)
    asked = told["asked"]
    return Session(
        Peer(**told["peer"]),
        client,
        protocol=told["protocol"],
        stock=None if told["snapshot"] is None else stocks[told["snapshot"]],
        space=None if told["space"] is None else renamed[told["space"]],
        maps=told["maps"],
        claimed=told["claimed"],
        since=told["since"],
        asked=None if asked is None else _renumbered(wire.unpack_ask(base64.b64decode(asked)), renamed),
    )


def _renumbered(ask: Ask, renamed: Mapping[int, int]) -> Ask:
    """A question that may name a space by the number that it had."""
    if ask.kind != wire.POPULATE:
        return ask
    with suppress(wire.BadPacket):  # which it is answered with
        told = wire.json_of(ask.payload)
        if "space" in told:
            told["space"] = renamed.get(told["space"], 0) if isinstance(told["space"], int) else None
            return replace(ask, payload=json.dumps(told).encode())
    return ask


def _commit(connection: socket.socket) -> None:
    """Returns if this is the pager now. Raises `PagerUnavailable` if the old one goes on."""
    connection.settimeout(None)  # it answers or dies; to guess would be to have two pagers, or none
    _say(connection, "commit")
    packet, _ = wire.receive(connection)
    # It says so before it goes on. If it ends without a word, it has died, and all it had is here.
    if packet and wire.unpack_answer(packet).code < 0:
        raise PagerUnavailable(f"the pager there goes on: {wire.unpack_answer(packet).text}")


# ---- both ----


def _say(connection: socket.socket, step: str) -> None:
    told = json.dumps({"step": step, "version": _VERSION}).encode()
    wire.send(connection, Ask(wire.TAKE_OVER, id=1, payload=told).pack())


def _ask(connection: socket.socket, step: str) -> dict[str, Any]:
    """A step, and the JSON that it brings."""
    _say(connection, step)
    fd = _receive(connection)
    with os.fdopen(fd, "rb") as file:
        return wire.json_of(file.read())


def _receive(connection: socket.socket) -> int:
    """The descriptor of the next packet."""
    packet, fd = wire.receive(connection)
    if not packet:
        raise wire.BadPacket("it has ended the connection")
    answer = wire.unpack_answer(packet)
    if answer.code < 0:
        raise PagerUnavailable(answer.text)
    if fd is None:
        raise wire.BadPacket("a packet comes without its descriptor")
    return fd


def _send(connection: socket.socket, answer: Answer, descriptor: int) -> None:
    """With a descriptor, which is closed."""
    try:
        wire.send(connection, answer.pack(), descriptor)
    finally:
        os.close(descriptor)


def _next(connection: socket.socket) -> Ask:
    packet, fd = wire.receive(connection)
    if fd is not None:
        os.close(fd)
    if not packet:
        raise wire.BadPacket("it has ended the connection")
    return wire.unpack_ask(packet)


def _step(ask: Ask) -> str:
    told = wire.json_of(ask.payload)
    if ask.kind != wire.TAKE_OVER or told.get("version") != _VERSION:
        raise wire.BadPacket(
            f"a handover of version {told.get('version')} is asked for, and this is version {_VERSION}"
        )
    return str(told.get("step"))
