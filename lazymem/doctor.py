# SPDX-License-Identifier: Apache-2.0
"""`examine`: what this machine offers lazymem, which way in it takes, and what one change would give.

Facts are tried, not derived from version numbers: a sandbox hides what a kernel has. Changes nothing.
Relies on: proc(5), and on the errno with which userfaultfd(2) and its device refuse.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import importlib.metadata
import mmap
import os
import platform
import pwd
import resource
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from . import _native
from ._native import WayReport
from .errors import LazymemError, OptionError
from .fetcher.client import fetcher_status
from .options import OpenOptions, StoreOptions, cpu_count

_DEVICE: Final = "/dev/userfaultfd"
_NOBODY: Final = 65534
_SYSCTL: Final = "/proc/sys/vm/unprivileged_userfaultfd"
#: What the engine cannot do without (engine.c, open_way).
_NEEDED: Final = ("copy", "zeropage", "wake")
#: Files that Docker, Podman and Kubernetes leave in their containers.
_CONTAINER_MARKS: Final = ("/.dockerenv", "/run/.containerenv", "/run/secrets/kubernetes.io")
_WAY_NAMES: Final = {
    "device": _DEVICE,
    "syscall": "userfaultfd(2)",
    "user-only": "userfaultfd(2), user mode only",
}
_PACKAGES: Final = ("numpy", "ml_dtypes", "cffi", "zstandard", "lz4", "xxhash", "boto3", "click", "rich")


@dataclass(frozen=True, slots=True)
class Way:
    """One way to a userfaultfd. usable: lazymem can run on it. refusal: why not; empty if usable."""

    name: str
    what: str
    usable: bool
    errno: str | None
    refusal: str
    operations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """The one thing to change for a better way in. command: for a shell, or flags for a container."""

    gain: str
    command: str
    remark: str


@dataclass(frozen=True, slots=True)
class Fact:
    """A setting or limit. remark: what it means for lazymem where it matters, else empty."""

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Codec:
    """source: the wheel's module or the library that the functions come from; None if not found."""

    name: str
    source: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """What `examine` found.

    backend: what "auto" takes for a compressed snapshot. way: through what; None if nothing is lazy.
    install: how chunks are put in place. reason: why not a better backend; empty if there is none.
    cannot: what the taken way cannot do. notes: what else to know.
    """

    versions: tuple[tuple[str, str], ...]
    machine: tuple[Fact, ...]
    ways: tuple[Way, ...]
    backend: str
    way: str | None
    install: str
    reason: str
    change: Change | None
    cannot: tuple[str, ...]
    codecs: tuple[Codec, ...]
    limits: tuple[Fact, ...]
    stores: tuple[Fact, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where this process runs, as far as it decides which advice helps."""

    kernel: tuple[int, int]
    container: bool
    service: bool  # systemd started it
    filtered: bool  # a seccomp filter is installed
    device: bool  # the device node exists
    sysctl: str | None
    user: str
    group: str  # its primary one
    nobody: bool  # the user that stands for many: daemons, and whoever a user namespace does not map


def examine() -> Report:
    """Try every way in and read the settings that matter. Takes milliseconds; needs no rights."""
    place = _look_around()
    probed = {way.name: way for way in _native.probe()}
    ways = tuple(_way(found, place) for found in probed.values())
    way = next((way for way in ways if way.usable), None)  # in the order in which the engine asks
    backend = "eager" if way is None else "uffd-user" if way.name == "user-only" else "uffd"
    operations = way.operations if way is not None else ()
    return Report(
        versions=_versions(),
        machine=_machine(place),
        ways=ways,
        backend=backend,
        way=way.what if way is not None else None,
        install="none" if way is None else "copy",
        reason=_reason(backend, ways),
        change=_change(backend, place, probed),
        cannot=_cannot(backend, operations),
        codecs=tuple(Codec(name, source or None) for name, source in _native.CODEC_SOURCES.items()),
        limits=_limits(),
        stores=_stores(),
        notes=_notes(),
    )


# ---- the machine ----


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _look_around() -> _Place:
    parts = (platform.release().replace("-", ".") + ".0.0").split(".")
    number = [int("".join(c for c in part if c.isdigit()) or 0) for part in parts[:2]]
    status = _read("/proc/self/status") or ""
    modes = [line.split()[1] for line in status.splitlines() if line.startswith("Seccomp:")]
    uid = os.geteuid()
    user = str(uid)
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(uid).pw_name
    gid = os.getegid()
    group = str(gid)
    with contextlib.suppress(KeyError):
        group = grp.getgrgid(gid).gr_name
    return _Place(
        kernel=(number[0], number[1]),
        container=any(map(os.path.exists, _CONTAINER_MARKS)),
        service=(_read("/proc/self/cgroup") or "").endswith(".service"),
        filtered=modes == ["2"],
        device=os.path.exists(_DEVICE),
        sysctl=_read(_SYSCTL),
        user=user,
        group=group,
        nobody=uid == _NOBODY,
    )


def _versions() -> tuple[tuple[str, str], ...]:
    from . import __version__  # not at the top: the package imports its modules first

    found = [("lazymem", __version__), ("python", platform.python_version())]
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append((package, importlib.metadata.version(package)))
    return tuple(found)


def _stores() -> tuple[Fact, ...]:
    """What URLs need: the fetcher, tried, and the clients that it may use."""
    started = time.monotonic()
    try:
        fetcher_status()
        fetcher = Fact("fetcher", f"starts, in {1000 * (time.monotonic() - started):.0f} ms")
    except LazymemError as error:
        fetcher = Fact("fetcher", "does not start", f"{error}; s3:// and http(s):// need it")
    clouds = Fact("gs://, az://", "not to be had", "pip install 'lazymem[obstore]'")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        clouds = Fact("gs://, az://", f"obstore {importlib.metadata.version('obstore')}")
    cache = StoreOptions.from_environment().cache
    return (
        fetcher,
        clouds,
        Fact("cache", cache or "off", "" if cache else "set LAZYMEM_CACHE_DIR"),
    )


def _machine(place: _Place) -> tuple[Fact, ...]:
    huge = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = huge.partition("[")[2].partition("]")[0] if huge is not None else "not there"
    remark = (
        ""
        if chosen in ("always", "madvise")
        else "memory is made of small pages only, so populating is slower"
    )
    kernel = f"{platform.system()} {platform.release()}"
    return (
        Fact(
            "kernel",
            kernel,
            "" if place.kernel >= (5, 11) else "5.11 or later is needed without root's rights",
        ),
        Fact("architecture", platform.machine()),
        Fact("page size", f"{mmap.PAGESIZE} bytes"),
        Fact(
            "processors",
            f"{cpu_count()} of {os.cpu_count()}",
            "for this process" if cpu_count() != os.cpu_count() else "",
        ),
        Fact("huge pages", chosen, remark),
        Fact("vm.unprivileged_userfaultfd", place.sysctl if place.sysctl is not None else "not there"),
        Fact("user", place.user, "in a container" if place.container else ""),
        Fact(
            "seccomp filter",
            "yes" if place.filtered else "no",
            "may hide system calls" if place.filtered else "",
        ),
    )


# ---- ways in ----


def _way(found: WayReport, place: _Place) -> Way:
    missing = [name for name in _NEEDED if name not in found.operations]
    refusal = ""
    if found.errno:
        refusal = f"{os.strerror(found.errno)}: {_why(found, place)}"
    elif missing:
        refusal = f"opens, but does not {', '.join(missing)}"
    return Way(
        name=found.name,
        what=_WAY_NAMES[found.name],
        usable=not refusal,
        errno=errno.errorcode.get(found.errno, str(found.errno)) if found.errno else None,
        refusal=refusal,
        operations=found.operations,
    )


def _why(found: WayReport, place: _Place) -> str:
    number = found.errno
    if found.name == "device":
        if number == errno.ENOENT:
            return (
                "this container was not given it"
                if place.container
                else "it came with Linux 6.1, or udev did not make it"
            )
        if number == errno.EACCES:
            return "its file mode does not let this user in"
        if number == errno.EPERM:
            return "a device or seccomp rule of this container or service forbids it"
        return "the device does not work"
    if number == errno.ENOSYS:
        return "a seccomp filter hides it" if place.filtered else "this kernel was built without it"
    if number == errno.EPERM:
        if found.name == "syscall" and place.sysctl == "0" and not place.filtered:
            return "needs vm.unprivileged_userfaultfd=1 or CAP_SYS_PTRACE"
        if place.filtered:
            return "a seccomp filter forbids it, or vm.unprivileged_userfaultfd is 0"
        return "a security module (SELinux, say) or the kernel forbids it"
    if number == errno.EINVAL:
        return "it came with Linux 5.11"
    if number == errno.EMFILE:
        return "no descriptor is free; raise the limit (ulimit -n)"
    return "the system call does not work"


def _reason(backend: str, ways: Sequence[Way]) -> str:
    better = {"uffd": 0, "uffd-user": 2, "eager": 3}[backend]
    return "; ".join(f"{way.what}: {way.refusal}" for way in ways[:better])


def _change(backend: str, place: _Place, probed: dict[str, WayReport]) -> Change | None:
    """The narrowest single change that gives the full userfaultfd, or None where nothing is to be gained."""
    if backend == "uffd":
        return None
    gain = "every touch is lazy, those of the kernel too"
    if place.device and probed["device"].errno == errno.EACCES and not place.nobody:
        lasts = "until the next boot; a udev rule makes it last"
        if shutil.which("setfacl"):
            command = f"sudo setfacl -m u:{shlex.quote(place.user)}:rw {_DEVICE}"
            return Change(gain, command, f"for this user, {lasts}")
        group = shlex.quote(place.group)
        command = f"sudo chgrp {group} {_DEVICE} && sudo chmod 0660 {_DEVICE}"
        return Change(gain, command, f"for all of the group {place.group}, {lasts}")
    if place.container:
        return Change(
            gain,
            f"docker run --device {_DEVICE} ...",
            "needs Linux 6.1 on the host; before that, --security-opt seccomp=PROFILE with a profile that "
            "allows userfaultfd",
        )
    if place.filtered:
        return Change(
            gain,
            "SystemCallFilter=userfaultfd" if place.service else f"docker run --device {_DEVICE} ...",
            "a seccomp filter cannot be taken off from within; what starts this process must allow it",
        )
    if place.sysctl == "0" and probed["syscall"].errno == errno.EPERM:
        return Change(
            gain, "sudo sysctl -w vm.unprivileged_userfaultfd=1", "for all users, until the next boot"
        )
    return Change(
        gain, "a kernel built with CONFIG_USERFAULTFD=y", "Linux 5.11 or later, 6.8 or later is best"
    )


def _cannot(backend: str, operations: Sequence[str]) -> tuple[str, ...]:
    if backend == "eager":
        return (
            "be lazy with compressed snapshots: open() reads all of them, and needs memory for all. "
            "Uncompressed local files are mapped and stay lazy.",
        )
    found = []
    if backend == "uffd-user":
        found.append(
            "serve touches from inside the kernel: write(2), send(2) or O_DIRECT from memory that nothing "
            "has touched yet fails with EFAULT (Bad address). prefetch() such arrays first."
        )
    if "poison" not in operations:
        found.append(
            "poison pages (Linux 6.6): a touch whose bytes cannot be had ends the process by other means"
        )
    if "move" not in operations:
        found.append("move huge pages into place (Linux 6.8): install='move' is refused")
    return tuple(found)


# ---- limits ----


def _amount(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def _limits() -> tuple[Fact, ...]:
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    threads = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    overcommit = _read("/proc/sys/vm/overcommit_memory")
    return (
        Fact(
            "address space (ulimit -v)",
            _amount(space),
            "" if space == resource.RLIM_INFINITY else "bytes; larger snapshots cannot be opened",
        ),
        Fact("descriptors (ulimit -n)", _amount(files), "an open snapshot takes two" if files < 4096 else ""),
        Fact("processes (ulimit -u)", _amount(threads), "threads count" if 0 <= threads < 1024 else ""),
        Fact("vm.max_map_count", _read("/proc/sys/vm/max_map_count") or "unknown"),
        Fact(
            "vm.overcommit_memory",
            overcommit or "unknown",
            "strict: a snapshot counts with its whole size, touched or not" if overcommit == "2" else "",
        ),
        *_cgroup_memory(),
    )


def _cgroup_memory() -> tuple[Fact, ...]:
    lines = (_read("/proc/self/cgroup") or "").splitlines()
    own = [line[len("0::") :] for line in lines if line.startswith("0::")]
    for folder in (*own, "/"):
        limit = _read(f"/sys/fs/cgroup{folder.rstrip('/')}/memory.max")
        if limit is not None and limit.isdigit():
            return (Fact("memory of this control group", f"{int(limit):,}", "bytes; populated chunks count"),)
    return ()


def _notes() -> tuple[str, ...]:
    """Whether the environment decides what `open` takes."""
    try:
        chosen = OpenOptions.from_environment()
    except OptionError as error:
        return (f"the environment makes open() fail: {error}",)
    usual = OpenOptions()
    return tuple(
        f"LAZYMEM_{name.upper()} makes open() take {name} {getattr(chosen, name)!r}, unless told otherwise"
        for name in ("backend", "install", "threads")
        if getattr(chosen, name) != getattr(usual, name)
    )
