# SPDX-License-Identifier: Apache-2.0
"""First element: how long from a path to one value of one array, page cache warm?

Each child measures the first time in its process, then, for `again`, the median of some more.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

import lazymem

from . import bounds
from .data import KINDS, NAME, Data, files_of
from .harness import Case, Meter, Outcome
from .question import COLOURS, Column, Settings, error_bars, medians

TITLE: Final = "From a path to the first element of one array, page cache warm"
COLUMNS: Final = (
    Column("open ms", "open_seconds", 1e3, 3),
    Column("again ms", "again_seconds", 1e3, 3),
    Column("again: open ms", "again_open_seconds", 1e3, 3),
)
CHUNK: Final = 2 << 20
ARRAYS: Final = 100
_AGAIN: Final = 5

#: When opening was done (perf_counter), and the value.
Once = Callable[[], tuple[float, np.ndarray[Any, Any]]]


def _repeat(meter: Meter, once: Once) -> np.ndarray[Any, Any]:
    with meter:
        started = time.perf_counter()
        opened, value = once()
    meter.note(open_seconds=opened - started)
    whole, opening = [], []
    for _ in range(_AGAIN):
        gc.collect()
        started = time.perf_counter()
        opened, value = once()
        whole.append(time.perf_counter() - started)
        opening.append(opened - started)
    meter.note(again_seconds=statistics.median(whole), again_open_seconds=statistics.median(opening))
    return value


def _lazymem(meter: Meter, path: Path, name: str, **options: Any) -> np.ndarray[Any, Any]:
    def once() -> tuple[float, np.ndarray[Any, Any]]:
        snapshot = lazymem.open(path, **options)
        return time.perf_counter(), snapshot[name][:1].copy()

    return _repeat(meter, once)


def _memmap(meter: Meter, raw: Path) -> np.ndarray[Any, Any]:
    def once() -> tuple[float, np.ndarray[Any, Any]]:
        array = np.memmap(raw, np.uint16, "r")
        return time.perf_counter(), np.array(array[:1])

    return _repeat(meter, once)


def _read(meter: Meter, raw: Path) -> np.ndarray[Any, Any]:
    def once() -> tuple[float, np.ndarray[Any, Any]]:
        array = np.fromfile(raw, np.uint16)
        return time.perf_counter(), array[:1].copy()

    return _repeat(meter, once)


def _decompress(meter: Meter, snapshot: Path, threads: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    def once() -> tuple[float, np.ndarray[Any, Any]]:
        array = bounds.decompress(snapshot, threads).view(dtype)
        return time.perf_counter(), array[:1].copy()

    return _repeat(meter, once)


def _zarr(meter: Meter, path: Path) -> np.ndarray[Any, Any]:
    import zarr

    def once() -> tuple[float, np.ndarray[Any, Any]]:
        array = zarr.open_array(path, mode="r")
        return time.perf_counter(), np.asarray(array[:1])

    return _repeat(meter, once)


def _blosc2(meter: Meter, path: Path) -> np.ndarray[Any, Any]:
    import blosc2

    def once() -> tuple[float, np.ndarray[Any, Any]]:
        array = blosc2.open(str(path), mode="r", mmap_mode="r")
        return time.perf_counter(), np.asarray(array[:1])

    return _repeat(meter, once)


def cases(data: Data, settings: Settings) -> Iterator[Case]:
    def case(name: str, group: str, run: Any, path: Path, kind: str, memory: int = 0) -> Case:
        first = data.digest_of(kind, 0, KINDS[kind].dtype().itemsize)
        return Case(name, group, run, files=tuple(files_of(path)), memory=max(memory, 16 << 20), digest=first)

    whole = 2 * data.nbytes
    for kind, codec in (("bf16", "zstd"), ("smooth", "lz4"), ("bf16", "none")):
        dtype, planes = KINDS[kind].dtype(), codec != "none"
        path = data.snapshot(kind, codec, planes, CHUNK)
        yield case(f"lazymem {codec}", "lazymem", partial(_lazymem, path=path, name=NAME), path, kind)
        if codec == "none":
            continue
        small = data.snapshot(kind, codec, planes, 64 << 10)
        run = partial(_lazymem, path=small, name=NAME)
        yield case(f"lazymem {codec} 64 KiB chunks", "lazymem", run, small, kind)
        run = partial(_decompress, snapshot=path, threads=settings.threads, dtype=dtype)
        yield case(f"decompress whole {codec}", "peer", run, path, kind, whole)
        stored = data.zarr(kind, codec, True, CHUNK)
        yield case(f"zarr {codec}", "peer", partial(_zarr, path=stored), stored, kind)
        stored = data.blosc2(kind, codec, True, CHUNK)
        yield case(f"blosc2 {codec}", "peer", partial(_blosc2, path=stored), stored, kind)
    many = data.many("bf16", ARRAYS, "zstd", CHUNK)
    run = partial(_lazymem, path=many, name=f"{NAME}0")
    yield case(f"lazymem zstd, {ARRAYS} arrays", "lazymem", run, many, "bf16")
    raw = data.raw("bf16")
    yield case("numpy.memmap raw", "peer", partial(_memmap, raw=raw), raw, "bf16")
    yield case("read raw file", "peer", partial(_read, raw=raw), raw, "bf16", whole)


def plot(figure: Any, outcomes: Sequence[Outcome]) -> None:
    shown = [outcome for outcome in outcomes if outcome.error is None]
    shown.sort(key=lambda outcome: outcome.median("seconds") or 0.0)
    axes = figure.subplots()
    names = [outcome.case.name for outcome in shown]
    colours = [COLOURS[outcome.case.kind] for outcome in shown]
    axes.barh(names, medians(shown, "seconds", 1e3), color=colours, xerr=error_bars(shown, "seconds", 1e3))
    axes.plot(medians(shown, "again_seconds", 1e3), names, "k|", markersize=10, label="again, same process")
    axes.set_xscale("log")
    axes.set_xlabel("ms from path to first element (log)")
    axes.legend()
