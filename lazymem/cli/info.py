# SPDX-License-Identifier: Apache-2.0
"""`lazymem info`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from .stores import storage_option
from .text import count, human_bytes, plain

if TYPE_CHECKING:
    from ..summary import Summary

_MAX_VALUE = 200


@click.command(short_help="Format, sizes, compression, digest, metadata, origin.")
@click.argument("source", metavar="SRC")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Everything, as one JSON object with the same keys for every SRC; sizes in bytes.",
)
@storage_option
def info(source: str, as_json: bool, storage_options: dict[str, Any]) -> None:
    """Say what SRC is: format, sizes, compression, digest, metadata, and what it was built from.

    SRC is a snapshot or any container that lazymem reads, by path or URL. Only its index is read;
    `lazymem verify` checks the rest.

    \b
    Examples:
      lazymem info model.lzm
      lazymem info --json model.lzm | jq -r .digest
      lazymem info s3://bucket/model.safetensors
      lazymem info s3://bucket/shards/
    """
    from ..summary import summarize

    summary = summarize(source, storage_options=storage_options)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(summary), indent=2))
        return
    click.echo(plain(summary.url))
    for label, value in _lines(summary):
        click.echo(f"  {label:<11} {value}")


def _lines(summary: Summary) -> list[tuple[str, str]]:
    lines = [("format", _format(summary))]
    arrays = f"{count(summary.arrays, 'array')}, {human_bytes(summary.array_bytes)}"
    if summary.views:
        arrays += f", {count(summary.views, 'view')} among them"
    if summary.hidden_arrays:
        arrays += f" (and {count(summary.hidden_arrays, 'hidden part')} of the original)"
    lines.append(("arrays", arrays))
    chunks = summary.chunks
    if chunks is not None:
        lines += [
            ("file", f"{human_bytes(summary.file_bytes)}, ratio {chunks.ratio:.2f}"),
            (
                "memory",
                f"{human_bytes(summary.content_bytes or 0)} in {count(chunks.count, 'chunk')} "
                f"of {human_bytes(chunks.size)}",
            ),
            (
                "stored",
                _parts(f"{count(chunks.stored, 'chunk')}, {human_bytes(chunks.stored_bytes)}", chunks.codecs),
            ),
        ]
        if chunks.filters:
            lines.append(
                (
                    "filters",
                    ", ".join(f"{count(number, 'chunk')} {name}" for name, number in chunks.filters.items()),
                )
            )
        for base in summary.bases:
            lines.append(("base", f"{plain(base.url)}, {human_bytes(base.size)}"))
            lines.append(("  digest", base.digest))
        if summary.bases:
            lines.append(("of them", f"{count(chunks.shared, 'chunk')}, which take nothing here"))
        if chunks.zero:
            lines.append(("zeros", f"{count(chunks.zero, 'chunk')}, stored nowhere"))
        lines.append(("digest", summary.digest or ""))
    else:
        lines.append(("size", f"{human_bytes(summary.file_bytes)} in {count(len(summary.files), 'file')}"))
    origin = summary.container
    if origin is not None:
        exact = (
            "byte for byte"
            if origin.exact
            else f"not byte for byte: {plain(origin.reason or 'no reason is recorded')}"
        )
        lines.append(("built from", f"{plain(origin.format)}; `lazymem extract` gives it back {exact}"))
    for file in origin.files if origin is not None else summary.files:
        lines.append(("", f"{plain(file.name)}, {human_bytes(file.size)}"))
        if file.sha256:
            lines.append(("  SHA-256", file.sha256))
    lines += [("", plain(name)) for name in summary.other_files]
    for key, value in summary.metadata.items():
        text = plain(value if isinstance(value, str) else json.dumps(value))
        if len(text) > _MAX_VALUE:
            text = f"{text[:_MAX_VALUE]}... (--json shows all)"
        lines.append(("metadata", f"{plain(key)} = {text}"))
    if summary.array_metadata:
        lines.append(("", f"and of {count(len(summary.array_metadata), 'array')} (--json shows it)"))
    return lines


def _format(summary: Summary) -> str:
    if summary.compressed_arrays:
        how = f"{count(summary.compressed_arrays, 'array')} compressed: `lazymem build` it first, to open it"
        return f"{summary.format}, {how}"
    if summary.chunks is None:
        return f"{summary.format}, read in place"
    by = f", written by {plain(summary.created_by)}" if summary.created_by else ""
    return f"lazymem snapshot{by}"


def _parts(whole: str, parts: object) -> str:
    items = parts.items() if isinstance(parts, dict) else ()
    return whole + "".join(
        f"{': ' if number == 0 else ', '}{amount:,} {name}" for number, (name, amount) in enumerate(items)
    )
