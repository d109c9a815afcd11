# SPDX-License-Identifier: Apache-2.0
"""`lazymem doctor`."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from typing import TYPE_CHECKING, Final

import click

from .text import console, plain

if TYPE_CHECKING:
    from ..doctor import Fact, Report

_COLUMN: Final = 40
_BACKENDS: Final = {
    "uffd": "every touch is lazy",
    "uffd-user": "touches by your code are lazy, those from inside the kernel are not",
    "sigsegv": "touches by your code are lazy; those from inside the kernel are not",
    "eager": "compressed snapshots are read whole when they are opened",
}


@click.command(short_help="What this machine offers, and what would give more.")
@click.option("--json", "as_json", is_flag=True, help="The same as one JSON object.")
def doctor(as_json: bool) -> None:
    """Say what this machine offers, what lazymem makes of it, and the one change that would give more.

    Tries each way to lazy memory on throw-away pages and changes nothing. Bytes are right whichever
    way is taken; what differs is which touches may be lazy. Exit status 0, whichever it is: scripts
    read `--json`, where "backend" is the one that is taken, "ways" says why not another, and
    "change" what would give a better one (null where there is none).

    \b
    Examples:
      lazymem doctor
      lazymem doctor --json | jq -r .backend
    """
    from ..doctor import examine

    report = examine()
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report), indent=2))
        return
    _print(report)


def _print(report: Report) -> None:
    from rich.text import Text

    out = console(sys.stdout)

    def head(title: str) -> None:
        out.print(Text(f"\n{title}", style="bold"))

    def tried(good: bool, what: str, detail: str) -> None:
        mark = Text("  yes  " if good else "  no   ", style="green" if good else "yellow")
        first, *more = textwrap.wrap(plain(detail), 79 - _COLUMN)
        out.print(mark.append(what.ljust(_COLUMN - 7), style="default").append(first, style="dim"))
        for line in more:
            out.print(Text(" " * _COLUMN + line, style="dim"))

    def prose(text: str) -> None:
        out.print(textwrap.fill(plain(text), 78, initial_indent="  ", subsequent_indent="  "))

    out.print(Text("What lazymem does here", style="bold"))
    style = "bold green" if report.backend == "uffd" else "bold yellow"
    out.print(
        Text(f"  {report.backend}", style=style).append(f": {_BACKENDS[report.backend]}", style="default")
    )
    if report.backend == "sigsegv":
        prose(f"Touches come as {report.way}; chunks are mapped into place.")
    elif report.way is not None:
        prose(f"Faults come through {report.way}; chunks are put in place by {report.install}.")
    for text in report.cannot:
        prose(f"It cannot {text}")
    for note in report.notes:
        prose(f"Note: {note}")
    if report.change is not None:
        head("What would change it")
        out.print(f"  {plain(report.change.command)}")
        prose(f"Then {report.change.gain}. ({report.change.remark})")

    head("Ways in")
    for way in report.ways:
        refusal = f"{way.errno}, {way.refusal}" if way.errno else way.refusal
        tried(way.usable, way.what, ", ".join(way.operations) if way.usable else refusal)
    head("Codecs")
    for codec in report.codecs:
        source = codec.source or "not found; reinstall lazymem with its dependencies"
        tried(codec.source is not None, codec.name, source)
    for title, facts in (
        ("Stores", report.stores),
        ("Machine", report.machine),
        ("Limits", report.limits),
    ):
        head(title)
        for fact in facts:
            out.print(f"  {_fact(fact)}")
    head("Versions")
    prose(", ".join(f"{name} {version}" for name, version in report.versions))


def _fact(fact: Fact) -> str:
    return f"{fact.name.ljust(_COLUMN - 2)}{plain(fact.value)}" + (
        f"  ({fact.remark})" if fact.remark else ""
    )
