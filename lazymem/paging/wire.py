# SPDX-License-Identifier: Apache-2.0
"""Packets of the pager's protocol (_native/pager_protocol.h), packed, sent, received and checked."""

from __future__ import annotations

import errno
import json
import os
import socket
from dataclasses import dataclass
from typing import Any, Final

from .._native import pager as native

HELLO: Final = native.KINDS["HELLO"]
OPEN: Final = native.KINDS["OPEN"]
MAP: Final = native.KINDS["MAP"]
PREFETCH: Final = native.KINDS["PREFETCH"]
WHY: Final = native.KINDS["WHY"]
STATUS: Final = native.KINDS["STATUS"]
TAKE_OVER: Final = native.KINDS["TAKE_OVER"]
POPULATE: Final = native.KINDS["POPULATE"]

_TEXT_MAX: Final = 6000


class BadPacket(Exception):
    """A packet that breaks the protocol; the sentence says how."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A question. The fields are those of lm_pager_ask."""

    kind: int
    id: int = 0
    address: int = 0
    length: int = 0
    offset: int = 0
    page: int = 0
    flags: int = 0
    payload: bytes = b""

    def pack(self) -> bytes:
        head = native.ASK.pack(
            magic=native.MAGIC, version=native.VERSION, kind=self.kind, id=self.id, address=self.address,
            length=self.length, offset=self.offset, page=self.page, flags=self.flags,
            payload_length=len(self.payload),
        )  # fmt: skip
        return head + self.payload


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer. code: negative if it failed, and then `payload` is a sentence."""

    id: int = 0
    length: int = 0
    content: int = 0
    page: int = 0
    code: int = 0
    flags: int = 0
    payload: bytes = b""

    def pack(self) -> bytes:
        head = native.ANSWER.pack(
            magic=native.MAGIC, version=native.VERSION, kind=native.FAILED if self.code < 0 else native.DONE,
            id=self.id, length=self.length, content=self.content, page=self.page, code=self.code,
            flags=self.flags, payload_length=len(self.payload),
        )  # fmt: skip
        return head + self.payload

    @property
    def text(self) -> str:
        return self.payload.decode("utf-8", "replace")


def failed(ask_id: int, code: int, sentence: str) -> Answer:
    """code: made negative if it is not."""
    return Answer(ask_id, code=-abs(code) or -1, payload=sentence.encode("utf-8", "replace")[:_TEXT_MAX])


def unpack_ask(packet: bytes) -> Ask:
    """Raises `BadPacket`."""
    raw = _checked(packet, native.ASK, "question")
    if raw.reserved:
        raise BadPacket("a question's reserved field is not 0")
    return Ask(
        raw.kind, raw.id, raw.address, raw.length, raw.offset, raw.page, raw.flags, packet[native.ASK.size :]
    )


def unpack_answer(packet: bytes) -> Answer:
    """Raises `BadPacket`."""
    raw = _checked(packet, native.ANSWER, "answer")
    code = min(raw.code, -1) if raw.kind != native.DONE else 0
    payload = packet[native.ANSWER.size :]
    return Answer(raw.id, raw.length, raw.content, raw.page, code, raw.flags, payload)


def _checked(packet: bytes, form: Any, what: str) -> Any:
    if len(packet) < form.size:
        raise BadPacket(f"a packet has {len(packet)} bytes, and a {what} at least {form.size}")
    raw = form.unpack(packet)
    if raw.magic != native.MAGIC:
        raise BadPacket(
            f"a packet begins with {raw.magic:#x}, not {native.MAGIC:#x}: this is not the protocol"
        )
    if raw.version != native.VERSION:
        raise BadPacket(f"a packet is of version {raw.version}; this is version {native.VERSION}")
    if raw.payload_length != len(packet) - form.size:
        raise BadPacket(f"a packet's payload has {len(packet) - form.size} bytes, not {raw.payload_length}")
    return raw


def json_of(payload: bytes) -> dict[str, Any]:
    """A payload's JSON object. Raises `BadPacket`."""
    try:
        found = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BadPacket(f"a payload is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadPacket("a payload is not a JSON object")
    return found


def send(connection: socket.socket, packet: bytes, descriptor: int | None = None) -> None:
    """One packet. Raises OSError."""
    fds = [] if descriptor is None else [descriptor]
    socket.send_fds(connection, [packet], fds, socket.MSG_NOSIGNAL)


#: What a pager says to who comes with a descriptor that it has no room for.
NO_DESCRIPTORS: Final = "this pager can have no more descriptors; raise its limit (ulimit -n)"


def receive(connection: socket.socket) -> tuple[bytes, int | None]:
    """One packet and the descriptor that came along, which is the caller's to close. b"": it has ended.

    Raises OSError, EMFILE among them, and `BadPacket` for a packet that is too long or has more than one
    descriptor.
    """
    packet, fds, flags, _ = socket.recv_fds(connection, native.MESSAGE_MAX, 4, socket.MSG_CMSG_CLOEXEC)
    if flags & socket.MSG_CTRUNC and not fds:  # there was room for some in the packet, so there is none here
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    is_wrong = len(fds) > 1 or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
    if is_wrong or not packet:  # an empty packet may bring one, too
        for fd in fds:
            os.close(fd)
        fds = []
    if is_wrong:
        raise BadPacket("a packet is too long, or brings more than one descriptor")
    return packet, fds[0] if fds else None
