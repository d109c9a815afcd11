# SPDX-License-Identifier: Apache-2.0
"""`lazymem verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .stores import storage_option
from .text import count, human_bytes, human_seconds, place, plain, progress

if TYPE_CHECKING:
    from ..verifier import BadChunk, VerifyReport

_MAX_ARRAYS = 3


@click.command(short_help="Check every chunk, and the whole.")
@click.argument("source", metavar="SRC")
@click.option(
    "--quick",
    is_flag=True,
    help="Only the checksums of the stored bytes: nothing is decoded, no SHA-256 is taken.",
)
@click.option("--threads", type=click.IntRange(1, 256), help="Default: one per processor.")
@storage_option
@click.option("-q", "--quiet", is_flag=True, help="Print damage only.")
@click.pass_context
def verify(
    ctx: click.Context,
    source: str,
    quick: bool,
    threads: int | None,
    storage_options: dict[str, Any],
    quiet: bool,
) -> None:
    """Check every chunk of the snapshot SRC, and the whole against its digest.

    Reads all of SRC, a path or URL; from a URL always from the store itself, not from a cache. Goes on
    past damage, so that the list is complete. Exits with 0 if all is well, 1 if something is damaged
    (each bad chunk is listed, with the arrays it holds), 3 if SRC cannot be read as a snapshot at all, or
    its store does not deliver.

    \b
    Examples:
      lazymem verify model.lzm
      lazymem verify --quick s3://bucket/model.lzm && echo fine
    """
    from ..verifier import verify as verify_snapshot

    with progress(f"checking {place(source)}", quiet=quiet, unit="chunks") as report:
        result = verify_snapshot(
            source, threads=threads, deep=not quick, storage_options=storage_options, progress=report
        )
    if result.ok:
        if not quiet:
            click.echo(_fine(result))
        return
    url = plain(result.url)
    click.echo(
        f"{url}: DAMAGED: {len(result.bad):,} of {count(result.stored_chunks, 'stored chunk')}"
        + (f", {count(len(result.problems), 'other problem')}" if result.problems else "")
    )
    for bad in result.bad:
        click.echo(f"  {_bad(bad)}")
        click.echo(f"    {plain(bad.reason)}")
    for problem in result.problems:
        click.echo(f"  {plain(problem.removeprefix(f'{result.url}: '))}")
    ctx.exit(1)


def _fine(result: VerifyReport) -> str:
    checked = "checksums, SHA-256 and digest" if result.deep else "checksums"
    return (
        f"{plain(result.url)}: fine: {count(result.stored_chunks, 'stored chunk')} of {result.chunks:,} "
        f"({human_bytes(result.file_bytes)}) match their {checked}; {human_seconds(result.seconds)}"
    )


def _bad(bad: BadChunk) -> str:
    shown = ", ".join(plain(name) for name in bad.arrays[:_MAX_ARRAYS])
    more = len(bad.arrays) - _MAX_ARRAYS
    arrays = f"{shown} and {more:,} more" if more > 0 else shown or "no array"
    file = "the file" if bad.base is None else f"its base {plain(bad.base)}"
    return f"chunk {bad.chunk}, {bad.length:,} bytes at {bad.offset:,} of {file}, holds {arrays}"
