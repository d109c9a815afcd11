# SPDX-License-Identifier: Apache-2.0
"""What waits for a worker, and in which order it gets one.

1. Second attempts: each is for something that is late already.
2. Demand, of all lanes, first come first served.
3. What is fetched ahead of need: lanes take turns, and a lane may if fewer jobs are at work there than
   its limit. Jobs of demand are among those, so what is fetched ahead steps back for them.
4. Calls: small things that may take a while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from . import concurrency
from .job import Job, State
from .lane import Lane

Call = Callable[[], None]


class Queues:
    """All of it is under the scheduler's lock.

    most: jobs at work ahead of need, all lanes together. running: jobs at work, whoever waits for them.
    """

    def __init__(self) -> None:
        self.most = concurrency.MOST
        self.running = 0
        self.spares: deque[Job] = deque()
        self.calls: deque[Call] = deque()
        self._demand: deque[Job] = deque()
        self._ahead: deque[Lane] = deque()  # those whose queue is not empty, in turn

    def put(self, job: Job, *, again: bool = False) -> None:
        """again: its time is running, so it goes before those that were never tried."""
        job.state = State.QUEUED
        if job.demand:
            self._demand.append(job)
            return
        lane = job.lane
        self.most = max(self.most, lane.concurrency.limit)
        if not lane.ahead:
            self._ahead.append(lane)
        if again:
            lane.ahead.appendleft(job)
        else:
            lane.ahead.append(job)

    def take_back(self, job: Job) -> None:
        """It is not to be worked on, or it is to be put elsewhere."""
        if job.demand:
            self._demand.remove(job)
            return
        job.lane.ahead.remove(job)
        if not job.lane.ahead:
            self._ahead.remove(job.lane)

    def has_something(self) -> bool:
        """Whether a worker would find something to do."""
        return bool(self.spares or self._demand or self.calls) or self._free_lane() is not None

    def next(self) -> Job | Call | None:
        """The next thing to do. A job that is QUEUED is to be started, one that is RUNNING is late."""
        while self.spares:
            job = self.spares.popleft()
            if job.state is State.RUNNING and job.attempts and not job.decided:
                return job
        if self._demand:
            return self._demand.popleft()
        lane = self._free_lane()
        if lane is not None:
            self._ahead.remove(lane)
            job = lane.ahead.popleft()
            if lane.ahead:
                self._ahead.append(lane)
            return job
        return self.calls.popleft() if self.calls else None

    def begin(self, job: Job) -> None:
        """It is at work from now on."""
        job.lane.running += 1
        self.running += 1

    def end(self, job: Job) -> None:
        """It is not at work any more."""
        job.lane.running -= 1
        self.running -= 1

    def _free_lane(self) -> Lane | None:
        if self.running >= self.most:
            return None
        return next((lane for lane in self._ahead if lane.running < lane.concurrency.limit), None)
