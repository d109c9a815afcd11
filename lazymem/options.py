# SPDX-License-Identifier: Apache-2.0
"""What a caller can choose, as frozen dataclasses; the only reader of the environment.

Imports nothing of lazymem but the errors.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .errors import OptionError

KIB: Final = 1024
MIB: Final = 1024 * KIB

MIN_CHUNK_SIZE: Final = 64 * KIB  # the largest page size Linux uses on machines we run on
MAX_CHUNK_SIZE: Final = 64 * MIB
#: 2 MiB is one huge page on x86-64 and arm64; see benchmarks/README.md for the curve.
DEFAULT_CHUNK_SIZE: Final = 2 * MIB

#: Chunks; see benchmarks/README.md.
DEFAULT_READAHEAD: Final = 8

CODECS: Final = ("none", "lz4", "zstd")
BACKENDS: Final = ("auto", "uffd", "uffd-user", "map", "eager")
MODES: Final = ("r", "c")
INSTALLS: Final = ("auto", "copy", "move")


def cpu_count() -> int:
    """Number of processors this process may run on (its affinity, not the machine's size)."""
    return len(os.sched_getaffinity(0))


def check_chunk_size(value: int) -> int:
    """Return `value` if it is an allowed chunk size in bytes, else raise `OptionError`."""
    _whole("chunk_size", value)
    if not MIN_CHUNK_SIZE <= value <= MAX_CHUNK_SIZE or value & (value - 1):
        raise OptionError(
            f"chunk_size is {value}; it must be a power of two from {MIN_CHUNK_SIZE} (64 KiB) "
            f"to {MAX_CHUNK_SIZE} (64 MiB)"
        )
    return value


def _whole(name: str, value: Any) -> None:
    # numpy's integers count; a bool is an int to Python, but here a mistake.
    try:
        operator.index(value)
    except TypeError:
        whole = False
    else:
        whole = not isinstance(value, bool)
    if not whole:
        raise OptionError(f"{name} is {value!r}; it must be a whole number")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise OptionError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    return value


def check_threads(value: int, name: str = "threads") -> int:
    """Return `value` if it is an allowed number of threads, else raise `OptionError`."""
    _whole(name, value)
    if not 1 <= value <= 256:
        raise OptionError(f"{name} is {value}; it must be from 1 to 256")
    return value


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How a snapshot is shown in memory.

    mode: "r" (writing is an error) or "c" (copy-on-write: private, never written back).
    backend: "auto"; "uffd" (userfaultfd, kernel-context faults too); "uffd-user" (userfaultfd,
        user-mode faults only); "map" (plain file mapping, uncompressed local files only);
        "eager" (read everything at open).
    install: "auto", "copy" (UFFDIO_COPY) or "move" (UFFDIO_MOVE of whole huge pages).
    threads: resolver threads, or None for one per processor (2 to 8). Decided by the first
        snapshot that a process has open; later ones share its engine.
    chunk_size: bytes fetched at once where a container is read in place and not mapped.
    readahead: chunks to populate ahead of a sequential scan, within the array it reads; 0: none.
    """

    mode: str = "r"
    backend: str = "auto"
    install: str = "auto"
    threads: int | None = None
    chunk_size: int = DEFAULT_CHUNK_SIZE
    readahead: int = DEFAULT_READAHEAD

    def __post_init__(self) -> None:
        _choice("mode", self.mode, MODES)
        _choice("backend", self.backend, BACKENDS)
        _choice("install", self.install, INSTALLS)
        check_chunk_size(self.chunk_size)
        if self.threads is not None:
            check_threads(self.threads)
        _whole("readahead", self.readahead)
        if not 0 <= self.readahead <= 4096:
            raise OptionError(f"readahead is {self.readahead}; it must be from 0 to 4096 chunks")

    @classmethod
    def from_environment(
        cls,
        *,
        mode: str = "r",
        backend: str | None = None,
        install: str | None = None,
        threads: int | None = None,
        chunk_size: int | None = None,
        readahead: int | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> OpenOptions:
        """What the caller gave, else LAZYMEM_BACKEND, LAZYMEM_INSTALL, LAZYMEM_THREADS."""
        env = os.environ if environ is None else environ
        if threads is None and "LAZYMEM_THREADS" in env:
            try:
                threads = check_threads(int(env["LAZYMEM_THREADS"]), "LAZYMEM_THREADS")
            except ValueError:
                raise OptionError(
                    f"LAZYMEM_THREADS is {env['LAZYMEM_THREADS']!r}; it must be a number from 1 to 256"
                ) from None
        return cls(
            mode=mode,
            backend=backend if backend is not None else env.get("LAZYMEM_BACKEND", "auto"),
            install=install if install is not None else env.get("LAZYMEM_INSTALL", "auto"),
            threads=threads,
            chunk_size=chunk_size if chunk_size is not None else DEFAULT_CHUNK_SIZE,
            readahead=readahead if readahead is not None else DEFAULT_READAHEAD,
        )


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How a snapshot file is written.

    codec: "none", "lz4" or "zstd". level: the codec's own level; None takes zstd 3, lz4 1.
    planes: split floating-point chunks into byte planes before compression: True (where the
        width fits), False, or None (per chunk, where a sample says that it pays).
    threads: compressing threads; None takes one per processor.
    """

    codec: str = "zstd"
    level: int | None = None
    chunk_size: int = DEFAULT_CHUNK_SIZE
    planes: bool | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        _choice("codec", self.codec, CODECS)
        check_chunk_size(self.chunk_size)
        if self.threads is not None:
            check_threads(self.threads)
        if self.planes is not None and not isinstance(self.planes, bool):
            raise OptionError(f"planes is {self.planes!r}; it must be True, False or None")
        if self.level is not None:
            _whole("level", self.level)
        low, high = {"none": (0, 0), "lz4": (1, 12), "zstd": (-50, 22)}[self.codec]
        if self.level is not None and not low <= self.level <= high:
            raise OptionError(f"level is {self.level}; codec {self.codec} takes {low} to {high}")
