# SPDX-License-Identifier: Apache-2.0
"""Runs cases: each measurement in a forked child of its own, candidates interleaved, warm-up before each.

Why so: a child has fresh memory, can be killed at a deadline (a fault that is never served is a hang),
and takes what it leaked with it. Fork and not spawn, because imports would take longer than the cases;
the parent never opens a region and never holds data. Interleaving gives every candidate its share of the
machine's moods. The warm-up touches as much memory as the case will and reads the files it will read:
on a virtual machine the first touch of a page that the host has taken back costs the host's fault.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import random
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np

_FORK: Final = multiprocessing.get_context("fork")
_PAGE: Final = 4096
_SEED: Final = 7

Metrics = dict[str, float]


class CaseFailed(Exception):
    """A child that raised, died or ran past its deadline."""


def _child(function: Callable[[], Any], connection: Connection) -> None:
    try:
        connection.send((True, function()))
    except BaseException:
        connection.send((False, traceback.format_exc()))
    connection.close()
    # Without interpreter shutdown: peers leave threads behind that would be waited for.
    os._exit(0)


def in_child(function: Callable[[], Any], deadline: float) -> Any:
    """`function()` of a forked child. Raises `CaseFailed`."""
    ours, theirs = _FORK.Pipe(duplex=False)
    # Or a child's first collection would write to, and so copy, every page of what the parent has imported:
    # a second of processor time beside torch.
    gc.freeze()
    process = _FORK.Process(target=_child, args=(function, theirs), daemon=True)
    process.start()
    theirs.close()
    with ours:
        try:
            if not ours.poll(deadline):
                raise CaseFailed(f"nothing came within {deadline:.0f} s")
            good, value = ours.recv()
        except EOFError:
            process.join()
            raise CaseFailed(f"the child died, exit code {process.exitcode}") from None
        finally:
            process.kill()  # it has said what it had to say, or never will
            process.join()
    if not good:
        raise CaseFailed(str(value).strip())
    return value


class Meter:
    """What a case measures with: `with meter:` around the timed part, `note` for numbers of its own."""

    def __init__(self, nbytes: int) -> None:
        self.metrics: Metrics = {}
        self._nbytes = nbytes

    def __enter__(self) -> Meter:
        gc.collect()
        gc.disable()
        self._usage = resource.getrusage(resource.RUSAGE_SELF)
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._started
        usage = resource.getrusage(resource.RUSAGE_SELF)
        gc.enable()
        self.metrics["seconds"] = seconds
        if self._nbytes:
            self.metrics["gb_per_s"] = self._nbytes / seconds / 1e9
        self.note_cpu(usage.ru_utime + usage.ru_stime - self._usage.ru_utime - self._usage.ru_stime)

    def note_cpu(self, seconds: float) -> None:
        """Processor time where this process's own is not all of it."""
        self.metrics["cpu_seconds"] = seconds
        if self._nbytes:
            self.metrics["cpu_s_per_gib"] = seconds / self._nbytes * 2**30

    def note(self, **metrics: float) -> None:
        self.metrics.update(metrics)


@dataclass(frozen=True)
class Case:
    """One candidate of a question.

    run: does it in the child; what it returns is held against `digest` after the clock has stopped
        (None: it checked for itself).
    kind: "lazymem", "peer" or "bound". nbytes: of memory shown, for rates. memory: bytes to warm up.
    params: what plots group by. against: the case whose speed its own is divided by, by column.
    section: the table of the question that it belongs to. apart: numbers that would disturb the clock,
        taken once, in a child of their own.
    """

    name: str
    kind: str
    run: Callable[[Meter], np.ndarray[Any, Any] | Sequence[np.ndarray[Any, Any]] | None]
    nbytes: int = 0
    files: tuple[Path, ...] = ()
    memory: int = 0
    digest: int | None = None
    params: dict[str, Any] = field(default_factory=dict)
    against: dict[str, str] = field(default_factory=dict)
    section: str = ""
    apart: Callable[[], Metrics] | None = None


@dataclass
class Outcome:
    """A case's measurements, one `Metrics` a repeat; None where it failed."""

    case: Case
    runs: list[Metrics | None] = field(default_factory=list)
    error: str | None = None

    def values(self, metric: str) -> list[float]:
        return [run[metric] for run in self.runs if run is not None and metric in run]

    def median(self, metric: str) -> float | None:
        values = self.values(metric)
        return statistics.median(values) if values else None

    def summary(self) -> dict[str, dict[str, float]]:
        names = sorted({name for run in self.runs if run is not None for name in run})
        return {
            name: {
                "median": statistics.median(self.values(name)),
                "min": min(self.values(name)),
                "max": max(self.values(name)),
            }
            for name in names
        }

    def as_json(self) -> dict[str, Any]:
        case = self.case
        return {
            "name": case.name,
            "kind": case.kind,
            "section": case.section,
            "params": case.params,
            "against": case.against,
            "nbytes": case.nbytes,
            "file_bytes": sum(file.stat().st_size for file in case.files),
            "summary": self.summary(),
            "runs": self.runs,
            "error": self.error,
        }


def warm_up(case: Case) -> None:
    """Make the host give back the pages the case will need, and the page cache hold its files."""
    if case.memory:
        with mmap.mmap(-1, case.memory, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            np.frombuffer(memory, np.uint8)[::_PAGE] = 1
    buffer = bytearray(1 << 20)
    for file in case.files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def _measure(case: Case, check: bool) -> Metrics:
    from .data import digest

    meter = Meter(case.nbytes)
    result = case.run(meter)
    if check and case.digest is not None and (result is None or digest(result) != case.digest):
        raise CaseFailed("gave wrong bytes")
    meter.note(load=os.getloadavg()[0])
    return meter.metrics


def run_cases(
    cases: Sequence[Case], repeats: int, deadline: float, step: Callable[[str], None]
) -> list[Outcome]:
    """Measure every case `repeats` times, in an order drawn anew for each round; check bytes in the first."""
    outcomes = {case.name: Outcome(case) for case in cases}
    if len(outcomes) != len(cases):
        raise ValueError("two cases have one name")
    apart: dict[str, Metrics] = {}
    rng = random.Random(_SEED)
    for round_number in range(repeats):
        for case in rng.sample(cases, len(cases)):
            outcome = outcomes[case.name]
            step(case.name)
            metrics: Metrics | None = None
            if outcome.error is None:
                try:
                    if round_number == 0 and case.apart is not None:
                        apart[case.name] = in_child(case.apart, deadline)
                    warm_up(case)
                    metrics = in_child(partial(_measure, case, check=round_number == 0), deadline)
                    metrics |= apart.get(case.name, {})
                except CaseFailed as error:
                    outcome.error = str(error)
            outcome.runs.append(metrics)
    _compare(outcomes.values(), outcomes)
    return list(outcomes.values())


def _compare(outcomes: Iterable[Outcome], by_name: dict[str, Outcome]) -> None:
    """Speed relative to the reference of the same round: 1.0 is as fast, 0.5 takes twice as long."""
    for outcome in outcomes:
        for column, reference in outcome.case.against.items():
            for run, other in zip(outcome.runs, by_name[reference].runs, strict=True):
                if run is not None and other is not None:
                    run[column] = other["seconds"] / run["seconds"]
