# SPDX-License-Identifier: Apache-2.0
"""The protocol between touchers, engine threads, callers, the application and fork, as a model small enough
to try every order of events: one region, one chunk of one page. DESIGN.md has it as a table.

A *world* is everything at one moment. An *actor* is a function from a world to the worlds that its next step
may lead to; what it does in one step nothing comes between, as under the engine's lock, in one compare-and-
swap or one ioctl. `explore` goes through all worlds, `check` looks for those that must not be. *Mistakes*
leave a part of the protocol out, so that the tests see the model catch it.

What the kernel does: a touch of a missing page puts its thread to sleep and makes a message; a wake rouses
all sleepers of the page, and messages that nobody has read are gone then; fork copies memory page by page,
but no page comes or goes meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from . import exploring
from .exploring import Wrong

ABSENT, LOADING, WANTED, PRESENT, FAILED, POISONED = (
    "absent",
    "loading",
    "wanted",
    "present",
    "failed",
    "poisoned",
)
STATES = (ABSENT, LOADING, WANTED, PRESENT, FAILED, POISONED)

#: What `table.c` does to a chunk's state: (operation, state) -> state; not named: refused, nothing changes.
#: `test_protocol_model.py` holds it against the C.
TRANSITIONS = {
    ("claim", ABSENT): LOADING,
    ("claim", FAILED): LOADING,
    ("claim_wanted", ABSENT): WANTED,
    ("claim_wanted", FAILED): WANTED,
    ("want", LOADING): WANTED,
    ("want", WANTED): WANTED,
    ("fail", LOADING): FAILED,
    ("reclaim", PRESENT): WANTED,
    ("reclaim", POISONED): WANTED,
    ("evict", PRESENT): LOADING,
    ("reset", FAILED): ABSENT,
    ("reset", POISONED): ABSENT,
    ("abandon", LOADING): ABSENT,
    ("abandon", WANTED): ABSENT,
}
OPERATIONS = ("claim", "claim_wanted", "want", "fail", "reclaim", "evict", "reset", "abandon")

MISSING, GOOD, POISON, ZEROS, UNMAPPED = "missing", "good", "poison", "zeros", "unmapped"


class World(NamedTuple):
    state: str = ABSENT
    page: str = MISSING
    disk: bool = True  # its bytes are right
    span: bool = False  # the chunk is queued for prefetch
    closing: bool = False
    removed: bool = False  # no address leads to the region any more
    freed: bool = False
    tasks: int = 0
    calls: int = 0
    evictions: int = 0
    lifecycle: str = ""  # who holds it
    copying: bool = False  # fork holds the address space
    # One place in its program for each actor.
    touchers: tuple[str, ...] = ()
    workers: tuple[str, ...] = ()  # resolvers, and helpers
    asker: str = "done"
    seen: int = 0  # evictions, when the asker queued
    evictor: str = "done"
    application: int = 0  # times that it may still give the page back
    mischief: int = 0  # times that the disk may still turn
    closer: str = "done"
    forker: str = "done"
    copied: tuple[str, str] = ("", "")  # state and page of the child, so far


Step = tuple[str, World]
Actor = Callable[[World, frozenset[str]], Iterator[Step]]


def put(places: tuple[str, ...], index: int, place: str) -> tuple[str, ...]:
    return (*places[:index], place, *places[index + 1 :])


def with_region(world: World) -> World:
    if world.freed:
        raise Wrong("the region is used after it was freed")
    return world


# ---- whoever touches: a thread of the application, or in a call ("+") lm_region_read ----

WOKEN = {"unread": "runs", "asleep": "runs", "unread+": "runs+", "asleep+": "runs+"}


def touchers(world: World, mistakes: frozenset[str]) -> Iterator[Step]:
    for index, place in enumerate(world.touchers):

        def go(to: str, index: int = index, **more: object) -> World:
            return world._replace(touchers=put(world.touchers, index, to), **more)  # type: ignore[arg-type]

        if place == "call":  # it enters first
            yield "enter", go("done") if world.closing else go("runs+", calls=world.calls + 1)
        elif place.startswith("runs"):
            if world.page == MISSING:
                yield "fault", go(place.replace("runs", "unread"))
            elif world.page in (ZEROS, UNMAPPED):
                raise Wrong(f"a touch met {world.page}")
            else:
                yield "touch", go("done", calls=world.calls - (place == "runs+"))


# ---- resolvers and helpers: claim, populate, publish, wake ----


def workers(world: World, mistakes: frozenset[str]) -> Iterator[Step]:
    for index, place in enumerate(world.workers):

        def go(to: str, index: int = index, **more: object) -> World:
            return world._replace(workers=put(world.workers, index, to), **more)  # type: ignore[arg-type]

        kind, _, doing = place.partition(" ")
        if doing == "idle" and kind == "resolver":
            yield from read_message(world, go)
        elif doing == "idle":
            if world.span:
                with_region(world)
                state = TRANSITIONS.get(("claim", world.state))
                if state is None:
                    yield "skip", world._replace(span=False)
                else:
                    yield "take", go(f"{kind} prepare", span=False, state=state, tasks=world.tasks + 1)
        elif doing == "accept":
            yield from accept(world, go, kind, mistakes)
        else:
            yield from populate(with_region(world), go, kind, doing, mistakes)


Go = Callable[..., World]


def read_message(world: World, go: Go) -> Iterator[Step]:
    for index, place in enumerate(world.touchers):
        if place.startswith("unread"):
            yield (
                "read",
                go("resolver accept", touchers=put(world.touchers, index, place.replace("unread", "asleep"))),
            )


def accept(world: World, go: Go, kind: str, mistakes: frozenset[str]) -> Iterator[Step]:
    if world.removed:
        yield "too late", go(f"{kind} idle")
        return
    with_region(world)
    ahead = [False]
    if not world.closing or "run ahead while closing" in mistakes:
        ahead.append(True)
    claimed, wanted = TRANSITIONS.get(("claim_wanted", world.state)), TRANSITIONS.get(("want", world.state))
    for span in ahead:
        if claimed is not None:
            yield (
                "claim",
                go(f"{kind} prepare", state=claimed, tasks=world.tasks + 1, span=world.span or span),
            )
        elif wanted is not None:
            state = world.state if "want is forgotten" in mistakes else wanted
            yield "want", go(f"{kind} idle", state=state, span=world.span or span)
    if claimed is None and wanted is None:
        yield "recheck", go(f"{kind} recheck", tasks=world.tasks + 1)


def populate(world: World, go: Go, kind: str, doing: str, mistakes: frozenset[str]) -> Iterator[Step]:
    is_early = "present before install" in mistakes
    if doing == "recheck":
        reclaimed = TRANSITIONS.get(("reclaim", world.state))
        if "poisoned is never tried again" in mistakes and world.state == POISONED:
            reclaimed = None
        if world.page == MISSING and reclaimed is not None:
            if "recheck owns nothing" in mistakes:
                yield "look", go(f"{kind} add" if world.disk else f"{kind} condemn")
            else:
                yield "reclaim", go(f"{kind} prepare", state=reclaimed)
        else:
            yield "old message", go(f"{kind} wake")
    elif doing == "add":
        if not world.copying:
            yield "install", go(f"{kind} wake", page=GOOD if world.page in (MISSING, POISON) else world.page)
    elif doing == "condemn":
        if world.state == PRESENT:
            yield "condemn", go(f"{kind} poison", state=POISONED)
        else:
            yield "let be", go(f"{kind} wake")
    elif doing == "prepare":
        if world.closer in ("wait", "remove"):  # bytes that a network was to bring are nobody's now
            yield "give up", go(f"{kind} finish", state=ABSENT)
        if world.disk:
            yield "decode", go(f"{kind} publish" if is_early else f"{kind} install")
        else:
            yield "bad bytes", go(f"{kind} fail")
    elif doing == "install":
        if not world.copying:
            after = "wake" if is_early else "publish"
            page = GOOD if world.page in (MISSING, POISON) else world.page
            yield "install", go(f"{kind} {after}", page=page)
    elif doing == "publish":
        yield "publish", go(f"{kind} install" if is_early else f"{kind} wake", state=PRESENT)
    elif doing == "fail":
        failed = TRANSITIONS.get(("fail", world.state))
        if failed is not None or "failure of a wanted chunk is silent" in mistakes:
            yield "fail", go(f"{kind} finish", state=FAILED)
        else:
            yield "wanted", go(f"{kind} poison")
    elif doing == "poison":
        if not world.copying:
            yield (
                "poison",
                go(f"{kind} poisoned", page=POISON),
            )  # with UFFDIO_POISON pages that are there stay
            if world.page == GOOD:
                yield "step over", go(f"{kind} poisoned")
    elif doing == "poisoned":
        yield "publish", go(f"{kind} wake", state=POISONED)
    elif doing == "wake":
        yield (
            "wake",
            go(f"{kind} finish", touchers=world.touchers if "no wake" in mistakes else roused(world)),
        )
    elif doing == "finish":
        yield "finish", go(f"{kind} idle", tasks=world.tasks - 1)


def roused(world: World) -> tuple[str, ...]:
    """Sleepers go on; messages that nobody has read are gone."""
    return tuple(WOKEN.get(place, place) for place in world.touchers)


# ---- callers ----


def asker(world: World, mistakes: frozenset[str]) -> Iterator[Step]:
    """prefetch(wait=True)"""
    if world.asker == "call":
        if world.closing:
            yield "refused", world._replace(asker="done")
        else:
            yield "enter", world._replace(asker="queue", calls=world.calls + 1)
    elif world.asker == "queue":
        with_region(world)
        if world.closing:
            yield "closed", world._replace(asker="leave")
        else:
            state = TRANSITIONS.get(("reset", world.state), world.state)
            yield "queue", world._replace(asker="wait", span=True, state=state, seen=world.evictions)
    elif world.asker == "wait":
        with_region(world)
        if world.closing or world.state in (PRESENT, FAILED, POISONED):
            yield "answer", world._replace(asker="leave")
        elif world.seen != world.evictions and "evicted while waited for" not in mistakes:
            yield "ask again", world._replace(asker="queue")
    elif world.asker == "leave":
        yield "leave", world._replace(asker="done", calls=world.calls - 1)


def evictor(world: World, mistakes: frozenset[str]) -> Iterator[Step]:
    gone = MISSING if world.page in (GOOD, POISON) else world.page
    early = "absent before the page is given back" in mistakes
    if world.evictor == "call":
        if world.closing:
            yield "refused", world._replace(evictor="done")
        else:
            yield "enter", world._replace(evictor="evict", calls=world.calls + 1, span=False)
    elif world.evictor == "evict":
        state = TRANSITIONS.get(("evict", world.state))
        if state is None:
            yield "not there", world._replace(evictor="leave")
        else:
            yield "evict", world._replace(evictor="publish" if early else "give back", state=state)
    elif world.evictor == "give back" and not world.copying:
        yield "give back", world._replace(evictor="wake" if early else "publish", page=gone)
    elif world.evictor == "publish":
        yield "publish", world._replace(evictor="give back" if early else "wake", state=ABSENT)
    elif world.evictor == "wake":
        touched = world.touchers if "evict does not wake" in mistakes else roused(world)
        yield "wake", world._replace(evictor="leave", touchers=touched)
    elif world.evictor == "leave":
        calls, evictions = world.calls - 1, world.evictions + 1
        yield "leave", world._replace(evictor="done", calls=calls, evictions=evictions)


def application(world: World, mistakes: frozenset[str]) -> Iterator[Step]:
    """madvise(MADV_DONTNEED), and a disk that goes bad and comes right."""
    if world.application > 0 and world.page in (GOOD, POISON) and not world.copying:
        yield "dontneed", world._replace(application=world.application - 1, page=MISSING)
    if world.mischief > 0:
        yield "disk", world._replace(mischief=world.mischief - 1, disk=not world.disk)


def closer(world: World, mistakes: frozenset[str]) -> Iterator[Step]:
    """Once no thread uses the memory but through a call."""
    idle = world.tasks == 0 and world.calls == 0
    if world.closer == "call":
        if all(place == "done" or place[-1] == "+" or place == "call" for place in world.touchers):
            hasty = "close forgets calls that touch" in mistakes
            yield "close", world._replace(closer="leave" if hasty else "touched", closing=True, application=0)
    elif world.closer == "touched":
        if not any(place[-1] == "+" for place in world.touchers):
            yield "nobody touches", world._replace(closer="leave")
    elif world.closer == "leave":
        yield "drop", world._replace(closer="wait", span=False)
    elif world.closer == "wait":
        if (idle or "close does not wait" in mistakes) and not world.lifecycle:
            yield "idle", world._replace(closer="remove", lifecycle="closer")
    elif world.closer == "remove":
        if idle or "idle is not asked again" in mistakes or "close does not wait" in mistakes:
            yield "remove", world._replace(closer="free", removed=True)
        else:
            yield "not idle", world._replace(closer="wait", lifecycle="")
    elif world.closer == "free" and not world.copying:
        yield "free", world._replace(closer="done", freed=True, page=UNMAPPED, lifecycle="")


def forker(world: World, mistakes: frozenset[str]) -> Iterator[Step]:
    """The kernel copies the chunk's page and its state in whatever order they lie."""
    state, page = world.copied
    if world.forker == "call" and world.freed:
        yield "fork", world._replace(forker="done")
    elif world.forker == "call" and not world.lifecycle:
        yield (
            "fork",
            world._replace(forker="copy", lifecycle="forker", copying=True),
        )
    elif world.forker == "copy":
        if not state:
            yield "copy state", world._replace(copied=(world.state, page))
        if not page:
            yield "copy page", world._replace(copied=(state, world.page))
        if state and page:
            yield "forked", world._replace(forker="done", lifecycle="", copying=False, copied=("", ""))


ACTORS: tuple[tuple[str, Actor], ...] = (
    ("toucher", touchers), ("worker", workers), ("asker", asker), ("evictor", evictor),
    ("application", application), ("closer", closer), ("forker", forker),
)  # fmt: skip


def child_of(world: World, mistakes: frozenset[str]) -> Iterable[World]:
    """What a fork's child begins with: one thread, which may touch, and the resolver of its own."""
    state, page = world.copied
    if "child keeps loading" not in mistakes:
        state = TRANSITIONS.get(("abandon", state), state)
    if page == MISSING and "child is not registered" in mistakes:
        page = ZEROS
    # Where no page of the mapping was ever there, the kernel does not copy its markers either.
    for seen in {page, MISSING if page == POISON else page}:
        yield World(state=state, page=seen, touchers=("runs",), workers=("resolver idle",), disk=world.disk)


# ---- exploring ----


def steps(world: World, mistakes: frozenset[str]) -> Iterator[Step]:
    for name, actor in ACTORS:
        for what, after in actor(world, mistakes):
            yield f"{name}: {what}", after


OWNING = ("prepare", "install", "publish", "fail")  # and "poison", after it


def inspect(world: World) -> None:
    """Raise `Wrong` for what no moment may show."""
    owners = sum(place.split()[1] in OWNING for place in world.workers)
    owners += world.evictor in ("give back", "publish")
    if owners > 1:
        raise Wrong("two own the chunk")
    if world.state == PRESENT and world.page == POISON:
        raise Wrong("a chunk that is present raises a signal")


def is_finished(world: World) -> bool:
    places = (*world.touchers, world.asker, world.evictor, world.closer, world.forker)
    return all(place == "done" for place in places)


def explore(start: World, mistakes: frozenset[str] = frozenset()) -> int:
    """Every world that can come about; how many. Raises `Wrong`, with the way there."""

    def following(world: World) -> Iterator[Step]:
        inspect(world)
        for what, after in steps(world, mistakes):
            yield what, alike(after)

    found = exploring.explore(start, following, is_finished)
    children = {
        child
        for world in found
        if world.forker == "copy" and all(world.copied)
        for child in child_of(world, mistakes)
    }
    return len(found) + sum(explore(child, mistakes) for child in children)


def alike(world: World) -> World:
    """One world for all in which only actors of a kind have changed places."""
    return world._replace(touchers=tuple(sorted(world.touchers)), workers=tuple(sorted(world.workers)))
