# SPDX-License-Identifier: Apache-2.0
"""A pager in a process of its own, and clients of it in others, that scripts of tests tell what to do.

All of them are in the script's process group, which `children.run_child` kills at the deadline.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PAGER = """
import sys
from lazymem._native import pager as native
from lazymem.pager.access import Access
from lazymem.pager.server import Limits, Server

socket, who, *snapshots = sys.argv[1:]
native.start()
server = Server(socket, Access(snapshots, None if who == "everybody" else ()), Limits(), passes_device=True)
server.listen()
print("ready", flush=True)
server.serve()
"""

# Evaluates each line it is told, until there is no more; answers in JSON, or with what was raised.
_CLIENT = """
import ctypes, json, os, sys
import numpy as np
import lazymem
from tests.arrays import make_arrays

snap = lazymem.open(sys.argv[1], pager=sys.argv[2], mode=sys.argv[3])
arrays = dict(snap)

def addresses():
    return {name: array.ctypes.data for name, array in arrays.items()}

def wrong(changed={}):
    expected = make_arrays()
    for name, values in changed.items():
        for index, value in values.items():
            expected[name].reshape(-1)[int(index)] = value
    return [name for name in expected if not np.array_equal(arrays[name], expected[name])]

def write(name, index, value):
    arrays[name].reshape(-1)[index] = value

for line in sys.stdin:
    try:
        answer = eval(line)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer), flush=True)
"""


class Process:
    """A child in this process's group that talks in lines."""

    def __init__(self, code: str, *arguments: object) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._popen.pid

    def hear(self) -> str:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise AssertionError(f"the process ended, status {self._popen.wait()}")
        return line

    def say(self, line: str) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(line + "\n")
        self._popen.stdin.flush()

    def kill(self) -> None:
        self._popen.kill()
        self._popen.communicate()


class Client(Process):
    """A process that has a snapshot open by a pager: all of its arrays, none of them touched."""

    def __init__(self, path: object, socket: object, mode: str = "c") -> None:
        super().__init__(_CLIENT, path, socket, mode)

    def ask(self, expression: str) -> Any:
        """What an expression gives in the client, whose names are those of _CLIENT."""
        self.say(expression)
        return json.loads(self.hear())


@contextlib.contextmanager
def running_pager(*snapshots: object, everybody: bool = False) -> Iterator[str]:
    """The socket of a pager; it ends with the block. snapshots: all that it serves; none: what is asked for.

    everybody: whoever asks is served, else its own user.
    """
    with tempfile.TemporaryDirectory(prefix="lazymem-pager-") as folder:
        Path(folder).chmod(0o755)
        socket = f"{folder}/socket"
        pager = Process(_PAGER, socket, "everybody" if everybody else "own", *snapshots)
        try:
            pager.hear()
            yield socket
        finally:
            pager.kill()
