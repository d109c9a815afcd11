# SPDX-License-Identifier: Apache-2.0
"""A pager as a process of its own, from its first thread to its end: what `lazymem pager serve` runs."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from .._native import pager as native
from ..store import locations
from .access import Access
from .estate import bequeath, take_estates
from .firecracker import Firecracker
from .handover import take
from .server import Limits, Server
from .stock import Wanted


@dataclass(frozen=True, slots=True)
class Settings:
    """What a pager is started with. uids, snapshots: see `Access`; limits, threads: see `Server`.

    protocol: what is spoken at the path; by "firecracker" machines are restored from the first snapshot.
    """

    path: str
    snapshots: Sequence[str] = ()
    uids: Sequence[int] | None = ()
    limits: Limits = field(default_factory=Limits)
    threads: int | None = None
    passes_device: bool = False
    take_over: bool = False
    protocol: str = "lazymem"

    @property
    def control(self) -> str:
        """Where lazymem's own protocol is spoken: at the path, or beside it, if that is for machines."""
        return self.path if self.protocol == "lazymem" else f"{self.path}.control"


def serve(settings: Settings, ready: Callable[[Server, bool], None]) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP, or until another pager has taken over. Blocks.

    ready: called once clients are taken in; True if they are another pager's. To be called in the main
    thread, before there are others. Raises what `lazymem.open` does for a snapshot that cannot be had, and
    `PagerUnavailable`.
    """
    native.start_twin()  # while there is one thread: the twin is a copy of this process
    _raise_limit_of_descriptors()
    access = Access(settings.snapshots, settings.uids)
    server = Server(
        settings.control,
        access,
        settings.limits,
        threads=settings.threads,
        passes_device=settings.passes_device,
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: server.stop())
    native.start(server.core_threads)
    with ExitStack() as at_end:
        at_end.callback(native.stop)
        at_end.callback(server.leave)
        for location in settings.snapshots:  # a wrong one is an error now, and none is ever closed
            server.stocks.get(Wanted(_absolute(location)))
        machines = None
        if settings.protocol == "firecracker":
            machines = Firecracker(server, settings.path, Wanted(_absolute(settings.snapshots[0])))
        taken = settings.take_over and take(server)
        if not taken:
            server.listen()
        take_estates(server)
        at_end.callback(bequeath(server.path))
        if machines is not None:
            machines.listen()
            machines.start()
        ready(server, taken)
        server.serve()


def _absolute(location: str) -> str:
    return (
        location
        if locations.scheme_of(location) is not None
        else os.path.realpath(locations.local_path(location))
    )


def _raise_limit_of_descriptors() -> None:
    """A client takes two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
