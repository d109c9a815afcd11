# SPDX-License-Identifier: Apache-2.0
"""Random touches: how long does one 4 KiB piece of a big array take, with 1 to 8 threads asking?

Memory is read by memcpy through ctypes, which leaves the GIL: what is measured is the memory and not
Python's lock. zarr and blosc2 are asked for the same 4 KiB by item access. Every piece is another page;
several may lie in one chunk, and then the first of them pays.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

import lazymem

from . import mounts
from .bounds import PAGE, Bytes, as_bytes
from .contenders import note_stats
from .data import NAME, SEED, Data, files_of
from .harness import Case, Meter, Outcome
from .question import Column, Settings

TITLE: Final = "Random 4 KiB touches, page cache warm"
COLUMNS: Final = (
    Column("touches/s", "touches_per_s", 1, 0),
    Column("p50 µs", "p50_seconds", 1e6, 1),
    Column("p99 µs", "p99_seconds", 1e6, 1),
    Column("chunks", "chunks_populated", 1, 0),
)
THREADS: Final = (1, 2, 4, 8)
CHUNKS: Final = (64 << 10, 256 << 10, 1 << 20, 2 << 20)
_TOUCHES: Final = 512

#: page number, address of 4 KiB to fill
Reader = Callable[[int, int], None]

_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def _run(meter: Meter, raw: Path, threads: int, make: Callable[[], Reader]) -> None:
    pages = raw.stat().st_size // PAGE
    wanted = np.random.default_rng(SEED).permutation(pages)[:_TOUCHES].tolist()
    out = np.ones((len(wanted), PAGE), np.uint8)
    base = out.ctypes.data
    latencies: list[list[int]] = [[] for _ in range(threads)]
    readers = [make() for _ in range(threads)]
    barrier = threading.Barrier(threads + 1)

    def work(which: int) -> None:
        read, took, clock = readers[which], latencies[which], time.perf_counter_ns
        barrier.wait()
        for i in range(which, len(wanted), threads):
            started = clock()
            read(wanted[i], base + i * PAGE)
            took.append(clock() - started)

    team = [threading.Thread(target=work, args=(which,)) for which in range(threads)]
    for thread in team:
        thread.start()
    with meter:
        barrier.wait()
        for thread in team:
            thread.join()
    if not np.array_equal(out, np.fromfile(raw, np.uint8).reshape(-1, PAGE)[wanted]):
        raise ValueError("gave wrong bytes")
    taken = np.concatenate([np.asarray(one) for one in latencies]) / 1e9
    meter.note(
        touches_per_s=len(wanted) / meter.metrics["seconds"],
        p50_seconds=float(np.percentile(taken, 50)),
        p99_seconds=float(np.percentile(taken, 99)),
    )


def _memory_reader(view: Bytes) -> Reader:
    base = view.ctypes.data

    def read(page: int, out: int) -> None:
        _memcpy(out, base + page * PAGE, PAGE)

    return read


def _lazymem(meter: Meter, path: Path, raw: Path, threads: int, **options: Any) -> None:
    snapshot = lazymem.open(path, **options)
    view = as_bytes(snapshot[NAME])
    _run(meter, raw, threads, lambda: _memory_reader(view))
    note_stats(meter, snapshot)


def _memmap(meter: Meter, raw: Path, threads: int) -> None:
    view = np.memmap(raw, np.uint8, "r")
    _run(meter, raw, threads, lambda: _memory_reader(view))


def _mounted(meter: Meter, mount: mounts.Mounted, random: bool, raw: Path, threads: int) -> None:
    view = mounts.fresh(mount, random)
    _run(meter, raw, threads, lambda: _memory_reader(view))


def _item_reader(array: Any) -> Reader:
    per_page = PAGE // array.dtype.itemsize

    def read(page: int, out: int) -> None:
        piece = np.ascontiguousarray(array[page * per_page : (page + 1) * per_page])
        ctypes.memmove(out, piece.ctypes.data, PAGE)

    return read


def _zarr(meter: Meter, path: Path, raw: Path, threads: int) -> None:
    import zarr

    array = zarr.open_array(path, mode="r")
    _run(meter, raw, threads, lambda: _item_reader(array))


def _blosc2(meter: Meter, path: Path, raw: Path, threads: int) -> None:
    import blosc2

    # A handle a thread, one blosc2 thread each: its handles are not for sharing.
    def make() -> Reader:
        return _item_reader(blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1}))

    _run(meter, raw, threads, make)


def cases(data: Data, settings: Settings) -> Iterator[Case]:
    raw = data.raw("bf16")
    series: list[tuple[str, str, str, Path, Any]] = [
        ("numpy.memmap raw", "peer", "bf16", raw, _memmap),
    ]
    for chunk in settings.points(CHUNKS):
        path = data.snapshot("bf16", "zstd", True, chunk)
        series.append(
            (f"lazymem zstd {chunk >> 10} KiB", "lazymem", "bf16", path, partial(_lazymem, path=path))
        )
    path = data.snapshot("bf16", "zstd", True, 256 << 10)
    run: Any = partial(_lazymem, path=path, readahead=0)
    series.append(("lazymem zstd 256 KiB, no readahead", "lazymem", "bf16", path, run))
    path = data.snapshot("smooth", "lz4", True, 64 << 10)
    series.append(("lazymem lz4 64 KiB", "lazymem", "smooth", path, partial(_lazymem, path=path)))
    path = data.snapshot("bf16", "none", False, 2 << 20)
    series.append(("lazymem none", "lazymem", "bf16", path, partial(_lazymem, path=path)))
    path = data.zarr("bf16", "zstd", True, 256 << 10)
    series.append(("zarr zstd 256 KiB", "peer", "bf16", path, partial(_zarr, path=path)))
    path = data.blosc2("bf16", "zstd", True, 2 << 20)
    series.append(("blosc2 zstd 2048 KiB", "peer", "bf16", path, partial(_blosc2, path=path)))
    for mount in mounts.mounted(data, settings, "random_touch"):
        image = mount.image
        run = partial(_mounted, mount=mount, random=False)
        series.append((image.label, "peer", image.kind, mount.path, run))
        if image.system == "erofs":
            # The kernel reads around a touch; who knows better says so. squashfs reads whole blocks anyway.
            run = partial(_mounted, mount=mount, random=True)
            series.append((f"{image.label}, madvise random", "peer", image.kind, mount.path, run))
    for name, group, kind, path, run in series:
        for threads in settings.points(THREADS):
            yield Case(
                name=f"{name}, {threads} thread{'s' if threads > 1 else ''}",
                kind=group,
                run=partial(run, raw=data.raw(kind), threads=threads),
                files=tuple(files_of(path)),
                memory=data.nbytes,
                params={"series": name, "threads": threads},
            )


def plot(figure: Any, outcomes: Sequence[Outcome]) -> None:
    from matplotlib import colormaps

    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.set_prop_cycle(color=colormaps["tab20"].colors)
    series: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.error is None:
            series.setdefault(outcome.case.params["series"], []).append(outcome)
    for name, points in series.items():
        style = "o-" if points[0].case.kind == "lazymem" else "s--"
        style = "^:" if name.startswith(("squashfs", "erofs")) else style
        threads = [point.case.params["threads"] for point in points]
        left.plot(threads, [point.median("touches_per_s") for point in points], style, label=name)
        right.plot(threads, [(point.median("p99_seconds") or 0) * 1e6 for point in points], style)
    for axes, label in ((left, "touches/s (log)"), (right, "p99 latency, µs (log)")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("threads")
        axes.set_ylabel(label)
    figure.legend(loc="outside right upper", fontsize=7)
