# SPDX-License-Identifier: Apache-2.0
"""Sparse access: how many bytes are read for each that is touched, and how much memory does it take?

All chunks are stored; none is zeros. One thread touches pages in an order that a program might: at random,
in strides, along a column, a tile, a stretch, some short stretches. The bound knows the pages beforehand and
reads each chunk that has one of them once: the sum of those chunks' stored sizes, from the index that lazymem
uses. Each with read-ahead (the default) and without ("off").
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

import lazymem
from lazymem.format.reader import load_index
from lazymem.store.local import LocalBlob

from . import proc
from .bounds import PAGE, as_bytes
from .contenders import note_stats
from .data import NAME, SEED, Data, files_of
from .harness import Case, Meter, Outcome
from .question import COLOURS, Column, Settings, error_bars, medians

TITLE: Final = "Sparse access: bytes read and memory for what is touched, page cache warm"
COLUMNS: Final = (
    Column("touched MiB", "touched_mib"),
    Column("bound MiB", "bound_mib"),
    Column("read MiB", "read_mib"),
    Column("of bound", "of_bound"),
    Column("read:touched", "amplification", 1, 1),
    Column("chunks", "chunks_populated", 1, 0),
    Column("anon MiB", "anonymous_mib", 1, 1),
    Column("beyond MiB", "beyond_mib", 1, 1),
    Column("speed of off", "of_off"),
)
CHUNKS: Final = (64 << 10, 256 << 10, 2 << 20)
_SETTLED_SECONDS: Final = 0.1  # nothing was populated for so long: read-ahead is done
_WIDE: Final = 1 << 20  # a row of the matrix that has a tile cut out
_NARROW: Final = 8 << 10  # a row of the matrix that has a column

Pages = np.ndarray[Any, np.dtype[np.int64]]


def _random(share: float, pages: int, per_chunk: int) -> Pages:
    return np.random.default_rng(SEED).permutation(pages)[: max(1, int(pages * share))]


def _every(stride: int, pages: int, per_chunk: int) -> Pages:
    """The first page of each `stride` bytes."""
    return np.arange(0, pages, stride // PAGE)


def _other_chunks(pages: int, per_chunk: int) -> Pages:
    return np.arange(0, pages, 2 * per_chunk)


def _tile(pages: int, per_chunk: int) -> Pages:
    """From each row of 1 MiB the same 64 KiB in the middle, page after page."""
    rows = np.arange(_WIDE // 2, pages * PAGE, _WIDE) // PAGE
    return (rows[:, None] + np.arange(16)).reshape(-1)


def _stretch(pages: int, per_chunk: int) -> Pages:
    """A tenth, from the middle."""
    return np.arange(pages // 2, pages // 2 + pages // 10)


def _short_stretches(chunks: int, pages: int, per_chunk: int) -> Pages:
    """`chunks` chunks one after another, then on to somewhere else: a tenth of the array in all."""
    count = max(1, pages // per_chunk // 10 // chunks)
    slots = np.random.default_rng(SEED).permutation(max(1, pages // per_chunk // (2 * chunks)))[:count]
    starts = slots * 2 * chunks * per_chunk  # with a gap of the same length after each
    touched: Pages = (starts[:, None] + np.arange(chunks * per_chunk)).reshape(-1)
    return touched[touched < pages]


#: pages of the array, pages of a chunk -> the pages to touch, in order.
PATTERNS: Final[dict[str, Callable[[int, int], Pages]]] = {
    "random 0.1 %": partial(_random, 0.001),
    "random 1 %": partial(_random, 0.01),
    "random 10 %": partial(_random, 0.1),
    "every 1 MiB": partial(_every, _WIDE),
    "every other chunk": _other_chunks,
    "column of 8 KiB rows": partial(_every, _NARROW),
    "tile of 1 MiB rows": _tile,
    "stretch of 10 %": _stretch,
    "stretches of 3 chunks": partial(_short_stretches, 3),
    "stretches of 5 chunks": partial(_short_stretches, 5),
    "stretches of 7 chunks": partial(_short_stretches, 7),
}


def _bound(snapshot: Path, pages: Pages) -> tuple[int, int, int]:
    """(chunks with a page that is touched, their stored bytes, their bytes in memory)."""
    with LocalBlob(str(snapshot)) as blob:
        index = load_index(blob)
    offset, _ = index.range_of(index.rows[NAME])
    chunks = np.unique((offset + pages * PAGE) // index.chunk_size).tolist()
    records = [record for chunk in chunks if (record := index.record_of(chunk)) is not None]
    stored = int(index.records["stored_length"][records].sum(dtype=np.uint64))
    return len(chunks), stored, sum(index.chunk_length(chunk) for chunk in chunks)


def _touch(meter: Meter, path: Path, raw: Path, pattern: str, readahead: int | None) -> None:
    gc.collect()
    before = proc.mib("Anonymous", "smaps_rollup")
    snapshot = lazymem.open(path, readahead=readahead)
    view = as_bytes(snapshot[NAME])
    pages = PATTERNS[pattern](len(view) // PAGE, snapshot.chunk_size // PAGE)
    places, values, read = (pages * PAGE).tolist(), [], proc.io("rchar")
    with meter:
        for place in places:
            values.append(view[place])
    _settle(snapshot)
    read = proc.io("rchar") - read
    anonymous = proc.mib("Anonymous", "smaps_rollup") - before
    if not np.array_equal(values, np.memmap(raw, np.uint8, "r")[places]):
        raise ValueError("gave wrong bytes")
    chunks, stored, memory = _bound(path, pages)
    stats = snapshot.stats()
    meter.note(
        touched_mib=len(pages) * PAGE / 2**20,
        touched_chunks=chunks,
        bound_mib=stored / 2**20,
        read_mib=stats.bytes_read / 2**20,
        process_read_mib=read / 2**20,
        of_bound=stats.bytes_read / stored,
        amplification=stats.bytes_read / (len(pages) * PAGE),
        anonymous_mib=anonymous,
        beyond_mib=anonymous - memory / 2**20,
    )
    note_stats(meter, snapshot)


def _settle(snapshot: lazymem.Snapshot) -> None:
    """Until read-ahead has read what it was going to read anyway."""
    populated, since = -1, time.monotonic()
    while time.monotonic() - since < _SETTLED_SECONDS:
        now = snapshot.stats().chunks_populated
        if now != populated:
            populated, since = now, time.monotonic()
        time.sleep(_SETTLED_SECONDS / 10)


def cases(data: Data, settings: Settings) -> Iterator[Case]:
    patterns = list(PATTERNS)[::3] if settings.tiny else PATTERNS
    for chunk in CHUNKS[:1] if settings.tiny else CHUNKS:
        path = data.snapshot("bf16", "zstd", True, chunk)
        for pattern in patterns:
            on, off = f"{pattern}, {chunk >> 10} KiB", f"{pattern}, {chunk >> 10} KiB, off"
            for ahead, name in ((None, on), (0, off)):
                yield Case(
                    name=name,
                    kind="lazymem",
                    run=partial(_touch, path=path, raw=data.raw("bf16"), pattern=pattern, readahead=ahead),
                    files=tuple(files_of(path)),
                    memory=data.nbytes,
                    params={"pattern": pattern, "chunk": chunk, "readahead": ahead is None},
                    against={"of_off": off} if ahead is None else {},
                    section=f"Chunks of {chunk >> 10} KiB",
                )


def plot(figure: Any, outcomes: Sequence[Outcome]) -> None:
    shown = [outcome for outcome in outcomes if outcome.error is None]
    chunks = sorted({outcome.case.params["chunk"] for outcome in shown})
    if not chunks:
        return
    upper, lower = figure.subplots(2, len(chunks), sharex="row", sharey=True, squeeze=False)
    for column, chunk in enumerate(chunks):
        for ahead, colour, shift in ((True, COLOURS["lazymem"], 0.0), (False, COLOURS["bound"], 0.4)):
            bars = [
                one for one in shown
                if one.case.params["chunk"] == chunk and one.case.params["readahead"] == ahead
            ]  # fmt: skip
            rows = [list(PATTERNS).index(one.case.params["pattern"]) + shift for one in bars]
            label = "read-ahead" if ahead else "no read-ahead"
            for axes, metric in ((upper[column], "of_bound"), (lower[column], "beyond_mib")):
                axes.barh(
                    rows, medians(bars, metric), 0.4, color=colour, label=label, xerr=error_bars(bars, metric)
                )
        for mark in (1.1, 2):
            upper[column].axvline(mark, color="black", linewidth=0.8)
        upper[column].set_title(f"chunks of {chunk >> 10} KiB")
        upper[column].set_xlabel("bytes read, of the bound (lines: 1.1, 2)")
        lower[column].set_xlabel("MiB beyond the chunks touched")
        for axes in (upper[column], lower[column]):
            axes.set_yticks([row + 0.2 for row in range(len(PATTERNS))], list(PATTERNS), fontsize=7)
    upper[0].invert_yaxis()
    upper[-1].legend(fontsize=7)
