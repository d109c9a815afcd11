# SPDX-License-Identifier: Apache-2.0
"""Server processes that never outlive the test run, however it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def free_port() -> int:
    """A port that nobody listens on at this moment; who loses the race for it starts again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """A process that the kernel kills when this one is gone: also after SIGKILL and os._exit.

    To be called on the main thread: the kernel looks at the thread that started the process.
    """
    with open(log, "ab") as out:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,  # Ctrl-C is for the tests, which stop their servers in order
            env={**os.environ, **(env or {})},
        )


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """At once, and without ceremony: nothing that these servers hold is wanted any more."""
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def wait_until(
    ready: Callable[[], bool], processes: Sequence[subprocess.Popen[bytes]], log: Path, deadline: float = 60.0
) -> None:
    """Poll `ready`; raise with the end of the log when a process has ended or the deadline is over."""
    end = time.monotonic() + deadline
    while True:
        ended = [process for process in processes if process.poll() is not None]
        if ended or time.monotonic() > end:
            what = f"{ended[0].args} ended with {ended[0].returncode}" if ended else "did not start in time"
            raise RuntimeError(f"{what}\n{log.read_text(errors='replace')[-3000:]}")
        if ready():
            return
        time.sleep(0.05)


def accepts(port: int) -> bool:
    """Whether somebody listens on the port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
