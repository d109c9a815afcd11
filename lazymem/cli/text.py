# SPDX-License-Identifier: Apache-2.0
"""How things are written on a terminal: sizes, times, and text that came out of a file."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TextIO

from ..store import locations

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[int, int | None], None]

# Control characters (a terminal obeys them), the marks that reorder or hide what follows, separators
# that start a line, and halves of surrogate pairs (bytes of a path that are not UTF-8).
_UNSAFE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def plain(text: str) -> str:
    """`text` with everything that a terminal would act on written as an escape, so it fits one line."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def place(location: str) -> str:
    """A path or URL for the eye: plain, and without what may be secret in it."""
    return plain(locations.display(location))


def human_bytes(count: int) -> str:
    """A size as a person reads it: 512 B, 44.7 MiB."""
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        size /= 1024
        if size < 1023.95 or unit == "PiB":
            break
    return f"{size:.0f} {unit}" if size == int(size) else f"{size:.1f} {unit}"


def human_seconds(seconds: float) -> str:
    """A duration with as many digits as it is worth: 85 us, 1.4 ms, 0.31 s, 12 s."""
    if seconds < 0.000_995:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 0.0995:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 9.95 else f"{seconds:.0f} s"


def shape(dimensions: tuple[int, ...]) -> str:
    """Without spaces, so that columns can be cut."""
    return "[" + ",".join(str(length) for length in dimensions) + "]"


def count(number: int, noun: str) -> str:
    """1 array, 1,234 arrays."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def console(stream: TextIO) -> Console:
    """A rich console that prints text as it is: names from files may look like markup."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise  # rich would end the process with code 1, which is verify's for damage

    return Plain(file=stream, markup=False, highlight=False, emoji=False, soft_wrap=True)


@contextmanager
def progress(label: str, *, quiet: bool = False, unit: str = "bytes") -> Iterator[Progress | None]:
    """A progress bar on stderr if that is a terminal, else None.

    unit: "bytes", or what else is counted, in the plural.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich import progress as bars

    amount: list[bars.ProgressColumn] = [bars.TextColumn("{task.completed:,.0f} {task.fields[unit]}")]
    if unit == "bytes":
        amount = [bars.DownloadColumn(binary_units=True), bars.TransferSpeedColumn()]
    columns = [
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(bar_width=None),
        bars.TaskProgressColumn(),
        *amount,
        bars.TimeRemainingColumn(compact=True),
    ]
    with bars.Progress(*columns, console=console(sys.stderr), transient=True) as display:
        task = display.add_task(plain(label), total=None, unit=unit)
        yield lambda done, total: display.update(task, completed=done, total=total)
