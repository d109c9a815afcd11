# SPDX-License-Identifier: Apache-2.0
"""How a pager's threads and the engine's serve one space (`_native/pager.c`), as a model: one chunk of one
page, threads of the client that touch it, and one that gives it back (REMOVED_ZERO: it reads as zeros then).

Whoever has the space's lock reads what the kernel has to say, faults and events, and records it. A fault
whose chunk is away becomes a waiter; whoever decodes the chunk takes the waiters out and delivers. Nobody
waits for the lock: he marks the space dirty, and the one that has it sees to that. `again` is the bell that
has a thread look at everything.

What the kernel does: a wake rouses all sleepers, and messages that nobody has read are gone then; while
memory is changing nothing can be put in place (EAGAIN).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from . import exploring
from .exploring import Wrong

MISSING, SNAPSHOT, ZEROS = "missing", "snapshot", "zeros"
ABSENT, LOADING, PRESENT = "absent", "loading", "present"


class World(NamedTuple):
    touchers: tuple[str, ...] = ("runs",)
    remover: str = "done"
    page: str = MISSING
    edge: bool = False  # epoll has something to tell
    # The pager's.
    threads: tuple[str, ...] = ("idle",)  # the last is the engine's, which decodes
    lock: int = -1  # the thread that has it
    dirty: bool = False
    again: bool = False
    fault: bool = False  # read, and not looked at yet
    waiting: bool = False
    shows: str = SNAPSHOT
    chunk: str = ABSENT


Step = tuple[str, World]


def put(places: tuple[str, ...], index: int, place: str) -> tuple[str, ...]:
    return (*places[:index], place, *places[index + 1 :])


# ---- the client ----


def client(world: World) -> Iterator[Step]:
    for index, place in enumerate(world.touchers):
        if place == "runs" and world.page == MISSING:
            yield "fault", world._replace(touchers=put(world.touchers, index, "unread"), edge=True)
        elif place == "runs":
            if world.page != (ZEROS if world.remover == "done" and world.shows == ZEROS else SNAPSHOT):
                raise Wrong(f"a touch reads {world.page}")
            yield "touch", world._replace(touchers=put(world.touchers, index, "done"))
    if world.remover == "will":
        yield "give back", world._replace(remover="told", edge=True)
    elif world.remover == "read":
        yield "it was read", world._replace(remover="done", page=MISSING)


def is_changing(world: World) -> bool:
    return world.remover in ("told", "read")


def roused(world: World) -> World:
    return world._replace(
        touchers=tuple("runs" if place in ("unread", "asleep") else place for place in world.touchers)
    )


def drained(world: World, mistakes: frozenset[str]) -> World:
    """All that the kernel has to say was read."""
    fault = world.fault or "unread" in world.touchers
    world = world._replace(
        fault=fault, touchers=tuple("asleep" if place == "unread" else place for place in world.touchers)
    )
    if world.remover == "told":
        world = world._replace(remover="read", shows=ZEROS)
        if "an event wakes nobody" not in mistakes:
            world = roused(world)
    return world


# ---- threads ----


def threads(world: World, mistakes: frozenset[str]) -> Iterator[Step]:
    for index, place in enumerate(world.threads):

        def go(to: str, index: int = index, **changes: Any) -> World:
            return world._replace(threads=put(world.threads, index, to), **changes)

        decodes = index == len(world.threads) - 1
        if place == "idle" and not decodes:
            if world.edge:
                yield "told", go("serve", edge=False)
            if world.again:
                yield "bell", go("settle", again=False)
        elif place == "idle":
            if world.chunk == LOADING:
                yield "decode", go("settle", chunk=PRESENT)
        elif place == "serve":
            yield "mark", go("try", dirty=True)
        elif place == "try":
            yield from try_lock(world, go, index)
        elif place.startswith("has"):
            yield from with_lock(world, go, place[4:], mistakes)
        elif place == "settle":
            rest = rest_of(world, index)
            taken = world.waiting and (not decodes or world.chunk == PRESENT)
            yield "take waiters", go("deliver" if taken else rest, waiting=world.waiting and not taken)
        elif place == "deliver":
            yield from deliver(world, go, index)


def try_lock(world: World, go: Any, index: int) -> Iterator[Step]:
    if not world.dirty:
        yield "nothing to do", go("idle")
    elif world.lock < 0:
        yield "lock", go("has drain", lock=index, dirty=False)
    else:
        yield "somebody has it", go("idle")


def unlocked(world: World, mistakes: frozenset[str]) -> World:
    again = world.again or (world.dirty and "nobody sees that it is dirty" not in mistakes)
    return world._replace(lock=-1, again=again)


def filled(world: World, mistakes: frozenset[str]) -> World | None:
    """What the space shows is put in place; None: the kernel says EAGAIN."""
    if is_changing(world) and "the kernel puts in place what is changing" not in mistakes:
        return None
    page = world.shows if world.page == MISSING else world.page
    return roused(world._replace(page=page))


def with_lock(world: World, go: Any, doing: str, mistakes: frozenset[str]) -> Iterator[Step]:
    if doing == "drain":
        after = drained(go("has look"), mistakes)
        yield "read", after
    elif doing == "look":
        if not world.fault:
            yield "unlock", unlocked(go("try"), mistakes)
        elif world.shows == ZEROS or world.chunk == PRESENT:
            done = filled(go("has look", fault=False), mistakes)
            yield "serve", done if done is not None else unlocked(go("try", dirty=True), mistakes)
        else:
            yield "away", go("has wait", fault=False)
    elif doing == "wait":
        yield "wait", go("has look again", waiting=True)
    elif doing == "look again":
        missed = world.chunk == PRESENT and "settled since is not looked at" not in mistakes
        yield "look again", go("has wish", again=world.again or missed)
    elif doing == "deliver":
        yield "deliver", delivered(world, go, mistakes)
    elif doing == "wish":
        chunk = LOADING if world.chunk == ABSENT else world.chunk
        yield "wish", unlocked(go("try", chunk=chunk), mistakes)


def deliver(world: World, go: Any, index: int) -> Iterator[Step]:
    """A waiter that was taken out."""
    rest = rest_of(world, index)
    if world.chunk != PRESENT:  # it was looked at for another reason
        yield "waits on", go(rest, waiting=True)
    elif world.lock >= 0:
        yield "put back", go(rest, waiting=True, again=True)
    else:
        yield "lock", go("has deliver", lock=index)


def delivered(world: World, go: Any, mistakes: frozenset[str]) -> World:
    """By who has the lock."""
    rest = rest_of(world, world.lock)
    if world.shows == ZEROS:  # the chunk is shown nowhere
        return unlocked(go(rest), mistakes)
    done = filled(go(rest), mistakes)
    if done is None:  # what is read now has to be looked at
        done = drained(go(rest, waiting=True, again=True), mistakes)._replace(dirty=True)
    return unlocked(done, mistakes)


def rest_of(world: World, index: int) -> str:
    return "idle" if index == len(world.threads) - 1 else "serve"


# ---- exploring ----


def is_finished(world: World) -> bool:
    return all(place == "done" for place in world.touchers) and world.remover == "done"


def explore(start: World, mistakes: frozenset[str] = frozenset()) -> int:
    """Every world that can come about; how many. Raises `Wrong`, with the way there."""

    def steps(world: World) -> Iterator[Step]:
        yield from client(world)
        for what, after in threads(world, mistakes):
            yield what, after._replace(touchers=tuple(sorted(after.touchers)))

    return len(exploring.explore(start, steps, is_finished))
