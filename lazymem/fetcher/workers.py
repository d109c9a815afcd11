# SPDX-License-Identifier: Apache-2.0
"""The threads that work on jobs: made when there is something to do and none is idle, and then kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

#: Something to do. Returns an answer to be sent, if it ended in one.
Task = Callable[[], bytes | None]


class Workers:
    """Threads that take tasks, one after the other. What says "lock" is called with the lock held.

    take: the next task, begun; None if there is none (lock). has_more: whether there is one (lock).
    most: how many threads there may be at a time (lock). answer: sends what a task returned.
    die: ends the process.
    lost: threads that hang where nothing can reach them; they count for nothing until they come back.
    """

    def __init__(
        self,
        lock: threading.Lock,
        *,
        take: Callable[[], Task | None],
        has_more: Callable[[], bool],
        most: Callable[[], int],
        answer: Callable[[bytes], None],
        die: Callable[[], None],
    ) -> None:
        self._lock = lock
        self._take = take
        self._has_more = has_more
        self._most = most
        self._answer = answer
        self._die = die
        self._work = threading.Condition(lock)
        self._idle = 0
        self.count = 0
        self.lost = 0

    def start(self) -> None:
        """A first one. Raises RuntimeError if there can be no threads."""
        with self._lock:
            self._start_one()

    def rouse(self) -> None:
        """See to it that a worker comes if there is something to do; it will rouse the next one (lock).

        Who rouses takes the sleeper off the count, not the sleeper itself: for two jobs that come at once
        two of them wake up.
        """
        if not self._has_more():
            return
        if self._idle:
            self._idle -= 1
            self._work.notify()
        elif self.count - self.lost < self._most():
            with suppress(RuntimeError):  # the system has no more; those that there are go on
                self._start_one()

    def _start_one(self) -> None:
        threading.Thread(target=self._run, name="worker", daemon=True).start()
        self.count += 1

    def _run(self) -> None:
        answer: bytes | None = None
        try:
            while True:
                with self._lock:
                    # Who ends a job takes the next one before the answer goes out: else another worker
                    # would be woken for it, or made, when the engine hears the answer and asks again.
                    while (task := self._take()) is None and answer is None:
                        self._idle += 1
                        self._work.wait()
                    if task is not None:
                        self.rouse()
                if answer is not None:
                    self._answer(answer)
                answer = task() if task is not None else None
        finally:
            self._die()  # a defect of ours; without this thread its job would never be answered
