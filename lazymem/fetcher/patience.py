# SPDX-License-Identifier: Apache-2.0
"""When an answer is late enough for a second attempt, and whether one may be made.

Late: four times what nearly all recent requests of about that size took, 200 ms at least. Until a few
have been seen, two seconds and a rate that hardly any network falls below. A store that is slow for
everybody is not made faster by asking twice, so second attempts are at most one in twenty requests, and
a handful more.
"""

from __future__ import annotations

from collections import deque
from typing import Final

_FACTOR: Final = 4.0
_LEAST: Final = 0.2
_FEW: Final = 8
_UNKNOWN_SECONDS: Final = 2.0
_UNKNOWN_RATE: Final = 2 << 20  # bytes a second
_SAMPLES: Final = 64
_QUANTILE: Final = 0.95

_SHARE: Final = 0.05
_ALLOWANCE_FIRST: Final = 2.0
_ALLOWANCE_MOST: Final = 8.0


class Patience:
    """How long the requests of one lane took, by size. Not locked."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}
        self._allowance = _ALLOWANCE_FIRST

    def note(self, size: int, seconds: float) -> None:
        """A request for `size` bytes took that long."""
        self._seconds.setdefault(_class_of(size), deque(maxlen=_SAMPLES)).append(seconds)
        self._allowance = min(self._allowance + _SHARE, _ALLOWANCE_MOST)

    def seconds(self, size: int) -> float:
        """After how long a request for `size` bytes is late."""
        seen = self._seconds.get(_class_of(size), ())
        if len(seen) < _FEW:
            return _UNKNOWN_SECONDS + size / _UNKNOWN_RATE
        return max(_LEAST, _FACTOR * sorted(seen)[int(len(seen) * _QUANTILE)])

    def spend(self) -> bool:
        """Whether a second attempt may be made; it is counted."""
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True


def _class_of(size: int) -> int:
    return size.bit_length() // 2  # factors of four
