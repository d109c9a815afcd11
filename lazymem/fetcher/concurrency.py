# SPDX-License-Identifier: Apache-2.0
"""How many requests ahead of need a store gets at a time, found out while it works.

The rule. Time is cut into *rounds*: as many answers as the limit allows requests. Each round has a rate,
bytes by seconds, that counts only if requests were waiting all the while: else the limit did not bind.

1. *Doubling*, from 4: as long as a round is a fifth faster than the one before, at half the limit. On a
   store that is far away rounds double their rate until the line is full, and 64 is reached after 60
   requests. When a round was not faster, the limit goes back: more connections would only make a demand,
   which shares the line with them, slower.
2. *Probing*: now and then (after 4 rounds, after failures 8, 16, 32) a quarter more is tried for one
   round, and kept if that pays by a twentieth.
3. A store that says "slow down" (429, 503), or lets requests time out, halves the limit, once for all
   requests that were out at the time. From there it doubles back, round by round, to half of what it was
   before, and then grows by probing only, with a pause after each: additive increase, multiplicative
   decrease, the rule that is known to share a store fairly with others. A burst of refusals costs a few
   rounds, however long it is; if refusals come again on the way back, its goal shrinks by a quarter.

Kept for each store and host (lane.py), not for the process: what is adapted to is the store's capacity
and the way to it. One that is down must not slow another; where two share a line, both see it is full.
"""

from __future__ import annotations

from typing import Final

FIRST: Final = 4
MOST: Final = 64

_DOUBLING_PAYS: Final = 1.2
_PROBING_PAYS: Final = 1.05
_PAUSE_FIRST: Final = 4
_PAUSE_MOST: Final = 32


class Concurrency:
    """The limit of one lane. Not locked; `now` is any clock's, in seconds.

    fixed: a limit that was asked for, and stays.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.limit = FIRST if fixed is None else fixed
        self._fixed = fixed is not None
        self._round = 0
        self._began = -1.0  # -1: at the next request
        self._bytes = 0
        self._answered = 0
        self._doubling = True
        self._kept = self.limit  # where to go back to
        self._rate = 0.0  # what the kept limit gave
        self._probing = False
        self._pause = _PAUSE_FIRST
        self._rounds_to_probe = _PAUSE_FIRST
        self._blamed = 0  # rounds before this one have been atoned for
        self._goal = 0  # where the way back from a refusal leads
        self._recovered = True  # a whole round has gone well since the last refusal

    def sent(self, now: float) -> int:
        """A request goes out. If it is refused, the returned number goes to `throttled`."""
        if self._began < 0:
            self._began = now
        return self._round

    def answered(self, size: int, *, busy: bool, now: float) -> None:
        """A request brought `size` bytes. busy: others wait for the limit."""
        if self._fixed:
            return
        if not busy:
            self._start_round(-1.0)
            return
        self._bytes += size
        self._answered += 1
        if self._answered >= self.limit and now > self._began >= 0:
            self._judge(self._bytes / (now - self._began))
            self._start_round(now)

    def throttled(self, number: int) -> None:
        """A request was refused, or timed out, for too much load."""
        if self._fixed or number < self._blamed:
            return
        if self._recovered:  # else it is still the same burst
            on_the_way = self.limit < self._goal
            self._goal = max(self.limit // 2, self._goal * 3 // 4 if on_the_way else 0)
        self._recovered = False
        self.limit = self._kept = max(1, self.limit // 2)
        self._rate = 0.0  # whatever comes next is the measure
        self._doubling = self._probing = False
        self._pause = self._rounds_to_probe = _PAUSE_FIRST
        self._start_round(-1.0)
        self._blamed = self._round

    def _start_round(self, now: float) -> None:
        self._round += 1
        self._began = now
        self._bytes = self._answered = 0

    def _judge(self, rate: float) -> None:
        self._recovered = True
        if self._doubling:
            self._doubling = self._keep_if(rate >= self._rate * _DOUBLING_PAYS, rate) and self.limit < MOST
            if self._doubling:
                self.limit = min(2 * self.limit, MOST)
        elif self._probing:
            paid = self._keep_if(rate >= self._rate * _PROBING_PAYS, rate)
            self._pause = _PAUSE_FIRST if paid else min(2 * self._pause, _PAUSE_MOST)
            # At once once more; but where the store has a limit of its own, it is near.
            self._rounds_to_probe = 0 if paid and not self._blamed else self._pause
            self._probing = False
        elif self.limit < self._goal:
            self.limit = self._kept = min(2 * self.limit, self._goal)
        else:
            self._rate = rate
            self._rounds_to_probe -= 1
        if not self._doubling and self._rounds_to_probe <= 0 and self.limit < MOST:
            self._probing = True
            self.limit = min(self.limit + max(1, self.limit // 4), MOST)

    def _keep_if(self, pays: bool, rate: float) -> bool:
        if pays:
            self._kept, self._rate = self.limit, rate
        else:
            self.limit = self._kept
        return pays
