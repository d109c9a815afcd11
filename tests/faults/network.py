# SPDX-License-Identifier: Apache-2.0
"""What tests of remote snapshots share: a child process that is told when to go on, and its fetchers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

DEADLINE = 90.0

#: Sent to a child first. `all_right` touches every byte; `error_of` calls and returns what was raised.
PREAMBLE = """
import ctypes, gc, json, os, signal, sys, threading, time
import numpy as np
import lazymem
from lazymem.errors import *
from lazymem.fetcher.client import fetcher_pid, fetcher_status
from tests.arrays import make_arrays

url, options = sys.argv[1], json.loads(sys.argv[2])
expected = make_arrays()

def opened(**more):
    return lazymem.open(url, storage_options={**options, **more})

def wrong(snap):
    return [name for name in expected if not np.array_equal(snap[name], expected[name])]

def error_of(call, *arguments, **keywords):
    try:
        call(*arguments, **keywords)
    except LazymemError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"

def tell(*words):
    print(*words, flush=True)

def wait():
    sys.stdin.readline()

"""


class Child:
    """A process that touches lazy memory, and talks in lines. Killed with its group at the deadline."""

    def __init__(self, code: str, *arguments: object, deadline: float = DEADLINE) -> None:
        self.mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + textwrap.dedent(code), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "LAZYMEM_TESTS_MARK": self.mark},  # a fetcher inherits it
        )
        self.pid = self._process.pid
        self.expired = False
        self._timer = threading.Timer(deadline, self._expire)
        self._timer.daemon = True
        self._timer.start()
        self._stderr: list[str] = []
        self._drain = threading.Thread(target=self._read_stderr, daemon=True)
        self._drain.start()

    def _expire(self) -> None:
        self.expired = True
        self.kill()

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._stderr.append(line)

    @property
    def stderr(self) -> str:
        return "".join(self._stderr)

    def hear(self) -> str:
        """The next line that it says."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"it ended\n{self._end()}"
        return line.rstrip("\n")

    def say(self) -> None:
        """Go on."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def finish(self) -> int:
        """Its exit status, once it has ended by itself. What it said last stands in `rest`."""
        assert self._process.stdout is not None
        self.rest = self._process.stdout.read()
        self._process.wait()
        self._drain.join()
        assert not self.expired, f"hang: killed at the deadline\n{self.rest}\n{self.stderr}"
        return self._process.returncode

    def check_runs(self) -> None:
        """Raise, with what it said last, if it has ended."""
        assert self._process.poll() is None, self._end()

    def fetchers(self) -> list[int]:
        """Process ids of its fetchers that run, whoever their parent is by now."""
        return fetchers_with(self.mark)

    def _end(self) -> str:
        self._process.wait()
        self._drain.join()
        return (
            f"{'hang: killed at the deadline' if self.expired else self._process.returncode}\n{self.stderr}"
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        self._process.wait()
        self._drain.join()
        self._timer.cancel()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # what it was told and did not hear
                pipe.close()


def check(code: str, *arguments: object, deadline: float = DEADLINE) -> list[str]:
    """Run a child to its good end; the lines that it said."""
    with Child(code, *arguments, deadline=deadline) as child:
        status = child.finish()
        assert status == 0, f"status {status}\n{child.rest}\n{child.stderr}"
        return child.rest.splitlines()


def _processes() -> Iterator[tuple[int, bytes, bytes]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # it has ended; or it is another user's
                yield int(entry.name), (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()


def fetchers_with(mark: str) -> list[int]:
    """Zombies have neither command line nor environment, and do not count."""
    sign = f"LAZYMEM_TESTS_MARK={mark}".encode()
    return [
        pid
        for pid, command, environment in _processes()
        if b"from lazymem.fetcher.process import main" in command and sign in environment
    ]


def wait_until(condition: Callable[[], bool], deadline: float = 30.0) -> None:
    """Poll: what other processes do gives no notice."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)
