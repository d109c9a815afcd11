# SPDX-License-Identifier: Apache-2.0
"""Standard streams that may be closed, full, or unable to show every character.

Relies on: Python makes sys.stdin, stdout or stderr None where the descriptor was closed at its start,
and flushes stdout once more as it ends, where a failure is a message and an exit code of its own.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Stands where an OSError names its file.
STDOUT: Final = "standard output"


class _Stdout(io.FileIO):
    """The descriptor of standard output; an error says that it is that."""

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            reason = "is closed" if error.errno == errno.EBADF else error.strerror
            raise OSError(error.errno, reason, STDOUT) from None


def prepare() -> None:
    """Make the three streams usable whatever they are; call once, before anything is opened."""
    _occupy()
    sys.stdout = _stdout(sys.stdout)
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(io.FileIO(os.devnull, "w"))  # nobody can be told anything
    elif hasattr(sys.stderr, "reconfigure"):
        sys.stderr.reconfigure(errors="backslashreplace")


def _occupy() -> None:
    """Open something under the numbers 0 to 2 where they are free.

    Else the next file gets the number, and what the C core says on descriptor 2 goes into a snapshot.
    0 and 1 refuse what they are for, so that nothing reads or prints unnoticed.
    """
    for fd, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # the lowest free number, which is fd


def _stdout(old: TextIO | None) -> TextIO:
    if old is None:
        raw, encoding = _Stdout(os.open(os.devnull, os.O_RDONLY), "w", closefd=False), "utf-8"
    else:
        raw, encoding = _Stdout(old.fileno(), "w", closefd=False), old.encoding
    # What cannot be encoded for this terminal is shown as an escape rather than as a traceback.
    return io.TextIOWrapper(
        io.BufferedWriter(raw, 64 << 10), encoding, "backslashreplace", line_buffering=raw.isatty()
    )


def give_up_stdout() -> None:
    """Let what is still buffered go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
