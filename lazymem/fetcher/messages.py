# SPDX-License-Identifier: Apache-2.0
"""The protocol's packets as Python sees them: unpacked and checked, or packed.

What they mean stands in _native/lazymem.h, "the fetcher". They come from our own engine, yet nothing in
them is believed: a wrong place would be a write into another request's bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .. import _native
from .._native import ANSWER, ASK, PIECE
from ..errors import AccessDenied, OptionError, SnapshotChanged, SnapshotNotFound

SOURCE: Final = _native.ASK_KINDS["SOURCE"]
OPEN: Final = _native.ASK_KINDS["OPEN"]
RANGE: Final = _native.ASK_KINDS["RANGE"]
PROMOTE: Final = _native.ASK_KINDS["PROMOTE"]
CANCEL: Final = _native.ASK_KINDS["CANCEL"]
FORGET: Final = _native.ASK_KINDS["FORGET"]
STATUS: Final = _native.ASK_KINDS["STATUS"]

#: What an answer's text may have, in bytes; the engine keeps 4,095 (LM_FETCH_TEXT).
TEXT_MAX: Final = 4000
#: No object is larger; sums of two such numbers stay far from where C's integers end.
_OBJECT_MAX: Final = 1 << 62


class BadMessage(Exception):
    """A packet that breaks the protocol; the sentence says how."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of an object that are cached as one."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Ask:
    """One packet of the engine's. timeout: seconds. payload: as it came."""

    kind: int
    source: int
    id: int
    offset: int
    length: int
    place: int
    timeout: float
    demand: bool
    refetch: bool
    payload: bytes


def unpack(packet: bytes | memoryview) -> Ask:
    """The packet's fields. Raises `BadMessage`; whether they make sense is up to `check`."""
    if len(packet) < ASK.size:
        raise BadMessage(f"a packet has {len(packet)} bytes, and a question at least {ASK.size}")
    raw = ASK.unpack(packet)
    if raw.payload_length != len(packet) - ASK.size:
        raise BadMessage(f"a packet's payload has {len(packet) - ASK.size} bytes, not {raw.payload_length}")
    return Ask(
        kind=raw.kind,
        source=raw.source,
        id=raw.id,
        offset=raw.offset,
        length=raw.length,
        place=raw.place,
        timeout=raw.timeout_ms / 1000,
        demand=bool(raw.flags & _native.ASK_DEMAND),
        refetch=bool(raw.flags & _native.ASK_REFETCH),
        payload=bytes(packet[ASK.size :]),
    )


def check(ask: Ask, memory_size: int) -> None:
    """Raise `BadMessage` if the bytes of an OPEN or RANGE do not fit in the memory, or in any object."""
    if ask.place > memory_size or ask.length > memory_size - ask.place:
        raise BadMessage(f"{ask.length} bytes at {ask.place} do not fit in a memory of {memory_size}")
    if ask.offset > _OBJECT_MAX:
        raise BadMessage(f"offset {ask.offset} lies in no object")


def pieces_of(ask: Ask) -> list[Piece]:
    """The pieces of a RANGE, without empty ones; all of it if none are named. Raises `BadMessage`."""
    if len(ask.payload) % PIECE.size:
        raise BadMessage(f"{len(ask.payload)} bytes of pieces are not whole records of {PIECE.size}")
    pieces, end = [], ask.offset
    for at in range(0, len(ask.payload), PIECE.size):
        raw = PIECE.unpack(ask.payload, at)
        if raw.offset < end or raw.offset + raw.length > ask.offset + ask.length:
            raise BadMessage(f"a piece of {raw.length} bytes at {raw.offset} lies outside of its range")
        end = raw.offset + raw.length
        if raw.length:
            pieces.append(Piece(raw.offset, raw.length))
    if not ask.payload and ask.length:
        pieces.append(Piece(ask.offset, ask.length))
    return pieces


def done(ask: Ask, *, length: int = 0, received: int = 0, requests: int = 0, text: str = "") -> bytes:
    """The answer to `ask` whose bytes are in place."""
    return _pack(_native.ANSWER_DONE, 0, ask.id, length, received, requests, text)


def failed(ask: Ask, code: int, sentence: str, *, received: int = 0, requests: int = 0) -> bytes:
    """The answer to `ask` that will not be fulfilled; code: LM_E_*."""
    return _pack(_native.ANSWER_FAILED, code, ask.id, 0, received, requests, sentence)


def _pack(kind: int, code: int, number: int, length: int, received: int, requests: int, text: str) -> bytes:
    payload = text.encode("utf-8", "replace")
    if len(payload) > TEXT_MAX:  # not in the middle of a character
        payload = payload[:TEXT_MAX].decode("utf-8", "ignore").encode()
    head = ANSWER.pack(
        kind=kind,
        code=code,
        id=number,
        length=length,
        received=received,
        requests=min(requests, 0xFFFFFFFF),
        payload_length=len(payload),
    )
    return head + payload


_CODES: Final = (
    (SnapshotNotFound, _native.E_GONE),
    (AccessDenied, _native.E_DENIED),
    (SnapshotChanged, _native.E_CHANGED),
    (OptionError, _native.E_OPTION),
)


def code_of(error: BaseException) -> int:
    """LM_E_* for what a store raised."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), _native.E_STORE)
