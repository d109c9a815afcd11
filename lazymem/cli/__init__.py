# SPDX-License-Identifier: Apache-2.0
"""The command line: parse, call, print. One module a verb; what a verb does lives outside of here.

Owns how a run ends: exit codes, one sentence for an error, silence when a pipe's reader goes away.
Verbs import what they call when they are called, so that `lazymem --help` stays quick.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Final, NoReturn

import click

from .. import __version__
from ..errors import LazymemError, OptionError
from . import streams
from .build import build
from .cache import cache
from .cat import cat
from .copy import copy
from .demo import demo
from .doctor import doctor
from .extract import extract
from .info import info
from .ls import ls
from .pager import pager
from .text import plain
from .verify import verify

EXIT_USAGE: Final = 2
EXIT_ERROR: Final = 3
EXIT_BUG: Final = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
EXIT_PIPE: Final = 128 + signal.SIGPIPE  # what a shell shows for a program that SIGPIPE ended


class _Verbs(click.Group):
    """Lists the verbs in the order in which one meets them, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lazymem")
def cli() -> None:
    """Open a snapshot that lies in a file or an object store, and use it at once as memory.

    \b
    See what it does:            lazymem demo
    Make a snapshot:             lazymem build model.safetensors model.lzm
    Look at it:                  lazymem info model.lzm; lazymem ls model.lzm
    Use it (in Python):          snap = lazymem.open("model.lzm"); snap["name"]
    Put it into a store:         lazymem copy model.lzm s3://bucket/model.lzm
    Use it from there:           snap = lazymem.open("s3://bucket/model.lzm")
    Get the original back:       lazymem extract model.lzm model.safetensors

    ls, info and cat also read .safetensors, .npy, .npz, folders of shards, and any file as raw bytes.

    Wherever a verb reads, it takes a path or a URL: s3://bucket/key, https://host/path, or a folder of
    shards that ends in "/". Credentials, region and endpoint are found where boto3 and the aws command
    find them (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ~/.aws/config, instance roles).

    \b
    Exit codes:
      0    done
      1    verify found damage
      2    a wrong option or argument
      3    an error, named in one sentence: no such file, no space, ...
      70   a defect of lazymem; please report it
      130  interrupted by Ctrl-C
      141  the reader of a pipe went away
    """


for _verb in (demo, build, ls, info, verify, extract, cat, copy, cache, pager, doctor):
    cli.add_command(_verb)


def main() -> NoReturn:
    """The entry point `lazymem`: run, and exit with the code that says how it went."""
    streams.prepare()
    # So that temporary files go when a supervisor or a closed terminal ends the run.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _terminate)
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        code = _failed(error)
    sys.exit(code)


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors are one sentence on stderr."""
    try:
        # Not cli.main: that ends a broken pipe with code 1, which is verify's for damage.
        with cli.make_context("lazymem", list(args)) as context:
            cli.invoke(context)
    except click.exceptions.Exit as end:
        return int(end.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USAGE
    except click.ClickException as error:
        click.echo(f"lazymem: {plain(error.format_message())}{_see_help(error)}", err=True)
        return EXIT_USAGE
    except KeyboardInterrupt:
        click.echo("lazymem: interrupted", err=True)
        return EXIT_INTERRUPTED
    except Exception as error:
        return _failed(error)
    return 0


def _see_help(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f" (`{context.command_path} --help` shows what there is)" if context is not None else ""


def _failed(error: Exception) -> int:
    if isinstance(error, OSError) and error.filename == streams.STDOUT:
        streams.give_up_stdout()
    if isinstance(error, BrokenPipeError):
        return EXIT_PIPE
    if isinstance(error, LazymemError):
        sentence = str(error)
    elif isinstance(error, OSError):
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        sentence = f"{where}{error.strerror or error}"
    elif isinstance(error, MemoryError):
        sentence = "there is not enough memory; close other programs or raise the limit (ulimit -v)"
    else:
        traceback.print_exception(error)
        click.echo("lazymem: this is a defect of lazymem; please report the lines above", err=True)
        return EXIT_BUG
    click.echo(f"lazymem: {plain(sentence)}", err=True)
    return EXIT_USAGE if isinstance(error, OptionError) else EXIT_ERROR


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
