# SPDX-License-Identifier: Apache-2.0
"""Code that touches lazy memory runs in a child process: a fault that nobody serves is a hang, and only
another process can end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping

DEADLINE = 60.0


def run_child(
    code: str, *arguments: object, deadline: float = DEADLINE, env: Mapping[str, str] | None = None,
    prefix: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run Python `code` with `arguments` in sys.argv[1:]; kill its whole process group at the deadline."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **(env or {})},
    )
    try:
        out, err = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"hang: killed after {deadline} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def check_child(
    code: str, *arguments: object, deadline: float = DEADLINE, env: Mapping[str, str] | None = None,
    prefix: tuple[str, ...] = (),
) -> str:  # fmt: skip
    """`run_child`, and demand that it ends well; its standard output."""
    done = run_child(code, *arguments, deadline=deadline, env=env, prefix=prefix)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
