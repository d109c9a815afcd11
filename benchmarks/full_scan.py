# SPDX-License-Identifier: Apache-2.0
"""Full scan: how long until every page of a big array has been touched, page cache warm?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from . import bounds, contenders, mounts
from .data import Data, files_of
from .harness import Case, Outcome
from .question import CPU, RATE, Column, Settings, error_bars, medians

TITLE: Final = "Full first-touch scan, page cache warm"
COLUMNS: Final = (
    RATE,
    CPU,
    Column("of memcpy", "of memcpy"),
    Column("of decoder", "of decoder"),
    Column("of mounts", "of_mounts"),
    Column("ratio", "ratio"),
    Column("faults", "faults", 1, 0),
)
CHUNK: Final = 2 << 20
CURVE: Final = (64 << 10, 256 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20)
READAHEAD: Final = (0, 2, 8, 32)

#: What is stored how in the main comparison: (bytes, codec, planes).
STORED: Final = (
    ("bf16", "zstd", True),
    ("bf16", "zstd", False),
    ("smooth", "zstd", True),
    ("smooth", "lz4", True),
    ("smooth", "lz4", False),  # what EROFS stores
    ("bf16", "none", False),
)


def stored_name(kind: str, codec: str, planes: bool) -> str:
    return f"{kind} {codec}{'+planes' if planes else ''}"


def cases(data: Data, settings: Settings) -> Iterator[Case]:
    threads, size = settings.threads, data.nbytes
    raw = data.raw("bf16")

    def case(name: str, kind: str, run: Any, path: Path, content: str, memory: int, **more: Any) -> Case:
        return Case(
            name=name,
            kind=kind,
            run=run,
            nbytes=size,
            files=tuple(files_of(path)),
            memory=memory,
            digest=data.digest_of(content) if more.pop("check", True) else None,
            params={"content": content, **more.pop("params", {})},
            against={"of memcpy": "memcpy fresh 1 thread", **more.pop("against", {})},
        )

    yield case("touch resident", "bound", partial(bounds.touch_resident, raw=raw), raw, "bf16", size)
    for name, fresh, huge, team in (
        ("memcpy warm 1 thread", False, True, 1),
        ("memcpy fresh 1 thread", True, False, 1),
        (f"memcpy fresh {threads} threads", True, False, threads),
        (f"memcpy fresh huge {threads} threads", True, True, threads),
    ):
        run: Any = partial(bounds.copy, raw=raw, threads=team, fresh=fresh, huge=huge)
        yield case(name, "bound", run, raw, "bf16", 2 * size)

    yield case("numpy.memmap raw", "peer", partial(contenders.memmap_scan, raw=raw), raw, "bf16", 0)
    yield case("read raw file", "peer", partial(contenders.read_whole, raw=raw), raw, "bf16", size)

    for kind, codec, planes in STORED:
        path, label = data.snapshot(kind, codec, planes, CHUNK), stored_name(kind, codec, planes)
        against = {}
        if codec != "none":
            against = {"of decoder": f"decode fresh {label}"}
            for target in ("warm", "fresh", "huge"):
                run = partial(bounds.decode, snapshot=path, threads=threads, target=target)
                yield case(
                    f"decode {target} {label}", "bound", run, path, kind, 2 * size,
                    check=target != "warm", params={"stored": label, "variant": f"decode {target}"},
                    against=against,
                )  # fmt: skip
            for team in sorted({1, threads}):
                run = partial(contenders.decompress_whole, snapshot=path, threads=team)
                yield case(
                    f"decompress whole {team}t {label}", "peer", run, path, kind, 2 * size,
                    params={"stored": label, "variant": f"decompress whole, {team} threads"}, against=against,
                )  # fmt: skip
        ways: dict[str, dict[str, Any]] = {
            "copy": {"install": "copy"},
            "move": {"install": "move"},
            "copy prefetch": {"install": "copy", "prefetch": True},
        }
        if codec == "none":
            ways["mapped"] = {}
        for way, options in ways.items():
            run = partial(contenders.lazymem_scan, path=path, **options)
            yield case(
                f"lazymem {way} {label}", "lazymem", run, path, kind, size,
                params={"stored": label, "variant": f"lazymem {way}"}, against=against,
            )  # fmt: skip

    for kind, codec, shuffle in (("bf16", "zstd", True), ("smooth", "zstd", True), ("smooth", "lz4", True)):
        label = stored_name(kind, codec, shuffle)
        against = {"of decoder": f"decode fresh {label}"}
        z, b = data.zarr(kind, codec, shuffle, CHUNK), data.blosc2(kind, codec, shuffle, CHUNK)
        for name, path, run in (
            ("zarr", z, partial(contenders.zarr_scan, path=z)),
            ("blosc2", b, partial(contenders.blosc2_scan, path=b, threads=threads)),
        ):
            yield case(
                f"{name} {label}", "peer", run, path, kind, 2 * size,
                params={"stored": label, "variant": name}, against=against,
            )  # fmt: skip

    for mount in mounts.mounted(data, settings, "full_scan"):
        image = mount.image
        # Beside what is packed with the same codec; lz4hc is decoded as lz4 is.
        label = stored_name(image.kind, "zstd" if image.codec == "zstd" else "lz4", True)
        for team in sorted({1} if settings.tiny else {1, threads}):
            yield case(
                f"{image.label}, {team} thread{'s' if team > 1 else ''}", "peer",
                partial(contenders.mounted_scan, mount=mount, threads=team), mount.path, image.kind, size,
                params={"stored": label, "variant": image.system, "mount": image.kind},
                against={"of decoder": f"decode fresh {label}"},
            )  # fmt: skip

    for kind, codec, planes in (("bf16", "zstd", True), ("smooth", "lz4", True), ("bf16", "none", False)):
        label = stored_name(kind, codec, planes)
        for chunk in settings.points(CURVE):
            path = data.snapshot(kind, codec, planes, chunk)
            # A chunk smaller than a huge page is never moved.
            moves = codec == "zstd" and chunk >= bounds.HUGE_PAGE
            for install in ("copy", "move") if moves else ("copy",):
                run = partial(contenders.lazymem_scan, path=path, install=install)
                yield case(
                    f"chunk {chunk >> 10:>4} KiB {install} {label}", "lazymem", run, path, kind, size,
                    params={"curve": label, "chunk": chunk, "install": install},
                )  # fmt: skip
    for kind, codec, planes, chunk in (
        ("bf16", "zstd", True, CHUNK),
        ("bf16", "zstd", True, 256 << 10),
        ("smooth", "lz4", True, CHUNK),
    ):
        path, label = data.snapshot(kind, codec, planes, chunk), stored_name(kind, codec, planes)
        for ahead in settings.points(READAHEAD):
            run = partial(contenders.lazymem_scan, path=path, readahead=ahead)
            yield case(
                f"readahead {ahead:>2} {chunk >> 10} KiB {label}", "lazymem", run, path, kind, size,
                params={"ahead": label, "chunk": chunk, "readahead": ahead},
            )  # fmt: skip


def conclude(outcomes: Sequence[Outcome]) -> None:
    """Speed relative to the fastest mount with the same content in the same round: 2.0 is twice as fast.

    And how much smaller the file is than the bytes in it.
    """
    for outcome in outcomes:
        for run in outcome.runs:
            if run is not None and outcome.case.kind != "bound":
                run["ratio"] = outcome.case.nbytes / sum(file.stat().st_size for file in outcome.case.files)
    mounted = [outcome for outcome in outcomes if "mount" in outcome.case.params]
    for outcome in outcomes:
        if outcome.case.kind != "lazymem":
            continue
        rivals = [one for one in mounted if one.case.params["mount"] == outcome.case.params["content"]]
        for number, run in enumerate(outcome.runs):
            times = [other["seconds"] for one in rivals if (other := one.runs[number]) is not None]
            if run is not None and times:
                run["of_mounts"] = min(times) / run["seconds"]


def plot(figure: Any, outcomes: Sequence[Outcome]) -> None:
    shown = [outcome for outcome in outcomes if outcome.error is None]
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _plot_stored(left, shown)
    _plot_chunks(right, shown)


def _plot_stored(axes: Any, outcomes: Sequence[Outcome]) -> None:
    """GB/s of the best of each family, one group of bars for each way of storing."""
    variants = (
        "decode fresh",
        "lazymem copy",
        "lazymem copy prefetch",
        "lazymem move",
        "decompress whole",
        "zarr",
        "blosc2",
        "squashfs",
        "erofs",
    )
    colours = (
        "#8d99ae", "#0b6e4f", "#6bbf59", "#a7d49b", "#f2a541", "#c8553d", "#8e3b46", "#5f7adb", "#b084cc",
    )  # fmt: skip
    stored = [stored_name(*one) for one in STORED]
    width = 0.8 / len(variants)
    for column, (variant, colour) in enumerate(zip(variants, colours, strict=True)):
        label: str | None = variant
        for row, name in enumerate(stored):
            found = [
                outcome
                for outcome in outcomes
                if outcome.case.params.get("stored") == name
                and (
                    outcome.case.params["variant"] == variant
                    or (variant == "decompress whole" and variant in outcome.case.params["variant"])
                )
            ]
            if found:
                best = max(found, key=lambda outcome: outcome.median("gb_per_s") or 0.0)
                axes.barh(
                    [row + column * width],
                    medians([best], "gb_per_s"),
                    width,
                    color=colour,
                    xerr=error_bars([best], "gb_per_s"),
                    label=label,
                )
                label = None  # once in the legend
    axes.set_yticks([row + 0.35 for row in range(len(stored))], stored)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of memory, from a path to every page touched")
    axes.legend()


def _plot_chunks(axes: Any, outcomes: Sequence[Outcome]) -> None:
    curves: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        if "curve" in outcome.case.params:
            key = (outcome.case.params["curve"], outcome.case.params["install"])
            curves.setdefault(key, []).append(outcome)
    for (stored, install), points in curves.items():
        axes.errorbar(
            [point.case.params["chunk"] / 1024 for point in points],
            medians(points, "gb_per_s"),
            yerr=error_bars(points, "gb_per_s"),
            fmt="o-" if install == "copy" else "^--",
            label=f"{stored}, {install}",
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("chunk, KiB")
    axes.set_ylabel("GB/s")
    axes.set_ylim(bottom=0)
    axes.legend()
