# SPDX-License-Identifier: Apache-2.0
"""What a pager says of itself: what `lazymem pager status --json` prints."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .._native import pager as native

if TYPE_CHECKING:
    from .server import Session
    from .stock import Stock


def status_of(path: str, sessions: Mapping[int, Session], stocks: list[Stock]) -> dict[str, Any]:
    """sessions: by the number of their space. Bytes; latency: as `latency.percentile` takes it."""
    spaces = native.spaces()
    return {
        "pid": os.getpid(),
        "socket": path,
        "clients": len(sessions),
        "waiting": sum(one.waiting for one in spaces),
        "faults": sum(one.faults for one in spaces),
        "latency": _summed(one.latency for one in spaces),
        "snapshots": [_describe_stock(one) for one in stocks],
        "spaces": [_describe_space(one, sessions.get(one.space)) for one in spaces],
    }


def _describe_stock(stock: Stock) -> dict[str, Any]:
    memory = stock.open()
    stats = memory.stats()
    fd = native.memory_descriptor(memory)
    try:
        resident = os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)
    return {
        "url": stock.url, "bytes": memory.size, "resident": resident, "spaces": native.users(memory),
        "chunks_demand": stats.chunks_demand, "chunks_prefetch": stats.chunks_prefetch,
        "chunks_failed": stats.chunks_failed, "bytes_read": stats.bytes_read,
    }  # fmt: skip


def _describe_space(one: native.SpaceReport, session: Session | None) -> dict[str, Any]:
    client = None
    if session is not None:
        client = {"pid": session.peer.pid, "uid": session.peer.uid, "protocol": session.protocol,
                  "since": session.since, "url": session.stock.url if session.stock else None}  # fmt: skip
    return {
        "space": one.space, "parent": one.parent or None, "client": client,
        "follows_fork": bool(one.features & native.FOLLOWS_FORK),
        "mapped": one.mapped, "pieces": one.pieces, "served": one.served, "faults": one.faults,
        "waiting": one.waiting, "failed": one.failed, "latency": list(one.latency),
    }  # fmt: skip


def _summed(histograms: Any) -> list[int]:
    return [sum(column) for column in itertools.zip_longest(*histograms, fillvalue=0)]
