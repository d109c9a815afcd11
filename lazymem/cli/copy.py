# SPDX-License-Identifier: Apache-2.0
"""`lazymem copy`."""

from __future__ import annotations

import sys
from typing import Any

import click

from .stores import StorageOption, overwrite_option, storage_option
from .text import count, human_bytes, human_seconds, place, plain, progress


@click.command(short_help="Copy a file between stores, byte for byte.")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@overwrite_option
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Hold the chunks of a snapshot against their checksums as they pass.",
)
@storage_option
@click.option(
    "--destination-option",
    "destination_options",
    type=StorageOption(),
    metavar="KEY=VALUE",
    multiple=True,
    help="How the store of DST is reached, if that is another: where one of these is given, no "
    "--storage-option counts for DST.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress bar, no summary.")
def copy(
    source: str,
    destination: str,
    overwrite: bool | None,
    verify: bool,
    storage_options: dict[str, Any],
    destination_options: tuple[tuple[str, Any], ...],
    quiet: bool,
) -> None:
    """Copy SRC to DST: one file or object, of whatever format, from any store to any other.

    Nothing is decompressed; the bytes stay what they are. Reads ahead in parallel, writes in order, with
    bounded memory. DST appears when it is whole; an interrupted upload leaves no parts behind. Where DST is
    a folder, the file goes into it. Of a layer (see build --base) only the layer is copied, and a note says
    which base it needs there.

    \b
    Examples:
      lazymem copy model.lzm s3://bucket/models/model.lzm
      lazymem copy s3://bucket/models/model.lzm .
      lazymem copy --if-none-match s3://bucket/a.lzm s3://other/a.lzm
      lazymem copy -o profile=work --destination-option profile=lab \\
          s3://bucket/a.lzm s3://other/a.lzm
    """
    from ..copier import copy as copy_file

    with progress(f"copying {place(source)}", quiet=quiet) as report:
        result = copy_file(
            source,
            destination,
            overwrite=overwrite,
            verify=verify,
            storage_options=storage_options,
            destination_options=dict(destination_options) or None,
            progress=report,
        )
    if not quiet and result.bases:
        click.echo(
            f"lazymem: note: only the layer was copied; {plain(result.destination)} needs its base "
            f"{', '.join(plain(name) for name in result.bases)}"
            f"{'' if all(name[0] == '/' or '://' in name for name in result.bases) else ' beside it'}",
            err=True,
        )
    if not quiet and sys.stdout.isatty():
        facts = [human_bytes(result.size), human_seconds(result.seconds)]
        if result.checked is not None:
            facts.insert(1, f"{count(result.checked, 'chunk')} checked")
        click.echo(f"{plain(result.destination)}: {', '.join(facts)}")
