# SPDX-License-Identifier: Apache-2.0
"""`lazymem demo`."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Final

import click

from .build import Size
from .text import console, count, human_bytes, human_seconds, plain, progress

if TYPE_CHECKING:
    from rich.console import Console

    from ..demo import Demo

_ROW: Final = 64  # cells
_MAX_CELLS: Final = 10 * _ROW
_INDENT: Final = " " * 13


@click.command(short_help="See what lazymem does, on this machine, in seconds.")
@click.option("--size", type=Size(), help="Bytes of weights, such as 64M; default 448M. Twice that on disk.")
@click.option(
    "--dir", "folder", metavar="DIR", help="Where to put the files; default: the usual places, by room."
)
def demo(size: int | None, folder: str | None) -> None:
    """Show what lazymem is for, on this machine, in well under a minute.

    Makes a file of weights, builds a snapshot of it, opens that, and touches one tensor: the times,
    the chunks that were loaded, and a map of what is in memory. Then compares every byte with the
    original. Needs no network; leaves nothing behind. Exits with 1 if a byte differs.

    \b
    Examples:
      lazymem demo
      lazymem demo --size 64M --dir /scratch
    """
    from ..demo import DEFAULT_SIZE, Demo

    out = console(sys.stdout)
    with Demo(DEFAULT_SIZE if size is None else size, folder) as run:
        right = _show(out, run)
    out.print(f"\n{plain(run.folder)} is gone again.")
    if not right:
        raise click.exceptions.Exit(1)


def _show(out: Console, run: Demo) -> bool:
    from rich.text import Text

    def step(title: str) -> None:
        out.print(Text(f"\n{title}", style="bold"))

    def timing(seconds: float, what: str) -> None:
        out.print(Text(f"  {human_seconds(seconds):>9}  ", style="cyan").append(what, style="default"))

    out.print(f"Working in {plain(run.folder)} ({human_bytes(run.free)} free there).")
    step("1. A model file, and a snapshot of it")
    with progress("making weights") as report:
        made = run.make_model(report)
    out.print(
        f"  {human_bytes(made.nbytes):>9}  model.safetensors: {count(made.tensors, 'tensor')} "
        f"in {count(made.layers, 'layer')}, bf16 and fp32"
    )
    with progress("building the snapshot") as report:
        built = run.build(report)
    out.print(
        f"  {human_bytes(built.file_bytes):>9}  model.lzm: {count(built.chunks, 'chunk')}, zstd, "
        f"ratio {built.source_bytes / built.file_bytes:.2f}, built in {human_seconds(built.seconds)}"
    )

    step("2. Without lazymem: the whole file at once")
    whole = run.read_file()
    timing(whole, "to read all of model.safetensors with numpy")
    unpacked = run.decompress_file()
    timing(unpacked, "to read, check and decompress all of model.lzm")

    step("3. With lazymem: open it and use it")
    opened = run.open()
    timing(opened.seconds, f"to open model.lzm: {count(built.arrays, 'numpy array')}, nothing read")
    _map(out, opened.states, opened.states)
    touched = run.touch()
    timing(touched.first_seconds, f"for the first element of {touched.name}")
    timing(touched.all_seconds, f"for all {human_bytes(touched.nbytes)} of it")
    _map(out, touched.states, opened.states)
    filled = run.prefetch()
    timing(filled.seconds, "to prefetch everything else")
    _map(out, filled.states, opened.states)
    out.print(Text("Every time above starts on disk: the page cache was asked to forget.", style="dim"))

    step("4. Are they the right bytes?")
    different, compared = run.compare()
    if different:
        out.print(Text(f"NO: {count(different, 'tensor')}, not as in model.safetensors", style="bold red"))
        return False
    same = f"{human_bytes(compared)} compared, every bit as in model.safetensors"
    out.print(Text("       Yes:  ", style="bold green").append(same, style="default"))

    if opened.backend == "eager":
        out.print("\nThis machine lets no touch be lazy, so open read it all; see `lazymem doctor`.")
        return True
    ready = opened.seconds + touched.all_seconds
    zeros = opened.states.count(2)
    step(
        f"{human_seconds(ready)} from open to {human_bytes(touched.nbytes)} of weights in a numpy array: "
        f"{touched.states.count(2) - zeros} of {count(len(touched.states) - zeros, 'chunk')} read.\n"
        f"Reading the whole file took {whole / ready:.0f} times, decompressing it "
        f"{unpacked / ready:.0f} times as long."
    )
    return True


def _map(out: Console, states: bytes, at_open: bytes) -> None:
    """A cell for each chunk, or for several: filled where it is in memory.

    What is present without having been touched holds zeros, unless everything was read at open.
    """
    from rich.text import Text

    marks = ["\N{FULL BLOCK}", "\N{DARK SHADE}", "\N{MIDDLE DOT}", "0"]
    try:
        "".join(marks).encode(out.encoding)
    except UnicodeEncodeError:
        marks = ["#", "+", ".", "0"]
    full, some, none, zeros = marks
    empty = at_open.count(2) if at_open.count(2) < len(at_open) else 0
    each = -(-len(states) // _MAX_CELLS)
    cells: list[tuple[str, str]] = []
    for at in range(0, len(states), each):
        part = states[at : at + each]
        untouched = [state for state, before in zip(part, at_open[at:], strict=False) if before != 2]
        if empty and not untouched:
            cells.append((zeros, "dim"))
        elif not untouched or all(state == 2 for state in untouched):
            cells.append((full, "green"))
        else:
            cells.append((some, "green") if 2 in untouched else (none, "dim"))
    for at in range(0, len(cells), _ROW):
        row = Text(_INDENT)
        for (mark, style), equal in itertools.groupby(cells[at : at + _ROW]):
            row.append(mark * len(list(equal)), style)
        out.print(row)
    note = f"{states.count(2) - empty:,} of {len(states) - empty:,} chunks in memory"
    note += f"; {empty:,} more are all zeros and take nothing" if empty else ""
    note += f"; a cell is {each} chunks" if each > 1 else ""
    out.print(Text(_INDENT + note, style="dim"))
