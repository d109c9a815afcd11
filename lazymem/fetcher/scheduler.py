# SPDX-License-Identifier: Apache-2.0
"""Jobs, the threads that work on them, and the rules by which attempts become answers.

Threads: the main one brings questions and must never wait for anything but the lock; *workers* run
attempts (workers.py); the *clock* looks at jobs whose time has come: to be tried again, to be tried a
second time, to be given up. Idle, all of them sleep.

Demand never waits behind what is fetched ahead of need: see queues.py; and there is always a thread for
it, because `_RESERVE` threads more may exist than jobs be at work ahead of need.

One lock for everything. It is held for microseconds, never while anybody reads, writes or sends. What
one attempt's end means for a job is written in job.py.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from .._native import E_STORE
from ..errors import OptionError
from ..store.base import Transient
from . import fetching, messages
from .job import Failure, Job, JobAttempt, State, failure_of, parts_of
from .messages import Ask, BadMessage
from .queues import Call, Queues
from .sources import Source
from .workers import Task, Workers

_RESERVE: Final = 32
#: The engine has 512 ranges.
_JOBS_MOST: Final = 4096
#: Threads that hang where nothing can reach them, in a name look-up, say. They come back in the end.
_LOST_MOST: Final = 256
#: Bytes that were answered and are still to be written to the cache.
_COPIES_MOST: Final = 64 << 20
_TOO_MUCH: Final = (429, 503)
_LANES_SHOWN: Final = 8


def _die() -> None:
    """The last resort: the engine starts another process, and asks it again."""
    os._exit(1)


class Scheduler:
    """memory: shared with the engine. send: one packet to it; may be called from any thread."""

    def __init__(
        self, memory: memoryview, send: Callable[[bytes], None], *, die: Callable[[], None] = _die
    ) -> None:
        self._memory = memory
        self._send = send
        self._die = die
        self._lock = threading.Lock()
        self._tick = threading.Condition(self._lock)
        self._quiet = threading.Condition(self._lock)
        self._queues = Queues()
        self._workers = Workers(
            self._lock,
            take=self._take,
            has_more=self._queues.has_something,
            most=lambda: self._queues.most + _RESERVE,
            answer=send,
            die=die,
        )
        self._jobs: dict[int, Job] = {}
        self._timed: dict[int, Job] = {}  # those that the clock looks at
        self._wake = math.inf  # when it will do so next
        self._copies = 0  # bytes
        self._began = time.monotonic()
        self._counts = dict.fromkeys(
            ("opens", "ranges", "failed", "requests", "received", "retries", "throttled", "timeouts",
             "hedges", "hedges_won", "cache_hits", "cache_misses"), 0,
        )  # fmt: skip

    def start(self) -> None:
        """The clock and a first worker. Raises RuntimeError if there can be no threads."""
        threading.Thread(target=self._run_clock, name="clock", daemon=True).start()
        self._workers.start()

    # ---- what the main thread calls ----

    def add(self, ask: Ask, source: Source) -> None:
        """An OPEN or a RANGE. Raises `BadMessage`, `OptionError`; else it is answered, once."""
        messages.check(ask, len(self._memory))
        pieces = messages.pieces_of(ask) if ask.kind == messages.RANGE else []
        job = Job(ask, source, pieces, self._memory[ask.place : ask.place + ask.length])
        if not job.opens and (job.opened is None or ask.offset + ask.length > job.opened.size):
            raise OptionError(f"{source.shown}: the fetcher was asked for bytes that it does not have")
        with self._lock:
            if ask.id in self._jobs:
                return  # one question has one answer
            if len(self._jobs) >= _JOBS_MOST:
                raise BadMessage(f"{_JOBS_MOST} questions wait for an answer; more are not taken")
            self._jobs[ask.id] = job
            self._counts["opens" if job.opens else "ranges"] += 1
            self._queues.put(job)
            self._workers.rouse()

    def promote(self, number: int) -> None:
        """Somebody waits for it by now."""
        with self._lock:
            job = self._jobs.get(number)
            if job is None or job.demand:
                return
            if job.state is State.QUEUED:
                self._queues.take_back(job)
            job.demand = True
            if job.state is State.QUEUED:
                self._queues.put(job)
                self._workers.rouse()

    def cancel(self, number: int) -> None:
        """Nobody needs it any more."""
        with self._lock:
            job = self._jobs.get(number)
            answer = self._give_up(job, Failure(E_STORE, "nobody needs it any more")) if job else None
        self._answer(answer)

    def call(self, function: Call) -> None:
        """Have a worker call it."""
        with self._lock:
            self._queues.calls.append(function)
            self._workers.rouse()

    def finish(self, seconds: float) -> None:
        """Wait, no longer than that, until what was answered is in the cache."""
        with self._lock:
            self._quiet.wait_for(lambda: self._copies == 0, seconds)

    def status(self) -> dict[str, Any]:
        """Counters. jobs: not answered yet. running: those at work. lost: threads that hang."""
        with self._lock:
            lanes = list({id(job.lane): job.lane for job in self._jobs.values()}.values())
            return {
                "seconds": round(time.monotonic() - self._began, 3),
                **self._counts,
                "jobs": len(self._jobs),
                "running": self._queues.running,
                "threads": self._workers.count,
                "lost": self._workers.lost,
                "lanes": [
                    {
                        "host": lane.name[:200],
                        "limit": lane.concurrency.limit,
                        "running": lane.running,
                        "ahead": len(lane.ahead),
                    }
                    for lane in lanes[:_LANES_SHOWN]
                ],
            }

    # ---- on a worker ----

    def _take(self) -> Task | None:
        """The next thing to do, begun."""
        found = self._queues.next()
        if not isinstance(found, Job):
            return found
        return partial(self._run, found, self._begin(found))

    def _begin(self, job: Job) -> JobAttempt:
        if job.state is State.RUNNING:
            return job.begin(spare=True)
        job.start(time.monotonic())
        self._queues.begin(job)
        self._timed[job.ask.id] = job
        self._watch(job)
        return job.begin()

    def _run(self, job: Job, attempt: JobAttempt) -> bytes | None:
        """Run an attempt, and what follows from it; the answer, if that is all."""
        following: JobAttempt | None = attempt
        answer = None
        while following is not None:
            attempt = following
            error = self._try(job, attempt)
            with self._lock:
                answer, has_part = self._end(job, attempt, error, time.monotonic())
            if has_part:
                following, answer = self._advance(job)
            else:
                following = None
        return answer

    def _try(self, job: Job, attempt: JobAttempt) -> BaseException | None:
        """One attempt. Whatever goes wrong in it goes wrong for this job only."""
        try:
            if not job.opens and job.parts is None:
                self._divide(job, attempt)
                if not job.parts:
                    return None
            left = job.deadline - time.monotonic()
            fetching.send(job, attempt, left, lambda: self._sent(job, attempt))
        except BaseException as error:
            return error
        return None

    def _divide(self, job: Job, attempt: JobAttempt) -> None:
        """Find out what has to be fetched at all."""
        missing, has_cache = fetching.look_up(job, attempt)
        with self._lock:
            job.parts = parts_of(missing, job.lane.options.coalesce_gap)
            attempt.part = job.parts[0] if job.parts else None
            if has_cache:
                job.to_keep = missing
                self._counts["cache_misses"] += len(missing)
                self._counts["cache_hits"] += len(job.pieces) - len(missing)

    def _sent(self, job: Job, attempt: JobAttempt) -> None:
        now = time.monotonic()
        with self._lock:
            attempt.sent = now
            attempt.round = job.lane.concurrency.sent(now)
            self._counts["hedges"] += attempt.spare
            self._counts["retries"] += job.failures > 0 and not attempt.spare
            if job.lane.options.hedge and not attempt.spare and not job.decided:
                job.late_at = now + job.lane.patience.seconds(_size_of(job, attempt))
                self._watch(job)

    def _end(
        self, job: Job, attempt: JobAttempt, error: BaseException | None, now: float
    ) -> tuple[bytes | None, bool]:
        """An attempt has ended. Returns the answer if that ends the job, and whether its part is there.

        The part is there when an attempt has brought it and no other one can write to its place any more.
        """
        self._counts["requests"] += attempt.requests
        self._counts["received"] += attempt.received
        if attempt.left:
            self._workers.lost -= 1
            return None, False
        job.attempts.remove(attempt)
        job.count(attempt)
        if not job.decided:
            self._learn(job, attempt, error, now)
            if error is None:
                job.winner = attempt
            elif not isinstance(error, Transient):
                job.failure = failure_of(error, job.source.shown)
            else:
                job.last_error = str(error)
                if not job.attempts:
                    job.fail_or_wait(error, now)
        if job.state is State.WAITING:
            self._queues.end(job)
        elif job.decided:
            self._break_off(job, now)
            if not job.attempts:
                return (None, True) if job.winner is not None else (self._close(job), False)
        self._watch(job)
        return None, False  # the last one to end decides

    def _learn(self, job: Job, attempt: JobAttempt, error: BaseException | None, now: float) -> None:
        """What an attempt tells of the store."""
        lane, seconds, size = job.lane, now - attempt.sent, _size_of(job, attempt)
        if attempt.sent == math.inf:  # it came from the cache, or never got so far
            return
        if error is None:
            lane.patience.note(size, seconds)
            lane.concurrency.answered(size, busy=bool(lane.ahead), now=now)
        elif isinstance(error, Transient):
            refused = error.status in _TOO_MUCH
            timed_out = error.status is None and seconds >= attempt.timeout
            self._counts["throttled"] += refused
            self._counts["timeouts"] += timed_out
            if refused or timed_out:
                lane.concurrency.throttled(attempt.round)

    def _advance(self, job: Job) -> tuple[JobAttempt | None, bytes | None]:
        """A part is there: an attempt at the next one, or the answer. The job's place is this thread's."""
        winner = job.winner
        assert winner is not None
        fetching.put_in_place(job, winner)
        text = fetching.opened_text(winner) if job.opens else ""
        length = len(winner.opened.tail) if winner.opened is not None else job.ask.length
        with self._lock:
            self._counts["hedges_won"] += winner.spare
            if job.next_part():
                return job.begin(), None
            if not job.to_keep:
                return None, self._close(job, length, text)
            job.state = State.FINISHING
            del self._timed[job.ask.id]
            self._queues.end(job)
            self._workers.rouse()  # this thread has something else to do first
            size = sum(piece.length for piece in job.to_keep)
            # Who waits for the bytes does not wait for the disk; up to a limit.
            later = job.demand and size <= _COPIES_MOST - self._copies
            self._copies += size if later else 0
        if not later:
            fetching.keep(job, [(piece, job.place_of(piece)) for piece in job.to_keep])
            with self._lock:
                return None, self._close(job, length, text)
        copies = [(piece, bytes(job.place_of(piece))) for piece in job.to_keep]
        with self._lock:
            answer = self._close(job, length, text)
        self._answer(answer)
        fetching.keep(job, copies)
        with self._lock:
            self._copies -= size
            self._quiet.notify_all()
        return None, None

    # ---- ends; the lock is held ----

    def _break_off(self, job: Job, now: float) -> None:
        self._workers.lost += job.stop_others(now)
        if self._workers.lost > _LOST_MOST:
            self._die()

    def _give_up(self, job: Job, failure: Failure) -> bytes | None:
        """Answer now if nothing can write to its place, else when the last attempt has ended."""
        if job.decided or job.state is State.FINISHING:
            return None  # it is about to be answered
        job.failure = failure
        if job.state is State.QUEUED:
            self._queues.take_back(job)
        self._break_off(job, time.monotonic())
        if job.attempts:
            self._watch(job)
            return None
        answer = self._close(job)
        self._workers.rouse()  # a worker that ends a job takes the next one itself; this is none
        return answer

    def _close(self, job: Job, length: int = 0, text: str = "") -> bytes:
        """The answer, of which there is one: from now on the place belongs to others."""
        if job.state is State.RUNNING:
            self._queues.end(job)
        job.state = State.ANSWERED
        del self._jobs[job.ask.id]
        self._timed.pop(job.ask.id, None)
        received, requests = job.received, job.requests
        if job.failure is None:
            return messages.done(job.ask, length=length, text=text, received=received, requests=requests)
        self._counts["failed"] += 1
        return messages.failed(
            job.ask, job.failure.code, str(job.failure), received=received, requests=requests
        )

    def _answer(self, answer: bytes | None) -> None:
        if answer is not None:
            self._send(answer)

    # ---- the clock ----

    def _watch(self, job: Job) -> None:
        """When the clock has to look at a job has changed. The lock is held."""
        due = job.due()
        if due < self._wake:
            self._wake = due
            self._tick.notify()

    def _run_clock(self) -> None:
        try:
            while True:
                with self._lock:
                    now = time.monotonic()
                    ripe = [job for job in self._timed.values() if job.due() <= now]
                    answers = [self._look_at(job, now) for job in ripe]
                    self._wake = min((job.due() for job in self._timed.values()), default=math.inf)
                    if not ripe:
                        self._tick.wait(None if self._wake == math.inf else self._wake - now)
                for answer in answers:
                    self._answer(answer)
        finally:
            self._die()

    def _look_at(self, job: Job, now: float) -> bytes | None:
        if job.decided:
            job.decided_at = math.inf
            if job.attempts:
                self._die()  # it can neither be stopped nor be trusted not to write
        elif now >= job.expires:
            return None if job.bears_with(now) else self._give_up(job, job.out_of_time(now))
        elif now >= job.retry_at:
            job.retry_at = math.inf
            self._queues.put(job, again=True)
            self._workers.rouse()
        elif now >= job.late_at:
            job.late_at = math.inf
            if job.lane.patience.spend():
                self._queues.spares.append(job)
                self._workers.rouse()
        return None


def _size_of(job: Job, attempt: JobAttempt) -> int:
    return attempt.part.length if attempt.part is not None else job.ask.length
