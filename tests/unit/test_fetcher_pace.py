# SPDX-License-Identifier: Apache-2.0
"""How many requests at a time, when to try again, when a second time: on clocks of the tests' own."""

from __future__ import annotations

import heapq

import pytest

from lazymem.fetcher.concurrency import FIRST, MOST, Concurrency
from lazymem.fetcher.job import backoff
from lazymem.fetcher.patience import Patience

SIZE = 1 << 20


class Line:
    """A store so many seconds away, over a line of so many bytes a second, which requests share evenly.

    refuses: it takes no more requests at a time than that.
    """

    def __init__(self, limit: Concurrency, away: float, rate: float, refuses: int = 1 << 30) -> None:
        self.limit = limit
        self.away = away
        self.rate = rate
        self.refuses = refuses
        self.now = 0.0
        self.refused = 0
        self._free_at = 0.0  # the line
        self._out: list[tuple[float, int, int, bool]] = []
        self._number = 0

    def run(self, requests: int, *, busy: bool = True) -> float:
        """So many answers; the bytes a second that they made."""
        began = self.now
        for _ in range(requests):
            while len(self._out) < self.limit.limit:
                self._send()
            self.now, _, number, refused = heapq.heappop(self._out)
            if refused:
                self.refused += 1
                self.limit.throttled(number)
            else:
                self.limit.answered(SIZE, busy=busy, now=self.now)
        return requests * SIZE / (self.now - began)

    def _send(self) -> None:
        self._number += 1
        number = self.limit.sent(self.now)
        if len(self._out) >= self.refuses:
            heapq.heappush(self._out, (self.now + self.away, self._number, number, True))
            return
        # One answer after the other at the full rate is what an even share comes to.
        self._free_at = max(self._free_at, self.now + self.away) + SIZE / self.rate
        heapq.heappush(self._out, (self._free_at, self._number, number, False))


def test_limit_grows_until_the_line_is_full() -> None:
    line = Line(Concurrency(), away=0.05, rate=200e6)  # ten requests of 1 MiB are under way when it is
    line.run(300)
    assert line.run(100) > 0.9 * line.rate
    assert 8 <= line.limit.limit <= 32


def test_limit_is_found_soon_where_the_store_is_far_away() -> None:
    line = Line(Concurrency(), away=0.1, rate=10e9)
    line.run(64)
    assert line.limit.limit == MOST


def test_limit_stays_small_where_more_brings_nothing() -> None:
    line = Line(Concurrency(), away=0.0001, rate=500e6)
    line.run(2000)
    assert line.limit.limit <= 2 * FIRST


def test_limit_does_not_grow_where_it_does_not_bind() -> None:
    line = Line(Concurrency(), away=0.1, rate=10e9)
    line.run(500, busy=False)
    assert line.limit.limit == FIRST


def test_limit_follows_a_line_that_became_faster() -> None:
    line = Line(Concurrency(), away=0.05, rate=50e6)
    line.run(500)
    before = line.limit.limit
    line.rate = 1e9
    line.run(5000)
    assert line.limit.limit >= 2 * before


def test_limit_halves_when_the_store_refuses() -> None:
    limit = Concurrency()
    for second in range(5):
        for _ in [limit.sent(second) for _ in range(limit.limit)]:
            limit.answered(SIZE, busy=True, now=second + 1.0)
    before = limit.limit
    assert before == MOST
    numbers = [limit.sent(7.0) for _ in range(before)]
    for number in numbers:  # all that were out at the time are one sign, not many
        limit.throttled(number)
    assert limit.limit == before // 2
    limit.throttled(limit.sent(8.0))
    assert limit.limit == before // 4


def test_limit_never_falls_below_one() -> None:
    limit = Concurrency()
    for _ in range(100):
        limit.throttled(limit.sent(0.0))
    assert limit.limit == 1


def test_limit_settles_below_what_the_store_refuses() -> None:
    line = Line(Concurrency(), away=0.05, rate=10e9, refuses=20)
    line.run(3000)
    refused = line.refused
    line.run(3000)
    assert line.refused - refused < 300
    assert 5 <= line.limit.limit <= 30


def test_burst_of_refusals_costs_little() -> None:
    line = Line(Concurrency(), away=0.05, rate=10e9)
    line.run(200)
    assert line.limit.limit == MOST
    line.refuses = 0
    line.run(300)
    assert line.limit.limit == 1
    line.refuses = 1 << 30
    line.run(100)
    assert line.limit.limit >= MOST // 2


def test_limit_that_was_asked_for_stays() -> None:
    line = Line(Concurrency(7), away=0.05, rate=10e9)
    line.run(500)
    line.limit.throttled(line.limit.sent(0.0))
    assert line.limit.limit == 7


def test_backoff_grows_is_bounded_and_differs() -> None:
    for failures in range(1, 2000):
        assert 0 <= backoff(failures) <= min(0.05 * 2.0 ** min(failures - 1, 10), 5.0)
    assert len({backoff(5) for _ in range(20)}) > 10
    assert max(backoff(50) for _ in range(100)) > 2.5


def test_late_is_what_takes_far_longer_than_others_of_the_size() -> None:
    patience = Patience()
    for _ in range(30):
        patience.note(1000, 0.5)
        patience.note(8 << 20, 3.0)
    patience.note(1000, 50.0)
    assert patience.seconds(900) == pytest.approx(2.0)
    assert patience.seconds(15 << 20) == pytest.approx(12.0)
    for _ in range(1000):
        patience.note(1000, 0.001)
    assert patience.seconds(1000) == pytest.approx(0.2)


def test_before_anything_is_known_patience_is_long_and_grows_with_the_size() -> None:
    patience = Patience()
    assert patience.seconds(1000) >= 2
    assert patience.seconds(64 << 20) >= 30


def test_second_attempts_are_a_small_share() -> None:
    patience = Patience()
    spent = sum(patience.spend() for _ in range(100))
    for _ in range(1000):
        patience.note(1000, 0.1)
        spent += patience.spend()
    assert 40 <= spent <= 60
