# SPDX-License-Identifier: Apache-2.0
"""What a process must not have more of after a soak than before."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lazymem._native import engine_counts

PAGE = os.sysconf("SC_PAGESIZE")


def levels() -> dict[str, int]:
    """What must not grow."""
    return {
        "regions": engine_counts()[0],
        "engine threads": engine_counts()[1],
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def await_level(level: dict[str, int]) -> None:
    """Raise if it is not reached: what was broken off may end behind close()'s back, and no later."""
    end = time.monotonic() + 30
    while (now := levels()) != level and time.monotonic() < end:
        time.sleep(0.05)
    if now != level:
        raise AssertionError(f"before {level}, after {now}")
    try:
        raise AssertionError(f"a child is left: {os.waitpid(-1, os.WNOHANG)}")
    except ChildProcessError:
        pass


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("\n")
