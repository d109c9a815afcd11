# SPDX-License-Identifier: Apache-2.0
"""The pager: what does it cost a touch, and what does it spare, that another process serves the memory?

Beside it the same in engines of the clients' own, as many as there are clients, and for touches the smallest
handler (smallest_handler.c). Each measurement has a pager of its own, which begins with nothing decoded.
"Shared" is what another client has had decoded: touches find it in the pager's memory, as minor faults. No
client touches a chunk that another touches; of a full scan all read everything, at the same time.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

import lazymem

from . import smallest_handler
from .bounds import Bytes, as_bytes, touch
from .data import NAME, SEED, Data, digest, files_of
from .harness import Case, Meter, Outcome
from .pager_processes import Team, pss_mib, running_pager
from .question import COLOURS, Column, Settings

TITLE: Final = "The pager beside engines of the clients' own"
COLUMNS: Final = (
    Column("touches/s", "touches_per_s", 1, 0),
    Column("p50 µs", "p50_us", 1, 1),
    Column("p99 µs", "p99_us", 1, 1),
    Column("GB/s", "gb_per_s"),
    Column("of in-process", "of_in_process"),
    Column("of smallest", "of_smallest"),
    Column("all MiB", "pss_mib", 1, 1),
    Column("workers MiB", "workers_mib", 1, 1),
    Column("pager MiB", "pager_mib", 1, 1),
    Column("copies", "copies"),
)
TOUCHES: Final = "One touch of a chunk, by 1 to 16 processes at a time"
SCAN: Final = "Full scan of a compressed snapshot, by 1 and 4 processes at a time"
MEMORY: Final = "Memory (PSS) of processes that have each read all of a compressed snapshot"
CHUNKS: Final = (64 << 10, 2 << 20)
CLIENTS: Final = (1, 4, 16)
SCANNERS: Final = (1, 4)
WORKERS: Final = (1, 4, 8)
_CHUNK: Final = 2 << 20  # of what is scanned
_TOUCHES: Final = 512

#: How a process comes to the bytes.
Show = Callable[[], Bytes]


def _opened(path: Path, pager: str | None) -> Bytes:
    # The array keeps the memory alive.
    return as_bytes(lazymem.open(path, pager=pager)[NAME] if pager else lazymem.open(path)[NAME])


def _prefetch(path: Path, pager: str) -> None:
    lazymem.open(path, pager=pager).prefetch(wait=True)


@contextlib.contextmanager
def _memory(way: str, path: Path) -> Iterator[tuple[Show, int | None]]:
    """How to open the snapshot that way, and the pager's process id if there is one."""
    if way == "in-process":
        yield partial(_opened, path, None), None
        return
    with running_pager() as (socket, pid):
        if way == "shared":
            with Team(1, lambda number: partial(_prefetch, path, socket)) as team:
                team.start()
                team.wait()
        yield partial(_opened, path, socket), pid


# ---- touches ----


def _touches(meter: Meter, show: Show, chunk: int, raw: Path, clients: int) -> None:
    right = np.memmap(raw, np.uint8, "r")
    first, *offsets = (np.random.default_rng(SEED).permutation(len(right) // chunk) * chunk).tolist()
    offsets = offsets[:_TOUCHES]

    def prepare(number: int) -> Callable[[], list[int]]:
        view = show()
        mine = offsets[number::clients]
        int(view[first])  # an engine's threads allocate their buffers at their first chunk

        def work() -> list[int]:
            took, values, clock = [], [], time.perf_counter_ns
            for offset in mine:
                started = clock()
                value = view[offset]
                took.append(clock() - started)
                values.append(int(value))
            if values != right[mine].tolist():
                raise ValueError("gave wrong bytes")
            return took

        return work

    with Team(clients, prepare) as team, meter:
        team.start()
        taken = team.wait()
    took = np.concatenate([np.asarray(one, np.int64) for one in taken])
    meter.note(
        touches_per_s=len(took) / meter.metrics["seconds"],
        p50_us=float(np.percentile(took, 50)) / 1e3,
        p99_us=float(np.percentile(took, 99)) / 1e3,
    )


def _touch_snapshot(meter: Meter, way: str, path: Path, chunk: int, raw: Path, clients: int) -> None:
    with _memory(way, path) as (show, _):
        _touches(meter, show, chunk, raw, clients)


def _touch_smallest(meter: Meter, library: Path, chunk: int, raw: Path, clients: int) -> None:
    source = np.fromfile(raw, np.uint8)
    _touches(meter, partial(smallest_handler.show, library, source, chunk), chunk, raw, clients)


def _touch_cases(data: Data, settings: Settings) -> Iterator[Case]:
    raw, library = data.raw("bf16"), smallest_handler.build(data.folder)
    if library is None:
        settings.skipped.append("pager: without the smallest handler, because there is no C compiler (cc).")
    for chunk in CHUNKS[:1] if settings.tiny else CHUNKS:
        path = data.snapshot("bf16", "zstd", True, chunk)
        for clients in settings.points(CLIENTS):
            where = f"{chunk >> 10} KiB, {clients} process{'es' if clients > 1 else ''}"
            if library is not None:
                yield Case(
                    name=f"smallest handler, {where}",
                    kind="bound",
                    run=partial(_touch_smallest, library=library, chunk=chunk, raw=raw, clients=clients),
                    files=(raw,),
                    memory=2 * data.nbytes,
                    params={"way": "smallest", "chunk": chunk, "clients": clients},
                    section=TOUCHES,
                )
            for way in ("in-process", "pager", "shared"):
                against = {} if way == "in-process" else {"of_in_process": f"in-process, {where}"}
                yield Case(
                    name=f"{way}, {where}",
                    kind="peer" if way == "in-process" else "lazymem",
                    run=partial(_touch_snapshot, way=way, path=path, chunk=chunk, raw=raw, clients=clients),
                    files=tuple(files_of(path)),
                    memory=data.nbytes,
                    params={"way": way, "chunk": chunk, "clients": clients},
                    against=against
                    if library is None
                    else {**against, "of_smallest": f"smallest handler, {where}"},
                    section=TOUCHES,
                )


# ---- all of it ----


def _scan(meter: Meter, way: str, path: Path, clients: int, right: int) -> None:
    def prepare(number: int) -> Callable[[], tuple[int, int, int]]:
        view = show()

        def work() -> tuple[int, int, int]:
            started = time.perf_counter_ns()
            touch(view)
            ended = time.perf_counter_ns()
            if digest(view) != right:
                raise ValueError("gave wrong bytes")
            return started, ended, len(view)

        return work

    with _memory(way, path) as (show, _), Team(clients, prepare) as team:
        team.start()
        times = team.wait()
    # One clock for all processes, and without the check.
    seconds = (max(end for _, end, _ in times) - min(start for start, _, _ in times)) / 1e9
    meter.note(seconds=seconds, gb_per_s=sum(size for _, _, size in times) / seconds / 1e9)


def _scan_cases(data: Data, settings: Settings) -> Iterator[Case]:
    path, right = data.snapshot("bf16", "zstd", True, _CHUNK), data.digest_of("bf16")
    for clients in SCANNERS[1:] if settings.tiny else SCANNERS:
        where = f"scan, {clients} process{'es' if clients > 1 else ''}"
        for way in ("in-process", "pager", "shared"):
            yield Case(
                name=f"{way}, {where}",
                kind="peer" if way == "in-process" else "lazymem",
                run=partial(_scan, way=way, path=path, clients=clients, right=right),
                files=tuple(files_of(path)),
                memory=clients * data.nbytes,
                params={"way": way, "clients": clients},
                against={} if way == "in-process" else {"of_in_process": f"in-process, {where}"},
                section=SCAN,
            )


# ---- memory ----


def _hold(meter: Meter, way: str, path: Path, workers: int, right: int, nbytes: int) -> None:
    def prepare(number: int) -> Callable[[], None]:
        def work() -> None:
            keep.append(show())
            if digest(keep[0]) != right:
                raise ValueError("gave wrong bytes")

        keep: list[Bytes] = []
        return work

    with _memory(way, path) as (show, pager), Team(workers, prepare) as team:
        pagers = [] if pager is None else [pager]
        before, pager_before = pss_mib(team.pids), pss_mib(pagers)
        with meter:
            team.start()
            team.wait()
        held, pager_held = pss_mib(team.pids) - before, pss_mib(pagers) - pager_before
    meter.note(
        pss_mib=held + pager_held,
        workers_mib=held,
        pager_mib=pager_held,
        copies=(held + pager_held) / (nbytes / 2**20),
    )


def _memory_cases(data: Data, settings: Settings) -> Iterator[Case]:
    path, right = data.snapshot("bf16", "zstd", True, _CHUNK), data.digest_of("bf16")
    for workers in WORKERS[-1:] if settings.tiny else WORKERS:
        where = f"memory of {workers} process{'es' if workers > 1 else ''}"
        for way in ("in-process", "pager"):
            yield Case(
                name=f"{way}, {where}",
                kind="peer" if way == "in-process" else "lazymem",
                run=partial(_hold, way=way, path=path, workers=workers, right=right, nbytes=data.nbytes),
                files=tuple(files_of(path)),
                memory=(workers if way == "in-process" else 1) * data.nbytes,
                params={"way": way, "workers": workers},
                section=MEMORY,
            )


def cases(data: Data, settings: Settings) -> Iterator[Case]:
    yield from _touch_cases(data, settings)
    yield from _scan_cases(data, settings)
    yield from _memory_cases(data, settings)


# ---- the plot ----

_WAYS: Final = {
    "smallest": COLOURS["bound"], "in-process": COLOURS["peer"], "pager": COLOURS["lazymem"],
    "shared": "#6cc3a0",
}  # fmt: skip


def _curves(axes: Any, shown: Sequence[Outcome], count: str, metric: str, style: str, label: str) -> None:
    for way, colour in _WAYS.items():
        points = [one for one in shown if one.case.params["way"] == way]
        if points:
            counts = [one.case.params[count] for one in points]
            values = [one.median(metric) for one in points]
            axes.plot(counts, values, style, color=colour, label=f"{way}{label}")


def plot(figure: Any, outcomes: Sequence[Outcome]) -> None:
    good = [one for one in outcomes if one.error is None]
    *latency, scan, memory = figure.subplots(1, len(CHUNKS) + 2)
    for axes, chunk in zip(latency, CHUNKS, strict=True):
        shown = [one for one in good if one.case.params.get("chunk") == chunk]
        _curves(axes, shown, "clients", "p50_us", "o-", ", p50")
        _curves(axes, shown, "clients", "p99_us", "^:", ", p99")
        axes.set(xscale="log", yscale="log", xlabel="processes", ylabel="µs a touch (log)")
        axes.set_title(f"a touch, chunks of {chunk >> 10} KiB")
        axes.set_xticks(CLIENTS, map(str, CLIENTS))
    latency[0].legend(fontsize=7)
    shown = [one for one in good if one.case.section == SCAN]
    scan.barh(
        [f"{one.case.params['way']}, {one.case.params['clients']}" for one in shown],
        [one.median("gb_per_s") for one in shown],
        color=[_WAYS[one.case.params["way"]] for one in shown],
    )
    scan.set_title("full scan")
    scan.set_xlabel("GB/s, all processes together")
    shown = [one for one in good if one.case.section == MEMORY]
    _curves(memory, shown, "workers", "copies", "o-", "")
    memory.set(xlabel="processes", ylabel="copies in memory, the pager's included")
    memory.set_title("memory")
    memory.legend(fontsize=7)
