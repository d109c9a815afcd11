# SPDX-License-Identifier: Apache-2.0
"""`lazymem extract`."""

from __future__ import annotations

import sys
from typing import Any

import click

from .stores import storage_option
from .text import place, plain, progress


@click.command(short_help="Get the original files back, or arrays as other formats.")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option(
    "--format",
    "format_",
    type=click.Choice(("npz", "npy", "raw", "safetensors")),
    help="Write this instead of the original container.",
)
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@storage_option
@click.option("-q", "--quiet", is_flag=True, help="No progress bar, no list of files.")
def extract(
    source: str,
    destination: str,
    names: tuple[str, ...],
    format_: str | None,
    overwrite: bool,
    storage_options: dict[str, Any],
    quiet: bool,
) -> None:
    """Write what is in the snapshot SRC to DST: the files it was built from, or the arrays NAME.

    Without options DST becomes the original container, byte for byte and checked by its SHA-256; a
    folder, if there were several files, as of a model folder. Snapshots of arrays that were in memory,
    or NAMEs, become an .npz. Every file appears whole or not at all. SRC is a path or URL; of a URL only
    the chunks that are written are fetched. DST is local.

    \b
    Examples:
      lazymem extract model.lzm model.safetensors
      lazymem extract all-MiniLM-L6-v2.lzm all-MiniLM-L6-v2/
      lazymem extract --format npz s3://bucket/model.lzm weights.npz
      lazymem extract --format npy model.lzm bias.npy pooler.dense.bias
      lazymem extract --format raw memory.lzm memory.img
    """
    from ..extractor import extract as extract_snapshot

    with progress(f"extracting {place(source)}", quiet=quiet) as report:
        written = extract_snapshot(
            source,
            destination,
            format=format_,
            names=names or None,
            overwrite=overwrite,
            storage_options=storage_options,
            progress=report,
        )
    if not quiet and sys.stdout.isatty():
        for path in written:
            click.echo(f"wrote {plain(str(path))}")
