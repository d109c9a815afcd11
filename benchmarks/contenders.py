# SPDX-License-Identifier: Apache-2.0
"""lazymem, and what a user would pick instead: from a path to all bytes of one array, touched.

Imports of peers happen before the clock starts. Threads are the processors' number where a contender
takes one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import lazymem

from . import mounts
from .bounds import Bytes, as_bytes, decompress, in_threads, touch
from .data import NAME
from .harness import Meter


def note_stats(meter: Meter, snapshot: lazymem.Snapshot) -> None:
    """The engine's own account of where time went."""
    stats = snapshot.stats()
    meter.note(
        faults=stats.faults,
        chunks_populated=stats.chunks_populated,
        chunks_demand=stats.chunks_demand,
        chunks_prefetch=stats.chunks_prefetch,
        chunks_moved=stats.moved_chunks,
        bytes_read=stats.bytes_read,
        read_seconds=stats.read_seconds,
        check_seconds=stats.check_seconds,
        decode_seconds=stats.decode_seconds,
        install_seconds=stats.install_seconds,
    )


def lazymem_scan(meter: Meter, path: Path, prefetch: bool = False, **options: Any) -> Bytes:
    with meter:
        snapshot = lazymem.open(path, **options)
        view = as_bytes(snapshot[NAME])
        if prefetch:
            snapshot.prefetch(NAME, wait=True)
        touch(view)
    note_stats(meter, snapshot)
    return view


def memmap_scan(meter: Meter, raw: Path) -> Bytes:
    with meter:
        view = np.memmap(raw, np.uint8, "r")
        touch(view)
    return view


def mounted_scan(meter: Meter, mount: mounts.Mounted, threads: int) -> Bytes:
    """Each thread touches a stretch of its own, so that the kernel reads ahead for all of them."""
    mounts.fresh(mount)
    with meter:
        view = np.memmap(mount.file, np.uint8, "r")
        parts = np.array_split(view, threads)

        def work(number: int) -> None:
            touch(parts[number])

        in_threads(threads, threads, lambda: work)
    return view


def read_whole(meter: Meter, raw: Path) -> Bytes:
    with meter:
        view = np.fromfile(raw, np.uint8)
        touch(view)
    return view


def decompress_whole(meter: Meter, snapshot: Path, threads: int) -> Bytes:
    with meter:
        view = decompress(snapshot, threads)
        touch(view)
    return view


def zarr_scan(meter: Meter, path: Path) -> Bytes:
    import zarr

    with meter:
        view = as_bytes(np.asarray(zarr.open_array(path, mode="r")[:]))
        touch(view)
    return view


def blosc2_scan(meter: Meter, path: Path, threads: int) -> Bytes:
    import blosc2

    blosc2.set_nthreads(threads)
    with meter:
        array = blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": threads})
        view = as_bytes(array[:])
        touch(view)
    return view
