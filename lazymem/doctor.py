# SPDX-License-Identifier: Apache-2.0
"""`examine`: what this machine offers lazymem, which way in it takes, and what one change would give.

`ways` knows the ways and the advice; this adds the rest of the machine, and what the taken way cannot do.
Changes nothing. Relies on: proc(5).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import mmap
import os
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from . import _native
from .errors import LazymemError, OptionError
from .fetcher.client import fetcher_status
from .options import OpenOptions, StoreOptions, cpu_count
from .ways import Change, Way, survey
from .ways.place import SYSCTL, Place, read

_PACKAGES: Final = ("numpy", "ml_dtypes", "cffi", "zstandard", "lz4", "xxhash", "boto3", "click", "rich")


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


def examine() -> Report:
    """Try every way in and read the settings that matter. Takes milliseconds; needs no rights."""
    found = survey()
    way, backend = found.taken, found.backend
    operations = way.operations if way is not None else ()
    return Report(
        versions=_versions(),
        machine=_machine(found.place),
        ways=found.ways,
        backend=backend,
        way=way.what if way is not None else None,
        install="none" if way is None else "copy",
        reason=found.better(),
        change=found.change("uffd"),
        cannot=_cannot(backend, operations),
        codecs=tuple(Codec(name, source or None) for name, source in _native.CODEC_SOURCES.items()),
        limits=_limits(),
        stores=_stores(),
        notes=_notes(),
    )


# ---- the machine ----


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
    return fetcher, clouds, _cache()


def _cache() -> Fact:
    try:
        cache = StoreOptions.from_environment().cache
    except OptionError as error:
        return Fact("cache", "not to be had", str(error))
    return Fact("cache", cache or "off", "" if cache else "set LAZYMEM_CACHE_DIR")


def _machine(place: Place) -> tuple[Fact, ...]:
    huge = read("/sys/kernel/mm/transparent_hugepage/enabled")
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
        Fact(SYSCTL, place.sysctl if place.sysctl is not None else "not there"),
        Fact("user", place.user, _where(place)),
        Fact(
            "seccomp filter",
            "yes" if place.filtered else "no",
            "may hide system calls" if place.filtered else "",
        ),
    )


def _where(place: Place) -> str:
    within = [f"in a container of {place.container}"] if place.container else []
    if place.outside:
        within.append(f"{place.outside} outside of this user namespace")
    return ", ".join(within)


# ---- what is missing ----


def _cannot(backend: str, operations: Sequence[str]) -> tuple[str, ...]:
    if backend == "eager":
        return (
            "be lazy with compressed snapshots: open() reads all of them, and needs memory for all. "
            "Uncompressed local files are mapped and stay lazy.",
        )
    found = []
    if backend in ("uffd-user", "sigsegv"):
        found.append(
            "serve touches from inside the kernel: write(2), send(2) or O_DIRECT from memory that nothing "
            "has touched yet fails with EFAULT (Bad address), and so do functions that end in one, such as "
            "pickle.dump and safetensors' save_file. lazymem.populate() such arrays first."
        )
    if backend == "sigsegv":
        found += [
            "serve a thread that blocks SIGSEGV or SIGBUS: the kernel ends the process there.",
            "take touches after another handler of SIGSEGV or SIGBUS was installed over its own "
            "(faulthandler.enable, signal.signal), before the next open() or prefetch(): the process ends "
            "there, or the touch never returns. Enable faulthandler before open().",
            "follow munmap, mremap or mmap over a part of lazy memory: prefetch() and close() take the whole "
            "range for theirs.",
        ]
        return tuple(found)
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
    file = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    overcommit = read("/proc/sys/vm/overcommit_memory")
    return (
        Fact(
            "address space (ulimit -v)",
            _amount(space),
            "" if space == resource.RLIM_INFINITY else "bytes; larger snapshots cannot be opened",
        ),
        Fact("descriptors (ulimit -n)", _amount(files), "an open snapshot takes two" if files < 4096 else ""),
        Fact(
            "file size (ulimit -f)",
            _amount(file),
            "" if file == resource.RLIM_INFINITY else "bytes; backend sigsegv shows no larger snapshot",
        ),
        Fact("processes (ulimit -u)", _amount(threads), "threads count" if 0 <= threads < 1024 else ""),
        Fact("vm.max_map_count", read("/proc/sys/vm/max_map_count") or "unknown"),
        Fact(
            "vm.overcommit_memory",
            overcommit or "unknown",
            "strict: a snapshot counts with its whole size, touched or not" if overcommit == "2" else "",
        ),
        *_cgroup_memory(),
    )


def _cgroup_memory() -> tuple[Fact, ...]:
    lines = (read("/proc/self/cgroup") or "").splitlines()
    own = [line[len("0::") :] for line in lines if line.startswith("0::")]
    for folder in (*own, "/"):
        limit = read(f"/sys/fs/cgroup{folder.rstrip('/')}/memory.max")
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
