# SPDX-License-Identifier: Apache-2.0
"""`lazymem cat`."""

from __future__ import annotations

import sys
from typing import Any

import click

from .stores import storage_option


@click.command(short_help="Write the bytes of one array to standard output.")
@click.argument("source", metavar="SRC")
@click.argument("name", metavar="NAME")
@storage_option
def cat(source: str, name: str, storage_options: dict[str, Any]) -> None:
    """Write the bytes of the array NAME of SRC to standard output.

    Raw bytes as they lie in memory (a view with gaps in C order): no header. SRC, a path or URL, is a
    snapshot, whose bytes are checked before they are written, or a container that is read in place. Of a
    URL only the chunks of NAME are fetched.

    \b
    Examples:
      lazymem cat model.lzm embeddings.position_ids | xxd | head
      lazymem cat memory.lzm data > memory.img
      lazymem cat s3://bucket/model.lzm embeddings.position_ids | sha256sum
    """
    from ..extractor import cat as cat_array

    out = sys.stdout.buffer
    if out.isatty():
        raise click.UsageError("standard output is a terminal, which raw bytes would upset; redirect it")
    cat_array(source, name, out, storage_options=storage_options)
    out.flush()
