# SPDX-License-Identifier: Apache-2.0
"""What every question's module is given and gives.

A question is a module with TITLE, COLUMNS, `cases(data, settings)` and `plot(figure, outcomes)`, and may
have `conclude(outcomes)`, which adds metrics that need all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final, TypeVar

from .harness import Outcome

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """threads: of decoders and peers, as many as the engine runs. tiny: only whether it runs.

    model_mb: size of the models, MiB. stack: for what must be ended when the question has been
    answered. skipped: a question puts there, in a sentence each, what it had to leave out.
    """

    threads: int
    tiny: bool
    model_mb: int
    stack: ExitStack
    skipped: list[str] = field(default_factory=list)

    def points(self, values: Sequence[T]) -> Sequence[T]:
        """The points of a curve: all, or its ends in a tiny run."""
        return [values[0], values[-1]] if self.tiny else values


@dataclass(frozen=True)
class Column:
    """A metric in the table: shown as median * scale."""

    title: str
    metric: str
    scale: float = 1.0
    digits: int = 2


RATE: Final = Column("GB/s", "gb_per_s")
CPU: Final = Column("CPU s/GiB", "cpu_s_per_gib")

COLOURS: Final = {"lazymem": "#0b6e4f", "peer": "#c8553d", "bound": "#8d99ae"}


def error_bars(outcomes: Iterable[Outcome], metric: str, scale: float = 1.0) -> list[list[float]]:
    """matplotlib's yerr: how far the smallest and largest repeat are from the median."""
    low, high = [], []
    for outcome in outcomes:
        values, middle = outcome.values(metric), outcome.median(metric)
        low.append((middle - min(values)) * scale if middle is not None else 0.0)
        high.append((max(values) - middle) * scale if middle is not None else 0.0)
    return [low, high]


def medians(outcomes: Iterable[Outcome], metric: str, scale: float = 1.0) -> list[float]:
    return [(outcome.median(metric) or 0.0) * scale for outcome in outcomes]
