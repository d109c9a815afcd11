# SPDX-License-Identifier: Apache-2.0
"""What /proc says of this process."""

from __future__ import annotations

from pathlib import Path


def mib(field: str, file: str = "status") -> float:
    """A field of /proc/self/status or smaps_rollup, in MiB."""
    return _field(field, file) / 1024


def io(field: str) -> int:
    """A field of /proc/self/io, in bytes."""
    return _field(field, "io")


def _field(field: str, file: str) -> int:
    for line in Path(f"/proc/self/{file}").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise KeyError(field)
