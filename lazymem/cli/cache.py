# SPDX-License-Identifier: Apache-2.0
"""`lazymem cache`."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING

import click

from ..options import StoreOptions
from .build import Size
from .text import count, human_bytes, human_seconds, plain

if TYPE_CHECKING:
    from ..cache import CacheInfo, ChunkCache

_directory = click.option(
    "--dir",
    "directory",
    metavar="DIR",
    help="The cache's directory. Default: $LAZYMEM_CACHE_DIR, else ~/.cache/lazymem.",
)


@click.group(short_help="The cache on disk: what is in it, and making room.")
def cache() -> None:
    """Look at, or make room in, the cache that keeps chunks of remote snapshots on the disk.

    It is off unless asked for: by lazymem.open(url, cache=True), by a directory instead of True, or by
    the environment variable LAZYMEM_CACHE_DIR. LAZYMEM_CACHE_SIZE limits it (bytes; default 16 GiB). What
    was not used for longest makes room for what is new, and 5 % of the filesystem, at most 4 GiB, are
    kept free. Any of its files may be removed at any time, also while programs use it.
    """


@cache.command(short_help="How much is in it, and since when.")
@_directory
@click.option("--json", "as_json", is_flag=True, help="One JSON object; sizes in bytes, times in Unix time.")
def info(directory: str | None, as_json: bool) -> None:
    """Say what the cache holds.

    \b
    Examples:
      lazymem cache info
      lazymem cache info --dir /scratch/lazymem --json
    """
    found = _open(directory).info()
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found), indent=2))
        return
    click.echo(plain(found.directory))
    for label, value in _lines(found):
        click.echo(f"  {label:<11} {value}")


@cache.command(short_help="Remove what was not used for longest.")
@_directory
@click.option(
    "--max-size",
    type=Size(),
    help="How much may stay, such as 500M or 4G. Default: $LAZYMEM_CACHE_SIZE, else 16 GiB.",
)
@click.option("--all", "everything", is_flag=True, help="Nothing stays.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
def prune(directory: str | None, max_size: int | None, everything: bool, quiet: bool) -> None:
    """Remove pieces from the cache, those first that were not used for longest, and what crashes left.

    Programs that use the cache go on; they fetch again what they miss.

    \b
    Examples:
      lazymem cache prune --max-size 4G
      lazymem cache prune --all
    """
    if everything and max_size is not None:
        raise click.UsageError("--all and --max-size exclude each other; give one of them")
    report = _open(directory).prune(0 if everything else max_size)
    if not quiet:
        click.echo(
            f"{plain(report.directory)}: removed {count(report.removed, 'file')}, "
            f"{human_bytes(report.removed_bytes)}; {count(report.pieces, 'piece')}, "
            f"{human_bytes(report.bytes)} are left"
        )


def _open(directory: str | None) -> ChunkCache:
    from ..cache import ChunkCache

    options = StoreOptions.from_environment(cache=directory if directory is not None else True)
    assert options.cache is not None  # asked for above
    return ChunkCache(options.cache, options.cache_size)


def _lines(found: CacheInfo) -> list[tuple[str, str]]:
    lines = [
        ("pieces", f"{count(found.pieces, 'piece')} of {count(found.objects, 'object')}"),
        ("size", f"{human_bytes(found.bytes)} of {human_bytes(found.max_bytes)}"),
    ]
    if found.oldest is not None and found.newest is not None:
        lines.append(("last used", f"{_ago(found.newest)}; the oldest {_ago(found.oldest)}"))
    if found.temporaries:
        lines.append(("unfinished", count(found.temporaries, "file")))
    return lines


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for size, noun in ((86400.0, "day"), (3600.0, "hour"), (60.0, "minute")):
        if seconds >= size:
            return f"{count(int(seconds // size), noun)} ago"
    return f"{human_seconds(seconds)} ago"
