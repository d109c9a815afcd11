# SPDX-License-Identifier: Apache-2.0
"""Fault profile: where does the time of one fault go, and what is the least that it could be?

One thread touches one page of each chunk, in random order, without read-ahead, so that each touch is one
fault and no two overlap. Beside it the smallest handler there can be (smallest_handler.c), which copies
chunks of the same size from memory. `wait`: until a thread of the engine has the kernel's message; `lookup`:
until one works at it; `install`: until
the touched pages are in place; `wake`: until the toucher runs again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

import lazymem

from . import smallest_handler
from .bounds import Bytes, as_bytes
from .contenders import note_stats
from .data import NAME, SEED, Data, files_of
from .harness import Case, Meter, Outcome
from .question import Column, Settings, medians

TITLE: Final = "Where a fault's time goes"
PARTS: Final = ("wait", "lookup", "read", "check", "decode", "install", "wake")
COLUMNS: Final = (
    Column("µs a fault", "fault_us", 1, 1),
    Column("p50 µs", "p50_us", 1, 1),
    Column("p99 µs", "p99_us", 1, 1),
    Column("of smallest", "of_smallest"),
    *(Column(f"{part} µs", f"{part}_us", 1, 1) for part in PARTS),
)
STORED: Final = (("bf16", "zstd", True), ("smooth", "lz4", True), ("bf16", "none", False))
CHUNKS: Final = (64 << 10, 256 << 10, 1 << 20, 2 << 20)
_TOUCHES: Final = 256
_TOUCHES_UNCOUNTED: Final = 2


def _touch_each(
    meter: Meter, view: Bytes, chunk: int, raw: Path, after: Callable[[int, int], None] = lambda t0, t1: None
) -> None:
    """One byte of each of some chunks, in random order. after: gets the times around each touch, ns."""
    chunks = np.random.default_rng(SEED).permutation(len(view) // chunk)[: _TOUCHES + _TOUCHES_UNCOUNTED]
    offsets = (chunks * chunk).tolist()
    # The engine's threads allocate their buffers at their first chunk.
    for offset in offsets[:_TOUCHES_UNCOUNTED]:
        int(view[offset])
    took, values, clock = [], [], time.perf_counter_ns
    offsets = offsets[_TOUCHES_UNCOUNTED:]
    with meter:
        for offset in offsets:
            started = clock()
            value = view[offset]
            ended = clock()
            values.append(int(value))
            took.append(ended - started)
            after(started, ended)
    if values != np.memmap(raw, np.uint8, "r")[offsets].tolist():
        raise ValueError("gave wrong bytes")
    meter.note(
        seconds=sum(took) / 1e9,
        fault_us=sum(took) / len(took) / 1e3,
        p50_us=float(np.percentile(took, 50)) / 1e3,
        p99_us=float(np.percentile(took, 99)) / 1e3,
    )


def _lazymem(meter: Meter, path: Path, raw: Path, install: str) -> None:
    snapshot = lazymem.open(path, install=install, readahead=0)
    view = as_bytes(snapshot[NAME])
    sums = dict.fromkeys(PARTS, 0.0)
    before = snapshot.stats()

    def after(started: int, ended: int) -> None:
        nonlocal before
        stats = snapshot.stats()
        read, begun, installed = stats.last_fault
        took = {
            part: (getattr(stats, f"{part}_seconds") - getattr(before, f"{part}_seconds")) * 1e9
            for part in ("read", "check", "decode")
        }
        took["install"] = installed - begun - sum(took.values())
        took |= {"wait": read - started, "lookup": begun - read, "wake": ended - installed}
        for part, ns in took.items():
            sums[part] += ns
        before = stats

    _touch_each(meter, view, snapshot.chunk_size, raw, after)
    count = min(_TOUCHES, len(view) // snapshot.chunk_size - _TOUCHES_UNCOUNTED)
    meter.note(**{f"{part}_us": ns / count / 1e3 for part, ns in sums.items()})
    note_stats(meter, snapshot)


def _smallest(meter: Meter, library: Path, chunk: int, raw: Path) -> None:
    source = np.fromfile(raw, np.uint8)
    _touch_each(meter, smallest_handler.show(library, source, chunk), chunk, raw)


def cases(data: Data, settings: Settings) -> Iterator[Case]:
    library = smallest_handler.build(data.folder)
    if library is None:
        settings.skipped.append(
            "fault_profile: without the smallest handler, because there is no C compiler (cc)."
        )
    for chunk in settings.points(CHUNKS):
        name = f"smallest handler {chunk >> 10} KiB"
        if library is not None:
            yield Case(
                name=name,
                kind="bound",
                run=partial(_smallest, library=library, chunk=chunk, raw=data.raw("bf16")),
                files=(data.raw("bf16"),),
                memory=2 * data.nbytes,
                params={"codec": "smallest", "chunk": chunk},
            )
        for kind, codec, planes in STORED:
            path = data.snapshot(kind, codec, planes, chunk)
            for install in ("copy", "move") if chunk >= 2 << 20 else ("copy",):
                yield Case(
                    name=f"{codec}{'+planes' if planes else ''} {chunk >> 10} KiB {install}",
                    kind="lazymem",
                    run=partial(_lazymem, path=path, raw=data.raw(kind), install=install),
                    files=tuple(files_of(path)),
                    memory=data.nbytes,
                    params={"codec": codec, "chunk": chunk, "install": install},
                    against={"of_smallest": name} if library is not None else {},
                )


def plot(figure: Any, outcomes: Sequence[Outcome]) -> None:
    shown = [outcome for outcome in outcomes if outcome.error is None and outcome.case.kind == "lazymem"]
    bounds = {
        outcome.case.params["chunk"]: outcome.median("fault_us")
        for outcome in outcomes
        if outcome.error is None and outcome.case.kind == "bound"
    }
    left, right = figure.subplots(1, 2, sharey=True)
    names = [outcome.case.name for outcome in shown]
    whole = np.array(medians(shown, "fault_us"))
    for axes, divisor, label in ((left, 1.0, "µs a fault"), (right, whole / 100, "% of a fault")):
        start = np.zeros(len(shown))
        for part in PARTS:
            values = np.array(medians(shown, f"{part}_us")) / divisor
            axes.barh(names, values, left=start, label=part)
            start += values
        axes.set_xlabel(label)
    for row, outcome in enumerate(shown):
        least = bounds.get(outcome.case.params["chunk"])
        if least is not None:
            left.plot([least, least], [row - 0.4, row + 0.4], "k-", label="" if row else "smallest handler")
    left.legend(fontsize=7)
