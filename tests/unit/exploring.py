# SPDX-License-Identifier: Apache-2.0
"""Every order of events of a model. A *world* is everything at one moment; `steps` says what may follow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any


class Wrong(Exception):
    """A world that must not be."""


def explore(
    start: Any,
    steps: Callable[[Any], Iterable[tuple[str, Any]]],
    is_finished: Callable[[Any], bool],
) -> dict[Any, Any]:
    """Every world that can come about. steps: (what happens, the world after it); may raise `Wrong`.

    Raises `Wrong`, with the way there, for a world that must not be, one from which nothing can happen though
    it is not finished, and one from which no finished one can be reached.
    """
    found: dict[Any, tuple[Any, str]] = {start: (None, "")}
    before: dict[Any, list[Any]] = {}
    queue, ends = deque([start]), list[Any]()
    while queue:
        world = queue.popleft()
        try:
            following = list(steps(world))
            if not following and not is_finished(world):
                raise Wrong("somebody waits for ever")
        except Wrong as wrong:
            raise Wrong(f"{wrong}:\n" + "\n".join(way_to(world, found))) from None
        if is_finished(world):
            ends.append(world)
        for what, after in following:
            if after not in found:
                found[after] = (world, what)
                queue.append(after)
            before.setdefault(after, []).append(world)
    for world in found.keys() - reaching(ends, before):
        raise Wrong("it goes round for ever:\n" + "\n".join(way_to(world, found)))
    return found


def reaching(ends: list[Any], before: dict[Any, list[Any]]) -> set[Any]:
    """The worlds from which an end can still be reached."""
    reached, queue = set(ends), deque(ends)
    while queue:
        for world in before.get(queue.popleft(), ()):
            if world not in reached:
                reached.add(world)
                queue.append(world)
    return reached


def way_to(world: Any, found: dict[Any, tuple[Any, str]]) -> list[str]:
    way: list[str] = []
    at = world
    while at is not None:
        at, what = found[at]
        way.append(what)
    return [*way[::-1][1:], str(world)]
