# SPDX-License-Identifier: Apache-2.0
"""Real `lazymem pager serve` processes, and raw clients that speak their protocol."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lazymem.paging import client, wire
from lazymem.paging.wire import Answer, Ask

DEADLINE = 60.0


class Pager:
    """A pager process. out: the line that it was ready with."""

    def __init__(self, path: Path, *options: object, prefix: tuple[str, ...] = ()) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "lazymem", "pager", "serve", "--socket", str(path),
             *map(str, options)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            self.out = line_of(self.process)
        except BaseException:
            self.kill()
            raise

    def status(self) -> dict[str, Any]:
        return client.status(str(self.path))

    def wait(self) -> tuple[int, str]:
        """Its exit status and standard error, once it has ended."""
        _, err = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, err

    def end(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def running(path: Path, *options: object, prefix: tuple[str, ...] = ()) -> Iterator[Pager]:
    """A pager that listens at `path`; killed at the end if it still runs."""
    pager = Pager(path, *options, prefix=prefix)
    try:
        yield pager
    finally:
        pager.kill()


def refusal(path: Path, *options: object) -> tuple[int, str]:
    """Exit status and standard error of a pager that cannot start."""
    done = subprocess.run(
        [sys.executable, "-m", "lazymem", "pager", "serve", "--socket", str(path), *map(str, options)],
        capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    return done.returncode, done.stderr


def line_of(process: subprocess.Popen[str], deadline: float = DEADLINE) -> str:
    """The next line of a process; AssertionError with its standard error if none comes."""
    assert process.stdout is not None
    assert process.stderr is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(deadline):
            process.kill()
            raise AssertionError(f"hang: no line within {deadline} s\n{process.communicate()[1]}")
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return line.rstrip("\n")


class Raw:
    """A client that says what it is told to."""

    def __init__(self, path: Path) -> None:
        self.connection = client.connect(str(path))
        self.connection.settimeout(DEADLINE)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def send(self, ask: Ask, descriptor: int | None = None) -> None:
        wire.send(self.connection, ask.pack(), descriptor)

    def receive(self) -> tuple[Answer, int | None]:
        packet, fd = wire.receive(self.connection)
        assert packet, "the pager has ended the connection"
        return wire.unpack_answer(packet), fd

    def ask(self, ask: Ask, descriptor: int | None = None) -> Answer:
        """An answer, without the descriptor that came along."""
        self.send(ask, descriptor)
        answer, fd = self.receive()
        if fd is not None:
            os.close(fd)
        return answer

    def is_over(self) -> bool:
        """Waits for the next packet: whether there is none any more."""
        return self.connection.recv(1, socket.MSG_PEEK) == b""
