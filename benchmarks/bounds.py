# SPDX-License-Identifier: Apache-2.0
"""What the hardware allows: copying, touching and decoding, with nothing in between.

Decoders are called through the wheels' own C functions, without the GIL, the same functions that the
engine uses; stored bytes are in memory before the clock starts.
"""

from __future__ import annotations

import itertools
import mmap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from lazymem._native._core import ffi, lib
from zstandard import _cffi as zstd  # type: ignore[attr-defined]

from lazymem.format.index import SnapshotIndex
from lazymem.format.reader import load_index
from lazymem.store.local import LocalBlob

from .harness import Meter

PAGE: Final = 4096
HUGE_PAGE: Final = 2 << 20
_PIECE: Final = 2 << 20

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def as_bytes(array: np.ndarray[Any, Any]) -> Bytes:
    return array.reshape(-1).view(np.uint8)


def touch(view: Bytes) -> int:
    """Touch one byte a page; the sum keeps it honest."""
    return int(view[::PAGE].sum())


def fresh_memory(nbytes: int, huge: bool) -> Bytes:
    """Anonymous memory that nothing has touched, with or without huge pages."""
    # Private: the default would be shared memory, which has costs and huge-page rules of its own.
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def in_threads(threads: int, count: int, make: Callable[[], Callable[[int], None]]) -> None:
    """Work through range(count) with `threads` threads, each with a function of its own from `make`."""
    numbers = itertools.count()  # next() is atomic
    failures: list[BaseException] = []

    def work() -> None:
        try:
            function = make()
            while (number := next(numbers)) < count:
                function(number)
        except BaseException as error:
            failures.append(error)

    team = [threading.Thread(target=work) for _ in range(threads)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    if failures:
        raise failures[0]


def touch_resident(meter: Meter, raw: Path) -> Bytes:
    """The touching loop itself, over memory that is there."""
    data = np.fromfile(raw, np.uint8)
    with meter:
        touch(data)
    return data


def copy(meter: Meter, raw: Path, *, threads: int, fresh: bool, huge: bool) -> Bytes:
    """memcpy of the array into memory that is fresh, or that has been touched."""
    source = np.fromfile(raw, np.uint8)
    target = fresh_memory(len(source), huge)
    if not fresh:
        target[::PAGE] = 0

    def piece(number: int) -> None:
        part = slice(number * _PIECE, (number + 1) * _PIECE)
        target[part] = source[part]

    with meter:
        in_threads(threads, -(-len(source) // _PIECE), lambda: piece)
    return target


class StoredChunks:
    """All stored chunks of a snapshot in memory, and the bare decoder over them."""

    def __init__(self, snapshot: Path) -> None:
        with LocalBlob(str(snapshot)) as blob:
            index: SnapshotIndex = load_index(blob)
        self._file = np.fromfile(snapshot, np.uint8)
        self._base = self._file.ctypes.data
        self.chunk_size = index.chunk_size
        self.content_size = index.content_size
        records = index.records
        self._rows = [
            tuple(int(records[name][i]) for name in ("offset", "stored_length", "codec", "width", "filter"))
            for i in range(len(records))
        ]
        self.count = len(self._rows)

    def decoder(self, join: bool, check: bool, place: Callable[[int], int]) -> Callable[[int], None]:
        """A function for one thread that decodes chunk i to the address `place(i)`.

        join: undo byte planes too, as every reader of such a file has to. check: XXH3 of the stored bytes.
        """
        context = zstd.lib.ZSTD_createDCtx()
        scratch = np.ones(self.chunk_size, np.uint8)

        def decode(number: int) -> None:
            offset, stored, codec, width, kind = self._rows[number]
            length = min(self.chunk_size, self.content_size - number * self.chunk_size)
            source, target = self._base + offset, place(number)
            if check:
                lib.lm_codec_checksum(ffi.cast("void *", source), stored)
            first = scratch.ctypes.data if join and kind else target
            if codec == lib.LM_CODEC_ZSTD:
                got = zstd.lib.ZSTD_decompressDCtx(
                    context, zstd.ffi.cast("void *", first), length, zstd.ffi.cast("void *", source), stored
                )
            elif codec == lib.LM_CODEC_LZ4:
                got = lz4_decompress()(source, first, stored, length)
            else:
                ffi.memmove(ffi.cast("void *", first), ffi.cast("void *", source), stored)
                got = stored
            if got != length:
                raise ValueError(f"chunk {number} decoded to {got} bytes, not {length}")
            if first != target:
                lib.lm_planes_join(ffi.cast("void *", first), ffi.cast("void *", target), length, width, kind)

        return decode


_lz4: list[Any] = []


def lz4_decompress() -> Any:
    """LZ4_decompress_safe of the lz4 wheel."""
    if not _lz4:
        import ctypes

        import lz4.block._block as module

        function = ctypes.CDLL(module.__file__).LZ4_decompress_safe
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        _lz4.append(function)
    return _lz4[0]


def decode(
    meter: Meter, snapshot: Path, *, threads: int, target: str, join: bool = True, check: bool = False
) -> Bytes | None:
    """The bare decoder over a snapshot's chunks.

    target: "warm", one buffer a thread, used again for every chunk; "fresh", fresh memory for all;
    "huge", the same with huge pages.
    """
    chunks = StoredChunks(snapshot)
    if target == "warm":

        def make() -> Callable[[int], None]:
            buffer = np.ones(chunks.chunk_size, np.uint8)
            return chunks.decoder(join, check, lambda number: buffer.ctypes.data)

        with meter:
            in_threads(threads, chunks.count, make)
        return None
    memory = fresh_memory(chunks.count * chunks.chunk_size, huge=target == "huge")
    base = memory.ctypes.data
    with meter:
        in_threads(
            threads,
            chunks.count,
            lambda: chunks.decoder(join, check, lambda number: base + number * chunks.chunk_size),
        )
    return memory[: chunks.content_size] if join else None


def decompress(snapshot: Path, threads: int) -> Bytes:
    """Read a compressed file and decompress chunk by chunk into one fresh array: the loader by hand."""
    chunks = StoredChunks(snapshot)
    size = chunks.chunk_size
    memory = fresh_memory(chunks.count * size, huge=True)
    base = memory.ctypes.data
    in_threads(threads, chunks.count, lambda: chunks.decoder(True, False, lambda i: base + i * size))
    return memory[: chunks.content_size]
