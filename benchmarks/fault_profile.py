# SPDX-License-Identifier: Apache-2.0
"""Fault profile: where does the time of one fault go?

One thread touches one page of each chunk, in random order, without read-ahead, so that each touch is one
fault and no two overlap. The engine's counters split the time of populating; `rest` is what the toucher
waited beyond them: trap, message, wake-up of the engine's thread, queue, wake-up of the toucher.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

import lazymem

from .bounds import as_bytes
from .contenders import note_stats
from .data import NAME, SEED, Data, files_of
from .harness import Case, Meter, Outcome
from .question import Column, Settings, medians

TITLE: Final = "Where a fault's time goes"
PARTS: Final = ("read", "check", "decode", "install", "rest")
COLUMNS: Final = (
    Column("µs a fault", "fault_us", 1, 1),
    *(Column(f"{part} µs", f"{part}_us", 1, 1) for part in PARTS),
)
STORED: Final = (("bf16", "zstd", True), ("smooth", "lz4", True), ("bf16", "none", False))
CHUNKS: Final = (64 << 10, 256 << 10, 1 << 20, 2 << 20)
_TOUCHES: Final = 256
_TOUCHES_UNCOUNTED: Final = 2


def _touch_chunks(meter: Meter, path: Path, raw: Path, install: str) -> None:
    snapshot = lazymem.open(path, install=install, readahead=0)
    view = as_bytes(snapshot[NAME])
    count = len(view) // snapshot.chunk_size
    chunks = np.random.default_rng(SEED).permutation(count)[: _TOUCHES + _TOUCHES_UNCOUNTED]
    offsets = (chunks * snapshot.chunk_size).tolist()
    # The engine's threads allocate their buffers at their first chunk.
    for offset in offsets[:_TOUCHES_UNCOUNTED]:
        int(view[offset])
    before, waited, values = snapshot.stats(), 0, []
    offsets = offsets[_TOUCHES_UNCOUNTED:]
    with meter:
        for offset in offsets:
            started = time.perf_counter_ns()
            values.append(int(view[offset]))
            waited += time.perf_counter_ns() - started
    stats = snapshot.stats()
    if values != np.memmap(raw, np.uint8, "r")[offsets].tolist():
        raise ValueError("gave wrong bytes")
    scale = 1e6 / len(offsets)
    parts = {
        part: (getattr(stats, f"{part}_seconds") - getattr(before, f"{part}_seconds")) * scale
        for part in PARTS[:-1]
    }
    meter.note(**{f"{part}_us": value for part, value in parts.items()})
    meter.note(fault_us=waited / 1e9 * scale, rest_us=waited / 1e9 * scale - sum(parts.values()))
    note_stats(meter, snapshot)


def cases(data: Data, settings: Settings) -> Iterator[Case]:
    for kind, codec, planes in STORED:
        for chunk in settings.points(CHUNKS):
            path = data.snapshot(kind, codec, planes, chunk)
            for install in ("copy", "move") if chunk >= 2 << 20 else ("copy",):
                yield Case(
                    name=f"{codec}{'+planes' if planes else ''} {chunk >> 10} KiB {install}",
                    kind="lazymem",
                    run=partial(_touch_chunks, path=path, raw=data.raw(kind), install=install),
                    files=tuple(files_of(path)),
                    memory=data.nbytes,
                    params={"codec": codec, "chunk": chunk, "install": install},
                )


def plot(figure: Any, outcomes: Sequence[Outcome]) -> None:
    shown = [outcome for outcome in outcomes if outcome.error is None]
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
    left.legend()
