# SPDX-License-Identifier: Apache-2.0
"""Memory: how much is resident at the peak, beyond the bytes that were asked for?

The peak is VmHWM, reset before opening; what the process held before is taken off. Pages of mapped
files count, though the kernel shares and reclaims them: `anonymous` is what remains without them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

import lazymem

from . import proc
from .bounds import Bytes, as_bytes, decompress, touch
from .data import NAME, Data, files_of
from .harness import Case, Meter, Outcome
from .question import COLOURS, Column, Settings, medians

TITLE: Final = "Peak memory beyond the bytes asked for"
COLUMNS: Final = (
    Column("asked MiB", "asked_mib", 1, 1),
    Column("peak MiB", "peak_mib", 1, 1),
    Column("beyond MiB", "beyond_mib", 1, 1),
    Column("anonymous MiB", "anonymous_mib", 1, 1),
)
CHUNK: Final = 2 << 20
#: Part of the array that is asked for: one stretch from the middle.
PARTS: Final = {"1 %": 0.01, "all": 1.0}


def _stretch(nbytes: int, part: float) -> slice:
    length = max(4096, int(nbytes * part) // 4096 * 4096)
    first = (nbytes - length) // 2 // 4096 * 4096
    return slice(first, first + length)


def _resident(meter: Meter, load: Callable[[float], tuple[Any, Bytes]], part: float) -> Bytes:
    """Measure `load(part)`, which returns what must live on and the bytes asked for."""
    # A rehearsal, dropped again: code and libraries that a forked child has not touched would count.
    load(PARTS["1 %"])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, anonymous = proc.mib("VmRSS"), proc.mib("Anonymous", "smaps_rollup")
    with meter:
        keep, view = load(part)
        touch(view)
    mib = len(view) / 2**20
    peak = proc.mib("VmHWM") - before
    meter.note(
        asked_mib=mib,
        peak_mib=peak,
        beyond_mib=peak - mib,
        anonymous_mib=proc.mib("Anonymous", "smaps_rollup") - anonymous,
    )
    del keep
    return view


def _part_of(view: Bytes, part: float) -> Bytes:
    return view[_stretch(len(view), part)]


def _items_of(array: Any, part: float) -> Bytes:
    stretch, size = _stretch(array.nbytes, part), array.dtype.itemsize
    return as_bytes(np.asarray(array[stretch.start // size : stretch.stop // size]))


def _lazymem(meter: Meter, path: Path, part: float, **options: Any) -> Bytes:
    def load(part: float) -> tuple[Any, Bytes]:
        snapshot = lazymem.open(path, **options)
        view = _part_of(as_bytes(snapshot[NAME]), part)
        touch(view)  # in the rehearsal too: the engine's threads start with the first fault
        return snapshot, view

    return _resident(meter, load, part)


def _memmap(meter: Meter, raw: Path, part: float) -> Bytes:
    def load(part: float) -> tuple[Any, Bytes]:
        view = np.memmap(raw, np.uint8, "r")
        return view, _part_of(view, part)

    return _resident(meter, load, part)


def _decompress(meter: Meter, path: Path, part: float, threads: int) -> Bytes:
    def load(part: float) -> tuple[Any, Bytes]:
        view = decompress(path, threads)
        return view, _part_of(view, part)

    return _resident(meter, load, part)


def _zarr(meter: Meter, path: Path, part: float) -> Bytes:
    import zarr

    def load(part: float) -> tuple[Any, Bytes]:
        array = zarr.open_array(path, mode="r")
        return array, _items_of(array, part)

    return _resident(meter, load, part)


def _blosc2(meter: Meter, path: Path, part: float, threads: int) -> Bytes:
    import blosc2

    def load(part: float) -> tuple[Any, Bytes]:
        array = blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": threads})
        return array, _items_of(array, part)

    return _resident(meter, load, part)


def cases(data: Data, settings: Settings) -> Iterator[Case]:
    raw, threads = data.raw("bf16"), settings.threads
    packed = data.snapshot("bf16", "zstd", True, CHUNK)
    plain = data.snapshot("bf16", "none", False, CHUNK)
    zarr, blosc2 = data.zarr("bf16", "zstd", True, CHUNK), data.blosc2("bf16", "zstd", True, CHUNK)
    contenders: tuple[tuple[str, str, Path, Any], ...] = (
        ("lazymem zstd copy", "lazymem", packed, partial(_lazymem, path=packed, install="copy")),
        ("lazymem zstd move", "lazymem", packed, partial(_lazymem, path=packed, install="move")),
        ("lazymem none", "lazymem", plain, partial(_lazymem, path=plain)),
        ("numpy.memmap raw", "peer", raw, partial(_memmap, raw=raw)),
        ("decompress whole zstd", "peer", packed, partial(_decompress, path=packed, threads=threads)),
        ("zarr zstd", "peer", zarr, partial(_zarr, path=zarr)),
        ("blosc2 zstd", "peer", blosc2, partial(_blosc2, path=blosc2, threads=threads)),
    )
    for name, group, path, run in contenders:
        for part, share in PARTS.items():
            stretch = _stretch(data.nbytes, share)
            yield Case(
                name=f"{name}, {part}",
                kind=group,
                run=partial(run, part=share),
                files=tuple(files_of(path)),
                memory=2 * data.nbytes,
                digest=data.digest_of("bf16", stretch.start, stretch.stop),
                params={"contender": name, "part": part},
            )


def plot(figure: Any, outcomes: Sequence[Outcome]) -> None:
    for axes, part in zip(figure.subplots(1, len(PARTS)), PARTS, strict=True):
        shown = [one for one in outcomes if one.error is None and one.case.params["part"] == part]
        axes.barh(
            [one.case.params["contender"] for one in shown],
            medians(shown, "beyond_mib"),
            color=[COLOURS[one.case.kind] for one in shown],
        )
        axes.set_xlabel("MiB at the peak beyond the bytes asked for")
        axes.set_title(f"asked for {part}")
