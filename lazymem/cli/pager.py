# SPDX-License-Identifier: Apache-2.0
"""`lazymem pager`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from .build import Size
from .pager_populate import populate
from .text import console, count, human_bytes, human_seconds, place, plain

if TYPE_CHECKING:
    from ..pager.server import Server

_REFRESH_SECONDS: Final = 1.0
_socket = click.option(
    "--socket", "path", metavar="PATH", required=True, help="Where the pager listens: a Unix socket."
)


@click.group(short_help="One process that serves the memory of others.")
def pager() -> None:
    """Serve the memory of other processes: all of them share one copy of what is read of a snapshot.

    A program has its memory served with lazymem.open(url, pager=PATH), or, in any language, by the
    protocol of pager_protocol.h.
    """


pager.add_command(populate)


@pager.command(short_help="Be a pager, until SIGTERM or Ctrl-C.")
@_socket
@click.option(
    "--protocol", type=click.Choice(["lazymem", "firecracker"]), default="lazymem", show_default=True,
    help="What is spoken at the socket. firecracker: machines are restored there, with the backend \"Uffd\", "
    "from the one --snapshot, of their memory file; lazymem's own is then spoken at PATH.control.",
)  # fmt: skip
@click.option(
    "--snapshot", "snapshots", metavar="URL", multiple=True,
    help="Serve this one, opened now, and no others than are given so; may be given again. Without it: "
    "whatever this user and root ask for, and nothing to other users.",
)  # fmt: skip
@click.option(
    "--allow-uid", "uids", type=click.IntRange(0), metavar="UID", multiple=True,
    help="This user may connect as well; may be given again.",
)  # fmt: skip
@click.option("--any-user", is_flag=True, help="Every user may connect.")
@click.option(
    "--max-clients", type=click.IntRange(1), default=1024, show_default=True, help="Connections at a time."
)
@click.option(
    "--memory", type=Size(),
    help="What all snapshots together may take, such as 500M or 64G. Default: no limit.",
)  # fmt: skip
@click.option(
    "--threads", type=click.IntRange(1, 64), help="Threads that serve. Default: one a processor, 2 to 8."
)
@click.option(
    "--pass-device", is_flag=True,
    help="Give clients a descriptor of /dev/userfaultfd, so that system calls of ordinary users, too, may "
    "touch what nobody has read yet.",
)  # fmt: skip
@click.option(
    "--take-over", is_flag=True,
    help="Take the clients of the pager that listens there over; it ends. If there is none, just start.",
)  # fmt: skip
def serve(
    path: str, protocol: str, snapshots: tuple[str, ...], uids: tuple[int, ...], any_user: bool,
    max_clients: int, memory: int | None, threads: int | None, pass_device: bool, take_over: bool,
) -> None:  # fmt: skip
    """Serve clients at a socket, and say so in one line once they may come.

    \b
    Examples:
      lazymem pager serve --socket /run/user/1000/pager
      lazymem pager serve --socket /run/pager --snapshot s3://bucket/model.lzm --any-user --pass-device
      lazymem pager serve --socket /run/pager --take-over
      lazymem pager serve --socket /run/machines --protocol firecracker --snapshot s3://bucket/guest.mem.lzm
    """
    from ..pager.server import Limits
    from ..pager.service import Settings
    from ..pager.service import serve as run

    if any_user and uids:
        raise click.UsageError("--any-user and --allow-uid exclude each other; give one of them")
    if protocol == "firecracker" and len(snapshots) != 1:
        raise click.UsageError("--protocol firecracker needs one --snapshot: of the machine's memory file")
    settings = Settings(
        path,
        snapshots,
        None if any_user else uids,
        Limits(max_clients, memory),
        threads,
        pass_device,
        take_over,
        protocol,
    )
    run(settings, _say_ready)


def _say_ready(server: Server, taken: bool) -> None:
    spaces = " with the clients of the pager that was there" if taken else ""
    machines = "".join(f"{plain(path)} for machines, and at " for path in server.other_listeners)
    click.echo(f"listening at {machines}{plain(server.path)}{spaces}, process {os.getpid()}")
    sys.stdout.flush()


@pager.command(short_help="Whom a pager serves, and how fast.")
@_socket
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object; sizes in bytes, latency as a histogram."
)
@click.option("--watch", is_flag=True, help="Go on showing it, once a second, until Ctrl-C.")
def status(path: str, as_json: bool, watch: bool) -> None:
    """Say whom the pager at a socket serves, what is in its memory, and how long touches waited.

    For the pager's own user and root. In the histogram of latencies, number b counts the touches that took
    2^b to 2^(b+1) nanoseconds from the kernel's message to the page in its place.

    \b
    Examples:
      lazymem pager status --socket /run/pager
      lazymem pager status --socket /run/pager --watch
      lazymem pager status --socket /run/pager --json | jq .clients
    """
    from ..paging.client import status as ask

    if as_json and watch:
        raise click.UsageError("--json and --watch exclude each other; give one of them")
    path = os.path.abspath(path)
    if as_json:
        click.echo(json.dumps(ask(path), indent=2))
        return
    out = console(sys.stdout)
    if not watch or not out.is_terminal:
        out.print("\n".join(_view(ask(path))))
        while watch:  # into a pipe: one after another
            sys.stdout.flush()
            time.sleep(_REFRESH_SECONDS)
            out.print("\n".join(["", *_view(ask(path))]))
        return
    from rich.live import Live
    from rich.text import Text

    def screen() -> Text:
        return Text("\n".join(_view(ask(path))), no_wrap=True, overflow="crop")

    with Live(screen(), console=out, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(_REFRESH_SECONDS)
            live.update(screen(), refresh=True)


def _view(found: dict[str, Any]) -> list[str]:
    """What `status` shows, in lines."""
    spaces = {one["space"]: one for one in found["spaces"]}
    lines = [
        f"{plain(found['socket'])}: process {found['pid']}, {count(found['clients'], 'client')}, "
        f"{count(len(spaces), 'space')}, {count(found['faults'], 'fault')}, {found['waiting']:,} waiting"
    ]
    if any(found["latency"]):
        p50, p99 = _latencies(found["latency"])
        lines.append(f"  a touch waits {p50} or less half of the time, {p99} or less 99 % of it")
    snapshots = [("SPACES", "RESIDENT", "OF", "READ", "CHUNKS", "FAILED", "SNAPSHOT")]
    for one in found["snapshots"]:
        chunks = one["chunks_demand"] + one["chunks_prefetch"]
        snapshots.append(
            (f"{one['spaces']:,}", human_bytes(one["resident"]), human_bytes(one["bytes"]),
             human_bytes(one["bytes_read"]), f"{chunks:,}", f"{one['chunks_failed']:,}", place(one["url"]))
        )  # fmt: skip
    clients = [
        ("SPACE", "MAPPED", "SERVED", "FAULTS", "P50", "P99", "WAITING", "UID", "PROCESS", "SNAPSHOT"),
    ]
    for one in sorted(spaces.values(), key=lambda space: int(space["space"])):
        clients.append(
            (str(one["space"]), human_bytes(one["mapped"]), human_bytes(one["served"]), f"{one['faults']:,}",
             *_latencies(one["latency"]), f"{one['waiting']:,}", *_who(one), _url(one, spaces))
        )  # fmt: skip
    for table in (snapshots, clients):
        lines += ["", *_columns(table)] if len(table) > 1 else []
    return lines


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Aligned to the right, but the last."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join([*[*(cell.rjust(width) for cell, width in zip(row, widths, strict=True))][:-1], row[-1]])
        for row in rows
    ]


def _who(space: dict[str, Any]) -> tuple[str, str]:
    client = space["client"]
    if client is not None:
        kind = "" if client["protocol"] == "lazymem" else f" ({plain(client['protocol'])})"
        return str(client["uid"]), f"{client['pid']}{kind}"
    # The kernel tells of a fork, and not of whom.
    return "-", f"child of space {space['parent']}" if space["parent"] else "connection ended"


def _url(space: dict[str, Any], spaces: dict[int, dict[str, Any]]) -> str:
    seen = set()
    while space["client"] is None and space["parent"] in spaces and space["parent"] not in seen:
        seen.add(space["parent"])
        space = spaces[space["parent"]]
    url = (space["client"] or {}).get("url")
    return place(url) if url else "-"


def _latencies(histogram: list[int]) -> tuple[str, str]:
    from ..latency import percentile

    if not any(histogram):
        return "-", "-"
    return human_seconds(percentile(histogram, 50)), human_seconds(percentile(histogram, 99))
