# SPDX-License-Identifier: Apache-2.0
"""What a worker does for a job while it holds no lock: ask the cache, ask the store, fill the cache."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Final

from ..errors import OptionError, ReadError
from ..store.base import Opened, Transient
from .job import Job, JobAttempt
from .messages import Piece
from .sources import IDENTITY_MAX

_ATTEMPT_LEAST: Final = 0.1


def look_up(job: Job, attempt: JobAttempt) -> tuple[list[Piece], bool]:
    """Put into place what the cache has; returns the pieces that it lacks, and whether there is one.

    It writes to the job's place, so meanwhile the attempt counts as one that has something bound, and is
    waited for, though a read from the disk cannot be broken off.
    """
    attempt.bind(lambda: None)
    try:
        found = job.source.cache_and_key(job.opened)
        if found is None:
            return list(job.pieces), False
        cache, key = found
        missing = []
        for piece in job.pieces:
            if attempt.aborted:
                raise Transient("nobody waits for it any more")
            if job.ask.refetch:
                cache.discard(key, piece.offset, piece.length)  # what it gave was wrong
                missing.append(piece)
            elif not cache.read_into(key, piece.offset, job.place_of(piece)):
                missing.append(piece)
        return missing, True
    finally:
        attempt.bind(None)


def send(job: Job, attempt: JobAttempt, time_left: float, on_send: Callable[[], None]) -> None:
    """One attempt: one request to the store. Raises what the reader raises. on_send: just before it."""
    reader = job.source.reader()
    if attempt.aborted:  # that took long
        raise Transient("nobody waits for it any more")
    attempt.timeout = min(job.lane.options.attempt_timeout, max(time_left, _ATTEMPT_LEAST))
    if job.opens:
        on_send()
        attempt.opened = reader.open(job.ask.length, timeout=attempt.timeout, attempt=attempt)
        _check_opened(job, attempt.opened)
        attempt.client = reader.client
        return
    if job.opened is None:
        raise OptionError(f"{job.source.shown}: bytes were asked for before its size was known")
    assert attempt.part is not None
    own = attempt.private  # a second attempt must not write where the first one writes
    attempt.target = memoryview(bytearray(attempt.part.length)) if own else job.place_of(attempt.part)
    on_send()
    reader.read_into(attempt.part.offset, attempt.target, job.opened, attempt, timeout=attempt.timeout)


def _check_opened(job: Job, opened: Opened) -> None:
    url = job.source.shown
    if opened.size < 0 or len(opened.tail) != min(opened.size, job.ask.length):
        raise ReadError(
            f"{url}: the store says that it has {opened.size} bytes, and gave {len(opened.tail)} of the last "
            f"{job.ask.length}; something between here and the store changes answers",
            url=url,
        )
    if len(opened.identity) > IDENTITY_MAX:
        raise ReadError(
            f"{url}: its ETag has {len(opened.identity)} characters, and lazymem takes {IDENTITY_MAX}",
            url=url,
        )


def put_in_place(job: Job, winner: JobAttempt) -> None:
    """What an attempt has in memory of its own goes to the job's place."""
    if winner.opened is not None:
        job.place[: len(winner.opened.tail)] = winner.opened.tail
    elif winner.private and winner.part is not None and winner.target is not None:
        job.place_of(winner.part)[:] = winner.target


def opened_text(winner: JobAttempt) -> str:
    """The payload of the answer to LM_ASK_OPEN."""
    assert winner.opened is not None
    told = {"size": winner.opened.size, "identity": winner.opened.identity, "client": winner.client}
    return json.dumps(told)


def keep(job: Job, pieces: list[tuple[Piece, bytes]] | list[tuple[Piece, memoryview]]) -> None:
    """Write pieces to the cache. It can only ever save requests, so nothing that it does fails a job."""
    found = job.source.cache_and_key(job.opened)
    if found is None:
        return
    cache, key = found
    try:
        for piece, data in pieces:
            cache.write(key, piece.offset, data)
    except Exception:
        logging.getLogger(__name__).exception("%s: the cache failed", job.source.shown)
