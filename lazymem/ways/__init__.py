# SPDX-License-Identifier: Apache-2.0
"""`survey`: the ways to lazy memory that this process has, why it lacks the others, and what changes that.

For `lazymem doctor` and for `BackendUnavailable`, which say the same. Facts are tried, not derived from
version numbers: a sandbox hides what a kernel has. Changes nothing.
Relies on the errno with which userfaultfd(2) and its device refuse.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from .. import _native
from .._native import WayReport
from .advice import GAINS, change_for
from .advice import Change as Change
from .place import DEVICE, SYSCTL, Place, look_around

#: What the engine cannot do without (engine.c, open_way).
_NEEDED: Final = ("copy", "zeropage", "wake")
#: By name: what it is, and the backend that it serves. The best first, as the engine asks for them.
_WAYS: Final = {
    "device": (DEVICE, "uffd"),
    "syscall": ("userfaultfd(2)", "uffd"),
    "user-only": ("userfaultfd(2), user mode only", "uffd-user"),
    "sigsegv": ("signals of protected pages", "sigsegv"),
}


@dataclass(frozen=True, slots=True)
class Way:
    """One way to lazy memory. usable: lazymem can run on it. refusal: why not; empty if usable."""

    name: str
    what: str
    backend: str
    usable: bool
    errno: str | None
    refusal: str
    operations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """All ways, the best first, and the place they were tried in."""

    place: Place
    ways: tuple[Way, ...]

    @property
    def taken(self) -> Way | None:
        """What "auto" takes for what cannot be mapped. None: nothing is lazy."""
        return next((way for way in self.ways if way.usable), None)

    @property
    def backend(self) -> str:
        """The same, by the name that `lazymem.open` knows."""
        return "eager" if self.taken is None else self.taken.backend

    def reason(self, backend: str) -> str:
        """Why the ways that serve `backend` are refused; empty if none is."""
        return _sentences(way for way in self.ways if way.backend == backend)

    def better(self) -> str:
        """Why nothing better than what is taken is to be had; empty if there is nothing better."""
        taken = self.ways.index(self.taken) if self.taken is not None else None
        return _sentences(way for way in self.ways[:taken] if way.backend != self.backend)

    def change(self, backend: str) -> Change | None:
        """What gives `backend`; None if it is to be had, or nothing gives it."""
        if backend not in GAINS or any(way.usable for way in self.ways if way.backend == backend):
            return None
        return change_for(backend, self.place, {way.name: way for way in self.ways})


def survey() -> Survey:
    """Try every way on throw-away pages. Takes milliseconds; needs no rights."""
    place = look_around()
    return Survey(place, (*(_way(found, place) for found in _native.probe()), _signals()))


def _signals() -> Way:
    """The way that needs no userfaultfd."""
    number = _native.probe_sigsegv()
    what, backend = _WAYS["sigsegv"]
    return Way(
        name="sigsegv",
        what=what,
        backend=backend,
        usable=number == 0,
        errno=_code(number),
        refusal=f"{os.strerror(number)}: {_why_no_signals(number)}" if number else "",
        operations=("protect", "remap") if number == 0 else (),
    )


def _code(number: int) -> str | None:
    return errno.errorcode.get(number, str(number)) if number else None


def refusal(backend: str) -> str:
    """Why `backend` is not to be had here and what would give it, for a message; empty if it is."""
    found = survey()
    change = found.change(backend)
    return found.reason(backend) + (f". To have it: {change.command}" if change is not None else "")


# ---- why not ----


def _sentences(ways: Iterable[Way]) -> str:
    return "; ".join(f"{way.what}: {way.refusal}" for way in ways if not way.usable)


def _way(found: WayReport, place: Place) -> Way:
    missing = [name for name in _NEEDED if name not in found.operations]
    refused = ""
    if found.errno:
        refused = f"{os.strerror(found.errno)}: {_why(found, place)}"
    elif missing:
        refused = f"opens, but does not {', '.join(missing)}"
    what, backend = _WAYS[found.name]
    return Way(
        name=found.name,
        what=what,
        backend=backend,
        usable=not refused,
        errno=_code(found.errno),
        refusal=refused,
        operations=found.operations,
    )


def _why(found: WayReport, place: Place) -> str:
    number = found.errno
    if number in (errno.EMFILE, errno.ENFILE):
        return "no descriptor is free; raise the limit (ulimit -n)"
    if found.name == "device":
        return _why_not_device(number, place)
    if number == errno.ENOSYS:
        return "a seccomp filter hides it" if place.filtered else "this kernel was built without it"
    if number == errno.EINVAL:
        return "it came with Linux 5.11" if found.name == "user-only" else "the kernel does not know it so"
    if number != errno.EPERM:
        return "the system call does not work"
    if found.name == "syscall" and place.sysctl == "0" and not place.filtered:
        where = " outside of this user namespace" if place.outside else ""
        return f"needs {SYSCTL}=1 or CAP_SYS_PTRACE{where}"
    if found.name == "syscall" and place.sysctl != "1":
        return f"{SYSCTL} is 0, or a seccomp filter forbids it"
    if place.filtered:
        return "a seccomp filter forbids it"
    return "a security module (SELinux, say) or a filter forbids it"


def _why_not_device(number: int, place: Place) -> str:
    if number == errno.ENOENT:
        if place.kernel < (6, 1):
            return "it came with Linux 6.1"
        return "this container was not given it" if place.container else "udev did not make it"
    if number == errno.EACCES:
        return "its file mode does not let this user in"
    if number == errno.EPERM:
        return "a device or seccomp rule of this container or service forbids it"
    if number == errno.ENOSYS and place.filtered:
        return "a seccomp filter hides its ioctl"
    return "the device does not work"


def _why_no_signals(number: int) -> str:
    if number == errno.EOPNOTSUPP:
        return "only x86-64 and arm64 tell what a touch was"
    if number == errno.ENOSYS:
        return "memfd_create(2) is not to be had, or a sandbox answers for the kernel"
    if number == errno.EFBIG:
        return "memory of memfd_create(2) counts as a file; raise the limit of file sizes (ulimit -f)"
    return "memfd_create(2) or mmap(2) of it is refused"
