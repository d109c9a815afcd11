# SPDX-License-Identifier: Apache-2.0
"""Opening: what do `open` and the first array cost, by size, by number of arrays, by number of chunks?

Nothing is touched. Files are hollow: one byte at the start of each array, zeros elsewhere, which take no
room in a snapshot, and none on the disk in the files it is made from. So a tebibyte can be opened, and what
is left to pay for is the index. Stored chunks are made small by compressing well, not by being zeros.

Each child opens for the first time in its process and then, for `again`, some more; anonymous memory is
that of the first time, engine threads included.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

import lazymem
from lazymem.format import structs
from lazymem.format.writer import SnapshotWriter
from lazymem.options import BuildOptions

from . import proc
from .data import NAME, Data, digest
from .harness import Case, Meter, Outcome
from .question import Column, Settings, medians

TITLE: Final = "From a path to one array, nothing touched, page cache warm"
COLUMNS: Final = (
    Column("again ms", "again_seconds", 1e3, 3),
    Column("anonymous MiB", "anonymous_mib", 1, 2),
    Column("index KiB", "index_kib", 1, 1),
)
#: Content, bytes, with one array.
SIZES: Final = (1 << 20, 64 << 20, 1 << 30, 64 << 30, 1 << 40)
#: Arrays of `_SMALL` together.
ARRAYS: Final = (1, 100, 10_000)
#: Stored chunks of 64 KiB, with one array.
CHUNKS: Final = (100, 1_000, 10_000, 100_000)
_SMALL: Final = 64 << 20
_CHUNK: Final = 64 << 10
_AGAIN: Final = 9
_FIRST: Final = 7  # the byte at the start of each array
_SECTIONS: Final = {"size": "By content size", "arrays": "By number of arrays", "chunks": "By stored chunks"}

#: From nothing to what must live on, and the array.
Once = Callable[[], tuple[Any, np.ndarray[Any, Any]]]


def _measure(meter: Meter, once: Once, again: int) -> np.ndarray[Any, Any]:
    gc.collect()
    before = proc.mib("Anonymous", "smaps_rollup")
    with meter:
        kept = once()
    meter.note(anonymous_mib=proc.mib("Anonymous", "smaps_rollup") - before)
    value: np.ndarray[Any, Any] = kept[1][:1].copy()
    del kept
    taken = []
    for _ in range(again):
        gc.collect()
        started = time.perf_counter()
        kept = once()
        taken.append(time.perf_counter() - started)
        del kept
    meter.note(again_seconds=statistics.median(taken))
    return value


def _lazymem(meter: Meter, path: Path, name: str, again: int) -> np.ndarray[Any, Any]:
    def once() -> tuple[Any, np.ndarray[Any, Any]]:
        snapshot = lazymem.open(path)
        return snapshot, snapshot[name]

    value = _measure(meter, once, again)
    if path.suffix == ".lzm":
        meter.note(index_kib=_index_bytes(path) / 1024)
    return value


def _memmap(meter: Meter, path: Path, name: str, again: int) -> np.ndarray[Any, Any]:
    return _measure(meter, lambda: (None, np.memmap(path, np.uint8, "r")), again)


def _safetensors(meter: Meter, path: Path, name: str, again: int) -> np.ndarray[Any, Any]:
    from safetensors import safe_open

    # A slice: its numpy arrays are copies.
    def once() -> tuple[Any, Any]:
        file: Any = safe_open(path, framework="np")
        return file, file.get_slice(name)

    return _measure(meter, once, again)


def _index_bytes(snapshot: Path) -> int:
    with open(snapshot, "rb") as file:
        file.seek(-structs.TAIL.size, os.SEEK_END)
        return int(structs.TAIL.unpack(file.read())["index_length"])


def _hollow_raw(target: Path, nbytes: int) -> None:
    with open(target, "wb") as file:
        file.write(bytes([_FIRST]))
        file.truncate(nbytes)


def _hollow_safetensors(target: Path, nbytes: int, arrays: int) -> None:
    ends = [nbytes * number // arrays for number in range(arrays + 1)]
    header = json.dumps(
        {
            f"{NAME}{number}": {
                "dtype": "U8",
                "shape": [ends[number + 1] - ends[number]],
                "data_offsets": ends[number : number + 2],
            }
            for number in range(arrays)
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    with open(target, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for begin in ends[:-1]:
            file.seek(8 + len(header) + begin)
            file.write(bytes([_FIRST]))
        file.truncate(8 + len(header) + nbytes)


def _many_chunks(target: Path, chunks: int) -> None:
    """No chunk is zeros, and none takes more than some ten bytes."""
    piece = np.zeros(256 * _CHUNK, np.uint8)
    piece[::_CHUNK] = _FIRST
    with open(target, "wb") as file, SnapshotWriter(file, BuildOptions(chunk_size=_CHUNK)) as writer:
        writer.add_array(NAME, np.dtype(np.uint8), (chunks * _CHUNK,))
        for start in range(0, chunks, 256):
            writer.write(piece[: (chunks - start) * _CHUNK])
        writer.finish()


def cases(data: Data, settings: Settings) -> Iterator[Case]:
    first = digest(np.array([_FIRST], np.uint8))

    def case(by: str, number: int, who: str, kind: str, run: Any, path: Path, name: str) -> Case:
        shown = _bytes_text(number) if by == "size" else f"{number:,} {by if number > 1 else by[:-1]}"
        return Case(
            name=f"{who}, {shown}",
            kind=kind,
            run=partial(run, path=path, name=name, again=1 if settings.tiny else _AGAIN),
            # A hollow file is read by nobody; its index is, at the end.
            files=(path,) if path.suffix == ".lzm" else (),
            memory=16 << 20,
            digest=first,
            params={"by": by, "number": number, "who": who},
            section=_SECTIONS[by],
        )

    have_safetensors = importlib.util.find_spec("safetensors") is not None
    if not have_safetensors:
        settings.skipped.append("opening: safetensors is not installed")
    points = [("size", size, size, 1) for size in settings.points(SIZES)]
    points += [("arrays", arrays, _SMALL, arrays) for arrays in settings.points(ARRAYS)]
    for by, number, nbytes, arrays in points:
        stem = f"hollow-{nbytes >> 20}m-{arrays}"
        plain = data.made(f"{stem}.safetensors", partial(_hollow_safetensors, nbytes=nbytes, arrays=arrays))
        packed = data.made(f"{stem}.lzm", partial(lazymem.build, plain))
        name = f"{NAME}{arrays // 2}"
        yield case(by, number, "lazymem", "lazymem", _lazymem, packed, name)
        yield case(by, number, "lazymem, .safetensors in place", "lazymem", _lazymem, plain, name)
        if have_safetensors:
            yield case(by, number, "safetensors", "peer", _safetensors, plain, name)
        if by == "size":
            raw = data.made(f"hollow-{nbytes >> 20}m.raw", partial(_hollow_raw, nbytes=nbytes))
            yield case(by, number, "numpy.memmap", "peer", _memmap, raw, name)
    for chunks in CHUNKS[:1] if settings.tiny else CHUNKS:
        path = data.made(f"hollow-{chunks}-chunks.lzm", partial(_many_chunks, chunks=chunks))
        yield case("chunks", chunks, "lazymem", "lazymem", _lazymem, path, NAME)


def _bytes_text(nbytes: int) -> str:
    units = ("MiB", "GiB", "TiB")
    power = (nbytes.bit_length() - 21) // 10
    return f"{nbytes >> 20 + 10 * power} {units[power]}"


def plot(figure: Any, outcomes: Sequence[Outcome]) -> None:
    shown = [outcome for outcome in outcomes if outcome.error is None]
    labels = {"size": "content, bytes", "arrays": "arrays", "chunks": "stored chunks"}
    panels = dict(zip(_SECTIONS, figure.subplots(1, 3, sharey=True), strict=True))
    for by, axes in panels.items():
        series: dict[str, list[Outcome]] = {}
        for outcome in shown:
            if outcome.case.params["by"] == by:
                series.setdefault(outcome.case.params["who"], []).append(outcome)
        for who, points in series.items():
            numbers = [point.case.params["number"] for point in points]
            style = "o" if points[0].case.kind == "lazymem" else "s"
            (line,) = axes.plot(numbers, medians(points, "seconds", 1e3), f"{style}-", label=f"{who}, first")
            again = medians(points, "again_seconds", 1e3)
            axes.plot(numbers, again, f"{style}:", color=line.get_color(), label=f"{who}, again")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(labels[by])
    panels["size"].set_ylabel("ms from path to array (log)")
    panels["size"].legend(fontsize=7)
