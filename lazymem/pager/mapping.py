# SPDX-License-Identifier: Apache-2.0
"""MAP: a client's userfaultfd and its memory to the core, and in a sentence what is wrong with them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from typing import Final

from .._native import NativeError, NativeRegion
from .._native import pager as native
from ..paging.wire import NO_DESCRIPTORS, Ask

_PAGES: Final = (4096, 2 << 20)
_ADDRESSES_END: Final = 1 << 56  # of a process's memory, whatever the machine
_FLAGS: Final = native.SHARED | native.REMOVED_ZERO | native.ADOPT | native.MORE


def open_space(uffd: int, *, adopted: bool) -> int:
    """A space for a userfaultfd. Raises `NativeError`."""
    try:
        return native.open_space(uffd, agree=not adopted)[0]
    except NativeError as error:
        if error.code in (-errno.EMFILE, -errno.ENFILE):
            said = NO_DESCRIPTORS
        elif adopted:
            said = "the descriptor that came along is no userfaultfd that a pager had before (UFFDIO_API)"
        else:
            said = (
                "the descriptor that came along is no userfaultfd, or one whose handshake (UFFDIO_API) was "
                f"made already: leave that to the pager ({error})"
            )
        raise NativeError(error.code, said=said) from None


def map_memory(space: int, ask: Ask, memory: NativeRegion) -> None:
    """Have what MAP names show a snapshot's memory. Raises `NativeError`."""
    page = ask.page or 4096
    wrong = _wrong_with(ask, page, memory.size)
    if wrong:
        raise NativeError(-errno.EINVAL, said=f"MAP: {wrong}")
    try:
        native.map_memory(space, ask.address, ask.length, memory, ask.offset, page, ask.flags & _FLAGS)
    except NativeError as error:
        raise NativeError(error.code, said=f"MAP: {_why(error, ask, page)}") from None


def restore_space(uffd: int, parts: Iterable[native.Part], memory_of: Callable[[int], NativeRegion]) -> int:
    """A space that another pager had, not resumed yet. memory_of: by the serial number that parts have.

    Raises `NativeError`, and what memory_of does.
    """
    space, _ = native.open_space(uffd, agree=False)
    try:
        for part in parts:
            flags = part.flags | native.ADOPT | native.MORE
            memory = memory_of(part.serial)
            native.map_memory(space, part.address, part.length, memory, part.offset, part.page, flags)
    except BaseException:
        native.close_space(space)
        raise
    return space


#: What another pager knew of clients, by their userfaultfds' inodes; its file goes once they have come.
Known = dict[int, tuple[native.Ledger, int | None]]


def adopt_space(uffd: int, memory: NativeRegion, known: Known) -> int | None:
    """A space whose client comes with it again, as its connection had ended, or its pager. None: nothing is
    known of it. Raises `NativeError`."""
    space = native.claim_space(uffd)
    ledger, file = known.pop(os.fstat(uffd).st_ino, (None, None))
    try:
        if space is None and ledger is not None:
            space = restore_space(uffd, ledger.parts, lambda _: memory)
            native.resume_space(space, 0, ledger.features)
    finally:
        if file is not None:
            os.close(file)
    return space


def _wrong_with(ask: Ask, page: int, size: int) -> str:
    """What no memory can be right for; "" if there is nothing."""
    if page not in _PAGES:
        return f"page is {page}, and pages have {_PAGES[0]} bytes, or {_PAGES[1]}"
    for name, value in (("address", ask.address), ("length", ask.length), ("offset", ask.offset)):
        if value % page:
            return f"{name} is {value}, not a multiple of the page's {page} bytes"
    if not ask.length:
        return "length is 0"
    if ask.address + ask.length > _ADDRESSES_END:
        return f"no process has memory up to {ask.address + ask.length:#x}"
    if ask.offset + ask.length > size:
        return f"the snapshot's memory has {size} bytes (OPEN says so), not {ask.offset + ask.length}"
    return ""


def _why(error: NativeError, ask: Ask, page: int) -> str:
    where = f"the memory at {ask.address:#x}"
    if error.code == -errno.EEXIST:
        return f"{where} shows something already"
    if error.code == -errno.EBUSY:
        return f"{where} is registered with another userfaultfd"
    if error.code in (-errno.EINVAL, -errno.ENOENT):
        kind = "a private mapping of what OPEN brought" if ask.flags & native.SHARED else "anonymous"
        return f"{where} is not all mapped, or not all {kind}, or its pages have not {page} bytes"
    return f"{where} cannot be served: {error}"
