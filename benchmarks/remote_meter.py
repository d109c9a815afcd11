# SPDX-License-Identifier: Apache-2.0
"""What a client of a store costs, beside time: processor seconds, memory, and what went over the wire.

lazymem's fetcher is a process of its own and no child: it is asked after while it lives. Memory is the
peak (VmHWM) beyond what the process held when the clock started; the whole fetcher counts, the memory that
both map once. Anonymous memory is what the process holds more at the end, the fetcher not counted. Traffic
is known where a relay lies in between.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazymem.fetcher.client import fetcher_pid

from .harness import Meter
from .relay import Traffic
from .remote_server import Place


def _field(name: str, process: int | str = "self") -> int:
    """A field of /proc/.../status, in bytes."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _disk_bytes() -> int:
    """What the kernel has fetched from disks for this process, page faults of mapped files included."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise KeyError("read_bytes")


@contextmanager
def measured(meter: Meter, place: Place | None) -> Iterator[None]:
    """The clock, and around it what else is measured of a client, or (None) of one that reads local files."""
    if place:
        os.environ.update(place.environment())
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    held, anonymous, disk = _field("VmRSS"), _field("RssAnon"), _disk_bytes()
    traffic = place.traffic() if place else Traffic(0, 0, 0)
    with meter:
        yield
    peak, cpu = _field("VmHWM") - held, meter.metrics["cpu_seconds"]
    if fetcher := fetcher_pid():
        seconds = _processor_seconds(fetcher)
        cpu += seconds
        peak += _field("VmHWM", fetcher) - _field("RssShmem", fetcher)
        meter.note(fetcher_cpu_seconds=seconds)
    if place and place.relay:
        passed = place.traffic() - traffic
        meter.note(
            requests=passed.requests, connections=passed.connections, received_mib=passed.received / 2**20
        )
    meter.note_cpu(cpu)
    meter.note(
        peak_mib=peak / 2**20,
        anonymous_mib=(_field("RssAnon") - anonymous) / 2**20,
        disk_mib=(_disk_bytes() - disk) / 2**20,
    )
