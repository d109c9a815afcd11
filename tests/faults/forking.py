# SPDX-License-Identifier: Apache-2.0
"""What the scripts of fork tests share. They run in processes of their own and import this; so do the
workers that multiprocessing starts anew, which find here what they are to call."""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lazymem

from ..arrays import make_arrays

Arrays = Mapping[str, NDArray[Any]]

_right = functools.cache(make_arrays)


def opened(location: str, **keywords: Any) -> lazymem.Snapshot:
    """`location` with the options that stand in sys.argv[2] as JSON, where something does."""
    given = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    return lazymem.open(location, **{**given, **keywords})


def expected_of(snap: lazymem.Snapshot) -> Arrays:
    """What the snapshot must show: converted, if it was opened with dtype="float64"."""
    return {name: array.astype(snap.info(name).dtype) for name, array in _right().items()}


def wrong(arrays: Arrays, expected: Arrays) -> list[str]:
    """The names of arrays that differ."""
    return [name for name in expected if not np.array_equal(arrays[name], expected[name])]


def forked(call: Callable[[], object], fork: Callable[[], int] = os.fork) -> int:
    """The process id of a child that calls, exits with 0 if it raises and finds nothing ("", [], None)."""
    pid = fork()
    if pid:
        return pid
    try:
        found = call()
        if found:
            print(f"child: {found}", file=sys.stderr, flush=True)
        os._exit(1 if found else 0)
    except BaseException as error:
        print(f"child: {error!r}", file=sys.stderr, flush=True)
        os._exit(2)


def ended(pid: int) -> int:
    """Exit code of a child; a signal's number negated."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Touchers:
    """Threads that go through all arrays, each in an order of its own, until the block ends."""

    def __init__(self, arrays: Arrays, expected: Arrays, count: int) -> None:
        self.found: list[str] = []
        self._threads = [
            threading.Thread(target=self._touch, args=(arrays, expected, n)) for n in range(count)
        ]

    def _touch(self, arrays: Arrays, expected: Arrays, seed: int) -> None:
        names = list(expected)
        np.random.default_rng(seed).shuffle(names)
        for name in names:
            if not np.array_equal(arrays[name], expected[name]):
                self.found.append(name)

    def __enter__(self) -> Touchers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for thread in self._threads:
            thread.join()


# ---- what workers that were started anew are told to call; what they return is printed by who started them


def differing(arrays: Arrays) -> list[str]:
    """Of a snapshot, or arrays, that came by pickle or by inheritance."""
    return wrong(arrays, {name: _right()[name] for name in arrays})


def differing_handle(handle: lazymem.ArrayHandle) -> bool:
    return not np.array_equal(handle, _right()[handle.name])


inherited: dict[str, Arrays] = {}  # for workers that are forked: set before


def differing_inherited(name: str) -> bool:
    return not np.array_equal(inherited["arrays"][name], _right()[name])


class Rows:
    """A data set for torch's DataLoader: rows of arrays, tensors or handles, each with its number."""

    def __init__(self, *sources: Any) -> None:
        self._sources = sources

    def __len__(self) -> int:
        return len(self._sources[0])

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (index, *(source[index] * 1 for source in self._sources))  # copies: mode "r" is read-only
