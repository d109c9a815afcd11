# SPDX-License-Identifier: Apache-2.0
"""What becomes of a client and its child when pagers are killed, as a model small enough to kill them at
every moment: one page of a snapshot in each of two address spaces (0: the client's, which has left; 1: its
child's). `_native/ledger.h` and `lazymem/pager/estate.py` say how it is meant.

What the kernel does: madvise and fork tell of themselves and wait until that was read; only then the page
goes, or the child runs. Meanwhile nothing can be put in place. FORK brings a descriptor, which is in the
pager's table as soon as its message is read. If nobody has a space's userfaultfd any more, missing pages read
as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from . import exploring
from .exploring import Wrong

MISSING, SNAPSHOT, ZEROS = "missing", "snapshot", "zeros"


class Ledger(NamedTuple):
    base: str  # what the memory showed when it was begun
    messages: tuple[str, ...] = ()
    counted: int = 0
    applied: int = 0


class Space(NamedTuple):
    """A process's memory, and what it is going to do. touches: of a second thread."""

    runs: bool = False
    page: str = MISSING
    right: str = SNAPSHOT  # what a touch has to read
    program: tuple[str, ...] = ()
    touches: int = 0
    event: str = ""  # nobody has read it yet
    changing: bool = False


class Estate(NamedTuple):
    """What a pager knows of each space, and which of their userfaultfds it has."""

    ledgers: tuple[Ledger | None, ...] = (None, None)
    uffds: tuple[bool, ...] = (False, False)


class World(NamedTuple):
    spaces: tuple[Space, ...]
    kills: int
    own: Estate = Estate((Ledger(SNAPSHOT), None), (True, False))  # the pager's that is there
    left: tuple[Estate, ...] = ()  # of pagers that died, with their twins; the last one's last
    pager: str = "runs"
    tables: tuple[str | None, ...] = (SNAPSHOT, None)


Step = tuple[str, World]
#: Either would do: there are never two ledgers that differ, and if there were, the last one counts.
FIRST = "the twin keeps what it gave, and the first ledger counts"


def put(pair: tuple[Any, ...], number: int, value: Any) -> tuple[Any, ...]:
    return (*pair[:number], value, *pair[number + 1 :])


def with_space(world: World, number: int, **changes: Any) -> World:
    return world._replace(spaces=put(world.spaces, number, world.spaces[number]._replace(**changes)))


def with_ledger(world: World, number: int, ledger: Ledger | None) -> World:
    return world._replace(own=world.own._replace(ledgers=put(world.own.ledgers, number, ledger)))


# ---- the client and its child ----


def processes(world: World) -> Iterator[Step]:
    for number, space in enumerate(world.spaces):
        if not space.runs:
            continue
        if space.touches:
            yield from touch(world, number, touches=space.touches - 1)
        if not space.program or space.event:
            continue
        doing, rest = space.program[0], space.program[1:]
        if doing == "touch":
            yield from touch(world, number, program=rest)
        elif not space.changing:
            after = with_space(world, number, event=doing, changing=True)
            if doing == "fork":
                after = with_space(after, 1, page=space.page, right=space.right)
            yield f"{number}: {doing}", after
        else:
            after = with_space(world, number, changing=False, program=rest)
            if doing == "fork":
                after = with_space(after, 1, runs=True)
            else:
                after = with_space(after, number, page=MISSING, right=ZEROS)
            yield f"{number}: {doing} was read", after


def touch(world: World, number: int, **after: Any) -> Iterator[Step]:
    space = world.spaces[number]
    page = space.page
    if page == MISSING and not any(estate.uffds[number] for estate in (world.own, *world.left)):
        page = ZEROS
    if page != MISSING:
        if page != space.right:
            raise Wrong(f"a touch reads {page}")
        yield f"{number}: touch", with_space(world, number, **after)


def is_touched(space: Space) -> bool:
    return space.runs and (space.touches > 0 or space.program[:1] == ("touch",))


# ---- pagers ----


def pager(world: World, mistakes: frozenset[str]) -> Iterator[Step]:
    place, _, hand = world.pager.partition(" ")
    if world.kills and place != "dead":
        left = (*world.left, world.own)
        yield "kill", World(world.spaces, world.kills - 1, Estate(), left, "dead", (None, None))
    if place == "dead":
        yield "another pager", world._replace(pager="begins")
    elif place == "begins":
        tables, uffds = inherited(world.left, mistakes)
        yield "look", world._replace(pager="looked", tables=tables, own=Estate(uffds=uffds))
    elif place == "looked" and "lets go before it records" in mistakes and world.left:
        yield "let go", world._replace(left=())
    elif place == "looked":
        ledgers = tuple(None if table is None else Ledger(table) for table in world.tables)
        yield "record", world._replace(pager="recorded", own=world.own._replace(ledgers=ledgers))
    elif place == "recorded":
        left = world.left if FIRST in mistakes else ()
        yield "let go", world._replace(pager="runs", left=left)
    else:
        yield from serve(world, hand, mistakes)


def serve(world: World, hand: str, mistakes: frozenset[str]) -> Iterator[Step]:
    """hand: what was taken from the kernel, of which space, and how far it has come."""
    for number, (space, table) in enumerate(zip(world.spaces, world.tables, strict=True)):
        if table is None or not world.own.uffds[number] or hand[:1] == str(number):
            continue
        if is_touched(space) and space.page == MISSING and not space.changing:
            yield f"serve {number}", with_space(world, number, page=table)
        ledger = world.own.ledgers[number]
        if hand or ledger is None:
            continue
        if space.event:
            yield f"read of {number}", take(world, number, ledger, mistakes)
        if ledger.messages:
            yield f"begin a ledger of {number}", with_ledger(world, number, Ledger(table))
    if hand:
        number, message, step = hand.split()
        yield from note(world, int(number), message, step, mistakes)


def take(world: World, number: int, ledger: Ledger, mistakes: frozenset[str]) -> World:
    message = world.spaces[number].event
    after = with_space(world, number, event="")._replace(pager=f"runs {number} {message} read")
    if "reads elsewhere than into the ledger" not in mistakes:
        after = with_ledger(after, number, ledger._replace(messages=(*ledger.messages, message)))
    if message == "fork":
        after = after._replace(own=after.own._replace(uffds=(True, True)))
    return after


def note(world: World, number: int, message: str, step: str, mistakes: frozenset[str]) -> Iterator[Step]:
    ledger = world.own.ledgers[number]
    assert ledger is not None
    order = ["read", "counted", "done", "applied"]
    if "applied before it is done" in mistakes:
        order = ["read", "counted", "applied", "done"]
    following = order[order.index(step) + 1]
    after = world
    if following == "counted":
        counted = len(ledger.messages)
        if "reads elsewhere than into the ledger" in mistakes:
            ledger = ledger._replace(messages=(*ledger.messages, message))
            counted += 1
        after = with_ledger(after, number, ledger._replace(counted=counted))
    elif following == "applied":
        after = with_ledger(after, number, ledger._replace(applied=ledger.counted))
    elif message == "fork":
        table = world.tables[number]
        assert table is not None
        after = with_ledger(after._replace(tables=(table, table)), 1, Ledger(table))
    else:
        after = after._replace(tables=put(world.tables, number, ZEROS))
    last = following == order[-1]
    yield following, after._replace(pager="runs" if last else f"runs {number} {message} {following}")


def inherited(
    left: tuple[Estate, ...], mistakes: frozenset[str]
) -> tuple[tuple[str | None, ...], tuple[bool, ...]]:
    """What the next pager makes of what others have left: tables, and whose userfaultfds it is given."""
    uffds = tuple(any(estate.uffds[number] for estate in left) for number in (0, 1))
    tables: list[str | None] = [None, None]
    children: list[str | None] = []
    for estate in reversed(left) if FIRST in mistakes else left:
        for number, ledger in enumerate(estate.ledgers):
            if ledger is None or not uffds[number]:
                continue
            told = ledger.messages
            if "what is not counted is not looked at" in mistakes:
                told = told[: ledger.counted]
            table = ledger.base
            for index, message in enumerate(told):
                if message == "remove":
                    table = ZEROS
                elif index >= ledger.applied:
                    children.append(table)
            tables[number] = table
    if tables[1] is None and uffds[1] and children and "children without a ledger are lost" not in mistakes:
        tables[1] = children[-1]
    return tuple(tables), uffds


# ---- exploring ----


def is_finished(world: World) -> bool:
    return all(not space.program and not space.touches for space in world.spaces)


def explore(start: World, mistakes: frozenset[str] = frozenset()) -> int:
    """Every world that can come about; how many. Raises `Wrong`, with the way there."""

    def steps(world: World) -> Iterator[Step]:
        yield from processes(world)
        yield from pager(world, mistakes)

    return len(exploring.explore(start, steps, is_finished))
