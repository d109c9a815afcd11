# SPDX-License-Identifier: Apache-2.0
"""`lazymem pager populate`."""

from __future__ import annotations

from typing import Any

import click


class _Number(click.ParamType[int]):
    """A whole number, as debuggers print it: 4096 or 0x7f50101a1200."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = value if isinstance(value, int) else int(value, 0)
        except ValueError:
            number = -1
        if not 0 <= number < 1 << 64:
            self.fail(f"{value!r} is no whole number, such as 4096 or 0x7f50101a1200", param, ctx)
        return number


@click.command(short_help="Put memory of a client in place, for a debugger.")
@click.option(
    "--socket", "path", metavar="PATH", required=True, help="Where the pager listens: a Unix socket."
)
@click.option("--pid", type=click.IntRange(1), help="The client's process id.")
@click.option(
    "--space", type=click.IntRange(1), help="Or its space: a child of a fork is known by that alone."
)
@click.option("--address", type=_Number(), help="Where to begin. Default: everything that it has open.")
@click.option("--length", type=_Number(), default=4096, show_default=True, help="Bytes from there.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing.")
def populate(
    path: str, pid: int | None, space: int | None, address: int | None, length: int, quiet: bool
) -> None:
    """Put memory of a client of the pager in place that it has not touched. The client may be stopped.

    gdb and others that read by ptrace or /proc/PID/mem are refused what was never touched ("Cannot access
    memory", "Input/output error"): the kernel has them wait for no page. After this they read and write it.
    A dump (gcore) wants all of it in place. Whoever reads by process_vm_readv does not need this.

    \b
    Examples:
      lazymem pager populate --socket /run/pager --pid 4711
      (gdb) shell lazymem pager populate --socket /run/pager --pid 4711 --address 0x7f50101a1200
    """
    from ..paging.outside import populate as ask

    if (pid is None) == (space is None):
        raise click.UsageError("give one of --pid and --space")
    if address is not None and length == 0:
        raise click.UsageError("--length is at least 1")
    in_place = ask(path, pid=pid, space=space, address=address or 0, length=0 if address is None else length)
    if not quiet:
        click.echo(f"{in_place:,} bytes are in place")
