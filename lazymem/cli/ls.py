# SPDX-License-Identifier: Apache-2.0
"""`lazymem ls`."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from .stores import storage_option
from .text import human_bytes, plain, shape

if TYPE_CHECKING:
    from ..summary import ListedArray

_MAX_CELL: Final = 20  # leaves room for sizes and names on 80 columns


@click.command(short_help="List arrays: dtype, shape, size, name.")
@click.argument("source", metavar="SRC")
@click.option(
    "-l",
    "--long",
    "long_",
    is_flag=True,
    help="Also order, and the chunks of a snapshot or the compression of a container.",
)
@click.option("--json", "as_json", is_flag=True, help="Everything, as a JSON list; sizes in bytes.")
@storage_option
def ls(source: str, long_: bool, as_json: bool, storage_options: dict[str, Any]) -> None:
    """List the arrays of SRC: dtype, shape, size and name.

    SRC is a snapshot or any container that lazymem reads, by path or URL. Only its index is read: of a
    URL that is a request or two. A terminal gets a long dtype or shape cut short; a pipe and --json get
    all of it.

    \b
    Examples:
      lazymem ls model.lzm
      lazymem ls --long s3://bucket/model.lzm
      lazymem ls https://host/model.safetensors
      lazymem ls model.safetensors | grep attention
      lazymem ls --json model.lzm | jq -r '.[].name'
    """
    from ..summary import list_arrays

    arrays = list_arrays(source, storage_options=storage_options)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(array) for array in arrays], indent=2))
        return
    rows = [_row(array, long_) for array in arrays]
    # Numbers to the right; the name last, because it may be long or in a wide script.
    heads = ("dtype", "shape", "size", *(("order", "where") if long_ else ()), "name")
    if sys.stdout.isatty():
        rows = [heads, *((_cut(row[0]), _cut(row[1]), *row[2:]) for row in rows)]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(len(heads) - 1)]
    for row in rows:
        cells = [
            cell.rjust(width) if column == 2 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row[:-1], widths, strict=True))
        ]
        sys.stdout.write("  ".join([*cells, row[-1]]) + "\n")


def _row(array: ListedArray, long_: bool) -> tuple[str, ...]:
    name = plain(array.name)
    if array.view_of is not None:
        name += f"  (view of {plain(array.view_of)})"
    base = (plain(array.dtype), shape(array.shape), human_bytes(array.nbytes))
    order = array.order if array.strides is None else "-"
    return (*base, *((order, _where(array)) if long_ else ()), name)


def _cut(cell: str) -> str:
    return cell if len(cell) <= _MAX_CELL else f"{cell[: _MAX_CELL - 3]}..."


def _where(array: ListedArray) -> str:
    if array.chunks is None or array.first_chunk is None:
        return array.compression or "plain"
    if array.chunks < 2:
        return f"chunk {array.first_chunk}" if array.chunks else "-"
    return f"chunks {array.first_chunk}-{array.first_chunk + array.chunks - 1}"
