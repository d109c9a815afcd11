# SPDX-License-Identifier: Apache-2.0
"""`lazymem build`."""

from __future__ import annotations

import re
import sys
from typing import Any

import click

from ..options import CODECS
from .stores import KeyValue, overwrite_option, storage_option
from .text import count, human_bytes, human_seconds, place, plain, progress

_MAX_LEFT_OUT = 20
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


class Size(click.ParamType[int]):
    """A number of bytes with an optional unit, powers of 1024: 65536, 64K, 2M, 2MiB."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,15})([kmg]?)(?:ib|b)?", str(value).strip(), re.IGNORECASE | re.ASCII)
        if match is None:
            self.fail(f"{value!r} is not a size; write 65536, 64K or 2M", param, ctx)
        return int(match[1]) * _UNITS[match[2].lower()]


@click.command(short_help="Make a snapshot of files, arrays or standard input.")
@click.argument("sources", metavar="SRC...", nargs=-1, required=True)
@click.argument("destination", metavar="DST")
@click.option(
    "--codec", type=click.Choice(CODECS), default="zstd", show_default=True, help="How chunks are compressed."
)
@click.option(
    "--level", type=int, help="The codec's level: zstd -50 to 22 (default 3), lz4 1 to 12 (default 1)."
)
@click.option(
    "--chunk-size",
    type=Size(),
    help="Bytes populated at once, such as 64K or 2M; a power of two from 64K to 64M.  [default: 2M, or the "
    "base's]",
)
@click.option(
    "--base",
    metavar="SNAPSHOT",
    help="Make DST a layer: store only chunks that this snapshot lacks. DST then needs it.",
)
@click.option(
    "--planes/--no-planes",
    default=None,
    help="Split floating-point chunks into byte planes first, always or never; default: where it pays.",
)
@click.option("--threads", type=int, help="Compressing threads; default: one per processor.")
@click.option(
    "--metadata",
    type=KeyValue(),
    metavar="KEY=VALUE",
    multiple=True,
    help="A string to keep with the snapshot; may be given again.",
)
@overwrite_option
@storage_option
@click.option("-q", "--quiet", is_flag=True, help="No progress bar, no summary.")
def build(
    sources: tuple[str, ...],
    destination: str,
    codec: str,
    level: int | None,
    chunk_size: int | None,
    base: str | None,
    planes: bool | None,
    threads: int | None,
    metadata: tuple[tuple[str, str], ...],
    overwrite: bool | None,
    storage_options: dict[str, Any],
    quiet: bool,
) -> None:
    """Build the snapshot DST from SRC.

    SRC is a .safetensors, .npy or .npz file, a model folder, another snapshot, any other file (its bytes
    become the array "data"), or - for standard input. Of a model folder everything goes in: weights,
    configuration, tokenizer; not the same weights in further formats, nor links out of it. Several SRC
    are put into one snapshot. SRC and DST may be URLs (s3://bucket/key; SRC also http and https). DST
    appears when it is whole and synced, or uploaded in full; until then nothing stands under its name, and
    an upload that is interrupted leaves no parts. Memory stays bounded whatever the size of SRC.

    With --base DST stores only what that snapshot lacks, chunk by chunk, wherever it lies in it, and needs it
    from then on, unchanged: by a relative name where it lies beside DST or below, else where it is now. Both
    must be local, or lie in one bucket.

    \b
    Examples:
      lazymem build model.safetensors model.lzm
      lazymem build --codec lz4 --chunk-size 64K weights.npz weights.lzm
      lazymem build all-MiniLM-L6-v2/ model.lzm
      lazymem build --metadata run=42 --metadata by=me shards/ model.lzm
      lazymem build s3://bucket/model.safetensors s3://bucket/model.lzm
      lazymem build --base monday.lzm tuesday.mem tuesday.lzm
      zcat memory.img.gz | lazymem build - memory.lzm
    """
    from ..builder import build as build_snapshot

    if sources == ("-",) and sys.stdin is not None and sys.stdin.isatty():
        raise click.UsageError("standard input is a terminal; pipe the bytes in, or name a file")
    with progress(f"building {place(destination)}", quiet=quiet) as report:
        result = build_snapshot(
            sources[0] if len(sources) == 1 else list(sources),
            destination,
            codec=codec,
            level=level,
            chunk_size=chunk_size,
            base=base,
            planes=planes,
            threads=threads,
            metadata=dict(metadata),
            overwrite=overwrite,
            storage_options=storage_options,
            progress=report,
        )
    if not quiet and not result.exact:
        click.echo(
            f"lazymem: note: `lazymem extract` will not give the source back byte for byte, only its arrays: "
            f"{plain(result.reason or 'no reason is recorded')}",
            err=True,
        )
    if not quiet and result.left_out:
        shown = ", ".join(plain(name) for name in result.left_out[:_MAX_LEFT_OUT])
        more = len(result.left_out) - _MAX_LEFT_OUT
        rest = f" and {more} more" if more > 0 else ""
        click.echo(
            f"lazymem: note: left out, as weights in another format or no file of the folder: {shown}{rest}",
            err=True,
        )
    if not quiet and sys.stdout.isatty():
        ratio = result.source_bytes / result.file_bytes
        click.echo(
            f"{plain(result.path)}: {count(result.arrays, 'array')}, {human_bytes(result.source_bytes)} -> "
            f"{human_bytes(result.file_bytes)} (ratio {ratio:.2f}), {human_seconds(result.seconds)}, "
            f"digest {result.digest}"
        )
