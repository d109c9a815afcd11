# SPDX-License-Identifier: Apache-2.0
"""The border to the core's pager: its process's side (pager.h), and its clients' (attachment.h)."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from . import Message, NativeRegion, _check
from ._core import ffi, lib

ASK: Final = Message("lm_pager_ask")
ANSWER: Final = Message("lm_pager_answer")
MAGIC: Final[int] = lib.LM_PAGER_MAGIC
VERSION: Final[int] = lib.LM_PAGER_VERSION
MESSAGE_MAX: Final[int] = lib.LM_PAGER_MESSAGE_MAX
KINDS: Final[dict[str, int]] = {
    name: getattr(lib, f"LM_PAGER_{name}")
    for name in ("HELLO", "OPEN", "MAP", "PREFETCH", "WHY", "STATUS", "TAKE_OVER", "POPULATE")
}
DONE: Final[int] = lib.LM_PAGER_DONE
FAILED: Final[int] = lib.LM_PAGER_FAILED
WANT_DEVICE: Final[int] = lib.LM_PAGER_WANT_DEVICE
SHARED: Final[int] = lib.LM_PAGER_SHARED
REMOVED_ZERO: Final[int] = lib.LM_PAGER_REMOVED_ZERO
ADOPT: Final[int] = lib.LM_PAGER_ADOPT
IS_ZERO: Final[int] = lib.LM_PAGER_IS_ZERO
MORE: Final[int] = lib.LM_PAGER_MORE
WAIT: Final[int] = lib.LM_PAGER_WAIT
FOLLOWS_FORK: Final[int] = lib.LM_PAGER_FOLLOWS_FORK
LEFT: Final[int] = lib.LM_SPACE_LEFT

_SPACES_MOST: Final = 65536
_PARTS_MOST: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class SpaceReport:
    """What the pager knows of one address space. Bytes; latency: as `memory.Stats.latency`.

    features: FOLLOWS_FORK, LEFT and others, for `resume_space`.
    """

    space: int
    parent: int
    features: int
    mapped: int
    pieces: int
    faults: int
    served: int
    waiting: int
    failed: int
    latency: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Memory of a space: `length` bytes at `address` show the region `serial` from `offset` on."""

    address: int
    length: int
    offset: int
    serial: int
    page: int
    flags: int


def start(threads: int = 0) -> None:
    """Start the threads that serve; 0: one a processor, 2 to 8."""
    _check(lib.lm_pager_start(threads))


def stop() -> None:
    """End them. Spaces stay, and whoever waits goes on waiting."""
    lib.lm_pager_stop()


def start_twin() -> int:
    """Start the process that keeps this one's userfaultfds open should it die; its id."""
    return _check(lib.lm_pager_start_twin())


def open_space(uffd: int, *, agree: bool) -> tuple[int, bool]:
    """A space for a userfaultfd, which is duplicated: its number, and whether forks are followed."""
    space, features = ffi.new("uint32_t *"), ffi.new("uint32_t *")
    _check(lib.lm_pager_open_space(uffd, agree, space, features))
    return int(space[0]), bool(features[0] & FOLLOWS_FORK)


def map_memory(
    space: int, address: int, length: int, region: NativeRegion, offset: int, page: int, flags: int
) -> None:
    """Have memory of a space show a region's bytes from `offset` on.

    Served from the first call without MORE in `flags` on.
    """
    _check(lib.lm_pager_map(space, address, length, region.handle, offset, page, flags))


def resume_space(space: int, parent: int, features: int) -> None:
    """A space that another pager had, all of whose memory is mapped (with `MORE`): serve it."""
    _check(lib.lm_pager_resume_space(space, parent, features))


def claim_space(uffd: int) -> int | None:
    """The space that has this userfaultfd, whose client had lost its connection; None: there is none.

    Raises `NativeError` (EBUSY) for one that has its connection.
    """
    space = ffi.new("uint32_t *")
    code = lib.lm_pager_claim_space(uffd, space)
    if code == -errno.ESRCH:
        return None
    _check(code)
    return int(space[0])


def populate(space: int, address: int, length: int) -> int:
    """Put in place what a space shows at [address, address + length) and is decoded; bytes in place then."""
    return _check(lib.lm_pager_populate(space, address, length))


def is_registered(space: int, address: int, length: int, page: int) -> bool:
    """Whether memory of a space is registered, and may be filled by pages of that size; True where nobody can
    tell, because its owner is changing it."""
    return bool(lib.lm_pager_is_registered(space, address, length, page) != 0)


def leave_space(space: int) -> None:
    """Its connection has ended; it goes when its memory does, or its process."""
    lib.lm_pager_leave_space(space)


def close_space(space: int) -> None:
    """Stop serving it."""
    lib.lm_pager_close_space(space)


def spaces() -> list[SpaceReport]:
    """All spaces, or 65,536 of them."""
    count = min(lib.lm_pager_spaces(ffi.NULL, 0) + 64, _SPACES_MOST)
    out = ffi.new("lm_space_report[]", count)
    there = min(lib.lm_pager_spaces(out, count), count)
    return [
        SpaceReport(
            one.space, one.parent, one.features, one.mapped, one.pieces, one.faults, one.served, one.waiting,
            one.failed, tuple(one.latency),
        )
        for one in out[0:there]
        if one.space
    ]  # fmt: skip


def parts(space: int) -> list[Part]:
    """What of a space shows what; empty if there is no such space any more."""
    count = min(max(lib.lm_pager_parts(space, ffi.NULL, 0), 0) + 64, _PARTS_MOST)
    out = ffi.new("lm_space_part[]", count)
    return _parts(out, min(max(lib.lm_pager_parts(space, out, count), 0), count))


def _parts(out: Any, count: int) -> list[Part]:
    return [
        Part(one.address, one.length, one.offset, one.region, one.page, one.flags) for one in out[0:count]
    ]


def descriptor(space: int) -> int:
    """A duplicate of a space's userfaultfd."""
    return _check(lib.lm_pager_descriptor(space))


def users(region: NativeRegion) -> int:
    """Spaces that show something of a region."""
    return int(lib.lm_pager_users(region.handle))


def serial(region: NativeRegion) -> int:
    """A number that no other region of this process has."""
    return int(lib.lm_region_serial(region.handle))


def memory_descriptor(region: NativeRegion) -> int:
    """A descriptor, for reading, of the memory of a region with backend "stock"."""
    return _check(lib.lm_region_descriptor(region.handle))


# ---- what outlives a pager ----


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a pager that died knew of one address space. As lm_ledger_report (ledger.h)."""

    space: int
    parent: int
    features: int
    uffd: int
    inode: int
    begun_ns: int
    parts: list[Part]


def read_ledger(data: bytes) -> list[Ledger]:
    """A ledger's space, then children that perhaps have no ledger. Raises `NativeError` for what is none."""
    found: list[Ledger] = []
    out = ffi.new("lm_ledger_report *")
    while True:
        count = lib.lm_ledger_read(ffi.from_buffer(data), len(data), len(found), out, ffi.NULL, 0)
        if count == -errno.ENOENT:
            return found
        parts = ffi.new("lm_space_part[]", max(_check(count), 1))
        lib.lm_ledger_read(ffi.from_buffer(data), len(data), len(found), out, parts, count)
        one = out[0]
        found.append(
            Ledger(
                one.space, one.parent, one.features, one.uffd, one.inode, one.begun_ns, _parts(parts, count)
            )
        )  # fmt: skip


def settle_ledger(fd: int) -> None:
    """Have a ledger tell of no children any more."""
    _check(lib.lm_ledger_settle(fd))


def bequeath(fd: int) -> None:
    """Have the twin keep an open file, should this process die."""
    _check(lib.lm_pager_bequeath(fd))


# ---- clients ----


@contextmanager
def userfaultfd(device: int = -1) -> Iterator[tuple[int, bool]]:
    """A new userfaultfd without its handshake, closed at the end: and whether system calls' touches fail.

    device: a descriptor of /dev/userfaultfd, or -1 for the system call.
    """
    user_only = ffi.new("int *")
    fd = _check(lib.lm_uffd_create(device, user_only))
    try:
        yield fd, bool(user_only[0])
    finally:
        os.close(fd)


def open_paged(memfd: int, size: int, *, writable: bool, dropped: bool) -> Any:
    """A handle of memory that shows a pager's memfd, inaccessible until `admit`."""
    out = ffi.new("lm_region **")
    _check(lib.lm_region_open_paged(memfd, size, writable, dropped, out))
    return out[0]


def admit(region: NativeRegion) -> None:
    """Make it accessible: from now on the pager serves it."""
    _check(lib.lm_region_admit(region.handle))


class Attachment:
    """The thread that keeps memory right when the pager dies (attachment.h)."""

    def __init__(
        self, path: str, url: str, connection: int, uffd: int, packets: tuple[bytes, bytes, bytes],
        address: int, length: int, deadline: float,
    ) -> None:  # fmt: skip
        """connection, uffd: duplicated. packets: HELLO, OPEN, MAP. deadline: seconds without a pager."""
        hello, opened, mapped = (ffi.from_buffer("char[]", packet) for packet in packets)
        keep = [ffi.new("char[]", os.fsencode(path)), ffi.new("char[]", os.fsencode(url))]
        own = [os.dup(connection), -1]
        try:
            own[1] = os.dup(uffd)
            spec = ffi.new(
                "lm_attachment_spec *",
                {
                    "path": keep[0], "url": keep[1], "socket": own[0], "uffd": own[1],
                    "hello": hello, "hello_length": len(packets[0]),
                    "open": opened, "open_length": len(packets[1]),
                    "map": mapped, "map_length": len(packets[2]),
                    "address": address, "length": length, "deadline_ms": int(deadline * 1000),
                },
            )  # fmt: skip
            out = ffi.new("lm_attachment **")
            _check(lib.lm_attachment_start(spec, out))
        except BaseException:
            for fd in own:
                if fd >= 0:
                    os.close(fd)
            raise
        self._handle = ffi.gc(out[0], lib.lm_attachment_free)
        self._leave = lib.lm_attachment_leave  # this module's names may be gone when the interpreter ends

    @property
    def adoptions(self) -> int:
        """How often another pager took the memory over."""
        return int(lib.lm_attachment_adoptions(self._handle))

    @property
    def lost(self) -> bool:
        """Whether none came in time."""
        return bool(lib.lm_attachment_is_lost(self._handle))

    def leave(self) -> None:
        """The memory is about to be unmapped."""
        self._leave(self._handle)

    def close(self) -> None:
        """End the thread, once the memory is unmapped."""
        ffi.release(self._handle)
