# SPDX-License-Identifier: Apache-2.0
"""One question from its arrival to its answer: its attempts, and what they made of it.

A job is QUEUED until a worker takes it, RUNNING while attempts are at work on it, WAITING between two of
them, FINISHING once all bytes are in place (the cache is written), and ANSWERED. The bytes of a range
are fetched in *parts*, one after the other: one part, unless the cache has a hole's worth in between.

A part is decided when an attempt has brought it, when the store has refused it for good, when its time
is over, or when nobody wants it any more; in each case every other attempt is broken off. No answer
before the last attempt that may write to the job's place has ended: the engine gives the place to others.
All of this is under the scheduler's lock.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from enum import Enum, auto
from typing import Final

from ..errors import LazymemError
from ..store.base import Attempt, Opened, Transient
from . import messages
from .messages import Ask, Piece
from .sources import Source

_BACKOFF_FIRST: Final = 0.05
_BACKOFF_MOST: Final = 5.0
#: Less is left of a job's time: another attempt would come to nothing.
_TOO_LATE: Final = 0.05
#: Bytes a second. An attempt that brings bytes at this rate is not broken off when the time is over.
_SLOWEST: Final = 64 << 10
_SAID_MAX: Final = 1500
#: An attempt that was broken off, and may write to the job's place, has to end within this; or, where a
#: client gives no way to break it off, within this after the time that it may go without a byte.
STOP_SECONDS: Final = 2.0
_DISK_SECONDS: Final = 10.0


class State(Enum):
    QUEUED = auto()
    RUNNING = auto()
    WAITING = auto()
    FINISHING = auto()
    ANSWERED = auto()


class JobAttempt(Attempt):
    """One attempt at a job's part, or at opening.

    part: what it is to bring; None of an open, and until the cache was asked. target: where its bytes go.
    private: to memory of its own, so that it may be left to itself. spare: the second one, for a late
    answer. sent: when its request went out. left: nobody waits any more for what it says.
    """

    def __init__(self, part: Piece | None, *, private: bool, spare: bool = False) -> None:
        super().__init__()
        self.part = part
        self.private = private
        self.spare = spare
        self.target: memoryview | None = None
        self.opened: Opened | None = None
        self.client = ""
        self.sent = math.inf
        self.timeout = _DISK_SECONDS  # the cache is asked first
        self.round = 0  # of lane.concurrency
        self.left = False


class Failure(Exception):
    """How a job fails: a code (LM_E_*) and a sentence."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class Job:
    """See the module. `place` is the part of the shared memory that is the job's until it is answered."""

    def __init__(self, ask: Ask, source: Source, pieces: Sequence[Piece], place: memoryview) -> None:
        self.ask = ask
        self.source = source
        self.lane = source.lane
        self.opened = source.opened  # the version; the source may learn of another
        self.pieces = pieces
        self.place = place
        self.demand = ask.demand
        self.state = State.QUEUED
        self.parts: list[Piece] | None = None  # still to be fetched; None: the cache was not asked yet
        self.to_keep: list[Piece] = []  # pieces that the cache lacks
        self.attempts: list[JobAttempt] = []
        self.winner: JobAttempt | None = None
        self.failure: Failure | None = None
        self.decided_at = math.inf
        self.started = math.inf
        self.deadline = math.inf  # no attempt begins after it
        self.expires = math.inf  # then the clock looks whether to give up
        self.late_at = math.inf  # then a second attempt is made
        self.retry_at = math.inf
        self.failures = 0  # in a row
        self.last_error = ""
        self.tries = 0
        self.requests = 0
        self.received = 0

    @property
    def opens(self) -> bool:
        return self.ask.kind == messages.OPEN

    @property
    def decided(self) -> bool:
        return self.winner is not None or self.failure is not None

    def start(self, now: float) -> None:
        """A worker has taken it. The clock runs from the first time: not while it waits behind others."""
        self.state = State.RUNNING
        self.retry_at = math.inf
        if self.started == math.inf:
            self.started = now
            self.deadline = self.expires = now + self.ask.timeout

    def begin(self, *, spare: bool = False) -> JobAttempt:
        """Another attempt at the part that is due."""
        part = self.parts[0] if self.parts else None
        attempt = JobAttempt(part, private=spare or self.opens, spare=spare)
        self.attempts.append(attempt)
        self.tries += 1
        return attempt

    def place_of(self, piece: Piece) -> memoryview:
        begin = piece.offset - self.ask.offset
        return self.place[begin : begin + piece.length]

    def count(self, attempt: JobAttempt) -> None:
        """What an attempt sent and got belongs to the answer."""
        self.requests += attempt.requests
        self.received += attempt.received

    def stop_others(self, now: float) -> int:
        """It is decided: break off what still runs. Returns how many attempts were left to themselves.

        Those that may be writing to `place` are waited for; the others need not be: see `Attempt`.
        """
        self.late_at = math.inf
        self.decided_at = min(self.decided_at, now)
        running, self.attempts = self.attempts, []
        left = 0
        for attempt in running:
            if attempt.abort() and not attempt.private:
                self.attempts.append(attempt)
            else:
                self.count(attempt)
                attempt.left = True
                left += 1
        return left

    def fail_or_wait(self, error: Transient, now: float) -> None:
        """All attempts failed in a way that may pass: decide when the next one is due, or that none is."""
        self.failures += 1
        self.late_at = math.inf
        left = self.deadline - now
        # The last attempt comes before the end, not after it; unless the store wants to be left alone.
        wait = min(backoff(self.failures), left / 2) + max(0.0, error.retry_after or 0.0)
        if left < _TOO_LATE or not wait < left:
            self.failure = self.out_of_time(now)
            return
        self.state = State.WAITING
        self.retry_at = now + wait

    def out_of_time(self, now: float) -> Failure:
        """Why it is given up."""
        url, said = self.source.shown, self.last_error.removeprefix(self.source.shown).strip(" :.")
        tries = "1 attempt" if self.tries == 1 else f"{self.tries} attempts"
        sentence = f"{url}: given up after {tries} in {now - self.started:.1f} s; "
        if said:
            sentence += f"the last one said: {said[:_SAID_MAX]}; "
        else:
            sentence += "no answer came; "
        sentence += "check that the store can be reached, or raise the storage option timeout"
        return Failure(messages.code_of(Transient("")), sentence)

    def next_part(self) -> bool:
        """A part is in place; whether there is another."""
        self.winner = None
        self.decided_at = self.late_at = math.inf
        self.failures = 0
        if self.parts:
            self.parts.pop(0)
        return bool(self.parts)

    def due(self) -> float:
        """When the clock has to look at it."""
        if self.state is State.RUNNING and self.decided:
            slowest = max((attempt.timeout for attempt in self.attempts), default=0.0)
            return self.decided_at + slowest + STOP_SECONDS
        return min(self.expires, self.retry_at, self.late_at)

    def bears_with(self, now: float) -> bool:
        """Its time is over; whether bytes are coming all the same, no slower than by the slowest line."""
        last = self.deadline + self.ask.length / _SLOWEST
        if now >= last or not any(attempt.received for attempt in self.attempts):
            return False
        self.expires = last
        return True


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row: exponential, with full jitter.

    Full: from nothing on. What failed together must not come back together.
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    most = min(_BACKOFF_FIRST * 2.0 ** min(failures - 1, 20), _BACKOFF_MOST)
    return most * int.from_bytes(os.urandom(4), "little") / 2**32  # `random` takes 3 ms to import


def failure_of(error: BaseException, shown: str) -> Failure:
    """What is told of an error that will not pass."""
    if isinstance(error, LazymemError):
        return Failure(messages.code_of(error), str(error))
    # Of somebody else's making: its text may hold anything, secrets too.
    trace, where = error.__traceback__, ""
    while trace is not None:
        where = f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"
        trace = trace.tb_next
    return Failure(
        messages.code_of(error),
        f"{shown}: reading it failed in a way that lazymem does not know: {type(error).__name__}{where}; "
        "please report it",
    )


def parts_of(missing: Sequence[Piece], gap: int) -> list[Piece]:
    """Ranges to fetch for the pieces that the cache lacks: one, but for what lies more than `gap` apart."""
    parts: list[Piece] = []
    for piece in missing:
        if parts and piece.offset - parts[-1].end <= gap:
            parts[-1] = Piece(parts[-1].offset, piece.end - parts[-1].offset)
        else:
            parts.append(piece)
    return parts
