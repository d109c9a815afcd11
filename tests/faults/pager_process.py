# SPDX-License-Identifier: Apache-2.0
"""A pager in a process of its own, and clients of it in others, that scripts of tests tell what to do.

All of them are in the script's process group, which `children.run_child` kills at the deadline.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

import lazymem

from .. import pagers
from ..arrays import make_arrays

_PR_SET_PDEATHSIG: Final = 1


class Client:
    """A process that has a snapshot open by a pager: all of its arrays, none of them touched.

    Forked, because starting Python takes longer than most tests; so nothing is open yet in this process.
    """

    def __init__(self, path: object, pager: object, mode: str = "c") -> None:
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ours.close()
                # It may be stopped when this process ends.
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                _answer(theirs, lazymem.open(str(path), pager=str(pager), mode=mode))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()
        self._stream = ours.makefile("rw")
        ours.close()

    def say(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def hear(self) -> str:
        line = self._stream.readline()
        if not line:
            raise AssertionError(f"the client ended, status {os.waitpid(self.pid, 0)[1]}")
        return line

    def ask(self, expression: str) -> Any:
        """What an expression gives in the client, whose names are those of `_answer`."""
        self.say(expression)
        return json.loads(self.hear())

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._stream.close()


_right = functools.cache(make_arrays)


def _answer(connection: socket.socket, snap: lazymem.Snapshot) -> None:
    """Evaluate each line that comes, until there is no more; answer in JSON, or with what was raised."""
    arrays: dict[str, Any] = dict(snap)

    def addresses() -> dict[str, int]:
        return {name: array.ctypes.data for name, array in arrays.items()}

    def wrong(changed: Mapping[str, Mapping[str, Any]] = MappingProxyType({})) -> list[str]:
        expected: dict[str, Any] = {**_right(), **{name: _right()[name].copy() for name in changed}}
        for name, values in changed.items():
            for index, value in values.items():
                expected[name].reshape(-1)[int(index)] = value
        return [name for name in expected if not np.array_equal(arrays[name], expected[name])]

    def write(name: str, index: int, value: Any) -> None:
        arrays[name].reshape(-1)[index] = value

    names = {"os": os, "arrays": arrays, "addresses": addresses, "wrong": wrong, "write": write}
    with connection.makefile("rw") as stream:
        for line in stream:
            try:
                answer = eval(line, names)
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            stream.write(json.dumps(answer) + "\n")
            stream.flush()


@contextlib.contextmanager
def running_pager(*snapshots: object, everybody: bool = False) -> Iterator[str]:
    """The socket of a pager; it ends with the block. snapshots: all that it serves; none: what is asked for.

    everybody: whoever asks is served, else its own user.
    """
    options = ["--pass-device", *(option for one in snapshots for option in ("--snapshot", one))]
    options += ["--any-user"] * everybody
    with tempfile.TemporaryDirectory(prefix="lazymem-pager-") as folder:
        Path(folder).chmod(0o755)
        with pagers.running(Path(folder, "socket"), *options) as pager:
            yield str(pager.path)
