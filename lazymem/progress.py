# SPDX-License-Identifier: Apache-2.0
"""Progress of long calls: a function that is called with bytes, or a bar on standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

#: Called with (bytes done, bytes in all).
Progress = Callable[[int, int], None]


@contextlib.contextmanager
def reporting(progress: Progress | bool | None, what: str) -> Iterator[Progress | None]:
    """What to call: the function that was given; for True one that moves a bar; None for nothing.

    The bar shows where standard error is a terminal, else nothing does. what: the verb beside it.
    """
    if progress is not True:
        yield progress or None
        return
    from rich.console import Console  # slow to import, and few ask for it
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
