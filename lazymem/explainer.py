# SPDX-License-Identifier: Apache-2.0
"""`explain`: what lies under an array or an address, why a system call on it failed, and what to do.

What the kernel cannot do for itself is known per backend here, and nowhere else in words.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any, Final

import numpy as np

from . import _native
from .errors import LazymemError
from .extents import Extent, extents_of
from .memory import Lease, find, leases

#: Which arrays of a traceback, and names of arrays, are worth saying.
_MOST: Final = 5

_POPULATES: Final = (
    "Populate it first: hand the system call, or the function that ends in one, lazymem.populate(array), "
    "which returns the array, or the dict or list of arrays; or snapshot.prefetch([...], wait=True) before."
)
_BETTER: Final = (
    "With full userfaultfd nothing has to be populated first; `lazymem doctor` says what gives it to this "
    "process."
)
_BETTER_BY_PAGER: Final = "Clients of a pager that was started with --pass-device need not populate anything."
#: Backends whose unpopulated pages only a thread's own touch populates, and why.
_OWN_TOUCHES_ONLY: Final[Mapping[str, str]] = {
    "uffd-user": "this process was given userfaultfd for touches made in user mode only",
    "sigsegv": "the signal by which touches are noticed is not sent for the kernel's own",
}
_SERVED: Final[Mapping[str, str]] = {
    "uffd": "the kernel's touches populate like a thread's, so system calls work on it, populated or not",
    "map": "it is a plain mapping of the file, on which system calls work",
    "eager": "everything was read when it was opened, so system calls work on it",
    "pager": "another process populates it, at the kernel's touches as at a thread's, so system calls work",
}


def explain(what: object = None) -> str:
    """Say in plain sentences what lies under `what`, why a system call on it failed, and what to do about it.

    what: an array, tensor or buffer, or a view of one; an address; an exception, such as the OSError "Bad
        address" (EFAULT) of a system call that met memory which is not populated, of which the arrays in
        the functions that it went through are looked at; left out, the exception that is being handled,
        or was last seen at the prompt, or else everything that is open.

    Nothing is touched, populated or read. Does not block, and raises nothing.
    """
    if what is None:
        what = sys.exc_info()[1] or getattr(sys, "last_value", None)
    if what is None:
        return "\n".join(_overview())
    if isinstance(what, BaseException):
        return "\n".join(_of_error(what))
    if isinstance(what, int) and not isinstance(what, bool):
        return "\n".join(_of_extents(f"Address {what:#x}", [(what, what + 1)]))
    extents = extents_of(what)
    if extents is not None:
        return "\n".join(_of_extents(_named(what), extents))
    try:
        buffer = getattr(what, "buffer", None)  # of a Snapshot
    except LazymemError as error:  # that is closed
        return str(error)
    if isinstance(buffer, memoryview):
        return "\n".join(_of_extents("The snapshot", extents_of(buffer) or []))
    return (
        f"A {type(what).__name__} shows no memory: give an array, a tensor, a buffer, an address or an "
        "exception."
    )


def _named(what: object) -> str:
    return f"This {type(what).__name__}"


# ---- memory ----


def _of_extents(subject: str, extents: list[Extent]) -> Iterator[str]:
    lease = find(extents[0][0]) if extents else None
    if not extents:
        yield f"{subject} has no bytes in main memory, so no system call can fail for them."
    elif lease is None:
        yield f"{subject} is ordinary memory, or that of a snapshot that was closed: it shows nothing lazy."
    else:
        yield from _of_lease(subject, lease, extents)


def _of_lease(subject: str, lease: Lease, extents: list[Extent]) -> Iterator[str]:
    chunks, names = _chunks(lease, extents), _names(lease, extents)
    there, failed = _counts(lease, chunks)
    yield (
        f"{subject} lies in lazy memory: {names or 'no array'} of {lease.url!r}, {_numbers(chunks)} of "
        f"{lease.chunk_count}, of which {_said(there)}."
    )
    own = _own_touches_only(lease)
    if own is None:
        yield f"The backend is {lease.backend!r}: {_SERVED.get(lease.backend, 'system calls work on it')}."
    else:
        yield (
            f"The backend is {lease.backend!r}: {own}, so a system call that meets an unpopulated page fails "
            "with EFAULT ('Bad address'), or does less than it was asked for."
        )
        if there is None or there < len(chunks):
            yield _POPULATES
            yield _BETTER if there is not None else _BETTER_BY_PAGER
        else:
            yield (
                "All of it is populated, so system calls work on it, unless the application has given pages "
                "back (madvise), which lazymem.populate(array) undoes."
            )
    if failed:
        yield (
            f"{_numbers(failed)} could not be had when last asked for: a touch gets SIGBUS, a system call "
            "EFAULT; snapshot.prefetch([...], wait=True) asks again, and raises what is wrong."
        )
    elif own is None:
        yield (
            "A system call can only fail with EFAULT where bytes cannot be had (a line on stderr then says "
            "why): lazymem.populate(array) raises what is wrong."
        )


def _chunks(lease: Lease, extents: list[Extent]) -> list[int]:
    size = lease.chunk_size
    found: set[int] = set()
    for begin, end in extents:
        found.update(range((begin - lease.address) // size, (end - 1 - lease.address) // size + 1))
    return sorted(found)


def _own_touches_only(lease: Lease) -> str | None:
    return _OWN_TOUCHES_ONLY.get("uffd-user" if lease.user_only else lease.backend)


def _counts(lease: Lease, chunks: list[int]) -> tuple[int | None, list[int]]:
    """How many are populated, and which failed. None: only a pager knows."""
    if lease.backend == "pager":
        return None, []
    try:
        states = lease.states()
    except LazymemError:  # closed in this moment
        return 0, []
    failed = [chunk for chunk in chunks if states[chunk] in (_native.STATE_FAILED, _native.STATE_POISONED)]
    return sum(states[chunk] == _native.STATE_PRESENT for chunk in chunks), failed


def _said(there: int | None) -> str:
    if there is None:
        return "its pager knows how many are populated"
    return f"{there} {'is' if there == 1 else 'are'} populated"


def _numbers(chunks: list[int]) -> str:
    if len(chunks) == 1:
        return f"chunk {chunks[0]}"
    if chunks[-1] - chunks[0] == len(chunks) - 1:
        return f"chunks {chunks[0]} to {chunks[-1]}"
    return f"{len(chunks)} chunks between {chunks[0]} and {chunks[-1]}"


def _names(lease: Lease, extents: list[Extent]) -> str:
    begin, end = extents[0][0] - lease.address, extents[-1][1] - lease.address
    names = lease.array_names(begin, end)
    said = ", ".join(repr(name) for name in names[:_MOST])
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return f"array{'s' if len(names) > 1 else ''} {said}{more}" if names else ""


# ---- errors ----


def _of_error(error: BaseException) -> Iterator[str]:
    if isinstance(error, LazymemError):
        yield f"It says itself what to do: {error}"
        return
    yield f"{type(error).__name__}: {error}"
    if not _may_be_ours(error):
        yield (
            "This is not how a system call fails on lazy memory: that is EFAULT, or less done than was asked "
            "for."
        )
        return
    found = list(_unpopulated(error.__traceback__))
    for name, extents in found[:_MOST]:
        yield from _of_extents(f"Variable {name!r} of the traceback", extents)
    if not found:
        yield "No variable that its traceback knows shows lazy memory that is not populated."
        yield from _overview()


def _may_be_ours(error: BaseException) -> bool:
    """EFAULT, by number or, as Rust has libraries say it (safetensors), in words; or what numpy says when C's
    stdio has met it in tofile: no errno, two numbers."""
    if f"os error {errno.EFAULT}" in str(error):
        return True
    if not isinstance(error, OSError):
        return isinstance(error, (RuntimeError, EOFError)) and "write" in str(error)  # torch.save
    return error.errno == errno.EFAULT or (error.errno is None and "requested and" in str(error))


def _unpopulated(traceback: TracebackType | None) -> Iterator[tuple[str, list[Extent]]]:
    """Variables that show memory of which a system call may have met an unpopulated page; innermost first."""
    frames = []
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    seen: list[list[Extent]] = []
    for frame in reversed(frames):
        for name, value in _variables(frame):
            for extents in _extents_within(value):
                lease = find(extents[0][0]) if extents else None
                if lease is None or extents in seen:
                    continue
                seen.append(extents)
                chunks = _chunks(lease, extents)
                there, _ = _counts(lease, chunks)
                if there is None or there < len(chunks):
                    yield name, extents


def _variables(frame: FrameType) -> list[tuple[str, Any]]:
    """Its own, and those of its module that its code names."""
    names = frame.f_code.co_names
    return [
        *list(frame.f_locals.items()),
        *((name, frame.f_globals[name]) for name in names if name in frame.f_globals),
    ]


def _extents_within(value: Any) -> Iterator[list[Extent]]:
    values = [value]
    if isinstance(value, (list, tuple)):
        values = list(value)
    elif isinstance(value, dict):
        values = list(value.values())
    for each in values:
        if isinstance(each, (np.ndarray, memoryview)) or hasattr(each, "data_ptr"):
            yield extents_of(each) or []


def _overview() -> Iterator[str]:
    opened = leases()
    if not opened:
        yield "No snapshot is open in this process, so none of its memory is lazy."
        return
    yield f"Open in this process: {len(opened)}."
    for lease in opened:
        chunks = list(range(lease.chunk_count))
        there, _ = _counts(lease, chunks)
        yield (
            f"{lease.url!r}, {lease.nbytes} bytes at {lease.address:#x}, backend {lease.backend!r}, "
            f"{len(chunks)} chunks, of which {_said(there)}."
        )
    backends = {lease.backend: own for lease in opened if (own := _own_touches_only(lease)) is not None}
    for backend, own in sorted(backends.items()):
        yield (
            f"With {backend!r} a system call that meets an unpopulated page fails with EFAULT ('Bad "
            f"address'): {own}."
        )
    if backends:
        yield _POPULATES
        yield _BETTER
