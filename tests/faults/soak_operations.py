# SPDX-License-Identifier: Apache-2.0
"""What the soak does at random to lazy memory, and the oracle that it holds every byte against.

Runs in the process that `soak.py` watches. Decisions come from one generator and from nothing that threads
decide, so that a seed does the same operations again. The oracle is plain numpy arrays. In mode "c" writes
change a copy of it that belongs to one open snapshot; after an eviction a page may show what was written
or what the file holds (chunks on their way are not evicted), and nothing else.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lazymem
from lazymem.errors import BackendUnavailable
from lazymem.fetcher.client import fetcher_pid

from .soak_sources import Arrays, Put, Source, make_sources

Log = Callable[[str], None]
Verb = Callable[[], str]
PAGE = os.sysconf("SC_PAGESIZE")
OPEN_MAX = 5
THREADS_MAX = 3
CHILD_DEADLINE = 60.0


@dataclass
class Opened:
    source: Source
    snap: lazymem.Snapshot
    expected: Arrays  # a copy of its own once something was written
    threads: list[threading.Thread] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def mode(self) -> str:
        return self.snap.mode


def raw(array: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class Soak:
    """One soak; `verbs` are what it does. backend: None for a random one at each open."""

    def __init__(
        self, folder: Path, seed: int, backend: str | None, prefix: str, put: Put | None, log: Log
    ) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.backend = backend
        self.counts: Counter[str] = Counter()
        self.log = log
        self.opened: list[Opened] = []
        self.kept: list[tuple[NDArray[Any], NDArray[Any], str]] = []  # arrays whose snapshot was dropped
        self.numbers = iter(range(1 << 60))
        self.sources = make_sources(folder, prefix, put)

    def verbs(self) -> dict[Verb, int]:
        """What may come next, and how often beside the others."""
        return {
            self.open: 12, self.close: 5, self.touch: 30, self.write: 10, self.fork: 5, self.evict: 8,
            self.prefetch: 10, self.read: 6, self.thread: 8, self.join: 3, self.give_back: 6,
            self.kill_fetcher: 2, self.drop: 2, self.collect: 1,
        }  # fmt: skip

    # ---- running ----

    def step(self) -> None:
        verbs = self.verbs()
        verb = self.random.choices(list(verbs), list(verbs.values()))[0]
        if len(self.opened) < 2:
            verb = self.open
        self.log(f"{verb.__name__} ...")
        did = verb()
        if did:  # there was something to do it to
            self.log(f"{verb.__name__}: {did}")
            self.counts[verb.__name__] += 1

    def everything(self) -> None:
        """Each source opened and read, each verb done: what is made once a process is made then."""
        for source in self.sources:
            one = self.open_one(source, "r")
            self.check_all(one)
            one.snap.close()
        self.open()
        for verb in self.verbs():
            self.log(f"first {verb.__name__} ...")
            verb()
        self.finish()

    def finish(self) -> None:
        """Everything right once more, and closed."""
        self.log("finish ...")
        self.check_kept()
        while self.opened:
            self.close()
        self.kept.clear()
        gc.collect()

    def pick(self, wanted: Callable[[Opened], bool] = lambda one: True) -> Opened | None:
        fitting = [one for one in self.opened if wanted(one)]
        return self.random.choice(fitting) if fitting else None

    def name_in(self, one: Opened) -> str:
        return self.random.choice(sorted(one.expected))

    def two_of(self, one: Opened) -> list[str]:
        return self.random.sample(sorted(one.expected), min(2, len(one.expected)))

    # ---- the oracle ----

    def compare(self, shown: NDArray[Any], expected: NDArray[Any], what: str) -> None:
        if (shown.dtype, shown.shape) != (expected.dtype, expected.shape) or not np.array_equal(
            raw(shown), raw(expected)
        ):
            raise AssertionError(f"wrong bytes: {what}{self.difference(shown, expected)}")

    @staticmethod
    def difference(shown: NDArray[Any], expected: NDArray[Any]) -> str:
        if (shown.dtype, shown.shape) != (expected.dtype, expected.shape):
            return f": {shown.dtype}{shown.shape} and not {expected.dtype}{expected.shape}"
        at = np.flatnonzero(raw(shown) != raw(expected))
        some = raw(shown)[at[0] : at[0] + 8].tolist()
        return f": {len(at)} bytes from {at[0]} to {at[-1]}, of {shown.nbytes}; there {some}"

    def check_all(self, one: Opened) -> None:
        for name in self.random.sample(sorted(one.expected), len(one.expected)):
            self.compare(one.snap[name], one.expected[name], f"{one.source.name} {name}")

    def check_kept(self) -> None:
        for shown, expected, what in self.kept:
            self.compare(shown, expected, f"kept {what}")

    def adopt(self, one: Opened) -> None:
        """After an eviction in mode "c": each page is as it was written, or as the file has it."""
        for name, written in one.expected.items():
            base = one.source.expected[name]
            shown, mine, file = raw(one.snap[name]).copy(), raw(written), raw(base)
            start = one.snap.info(name).offset % PAGE
            for begin in range(-start, len(shown), PAGE):
                page = slice(max(begin, 0), begin + PAGE)
                if not (np.array_equal(shown[page], mine[page]) or np.array_equal(shown[page], file[page])):
                    raise AssertionError(f"wrong bytes after evict: {one.source.name} {name} {page}")
            one.expected[name] = shown.view(written.dtype).reshape(written.shape)

    # ---- verbs ----

    def backend_for(self, source: Source) -> str:
        return self.backend or self.random.choice(["auto", "auto", "uffd", "uffd-user", "sigsegv", "eager"])

    def open_one(self, source: Source, mode: str, **more: Any) -> Opened:
        keywords = dict(
            source.keywords,
            mode=mode,
            backend=self.backend_for(source),
            chunk_size=self.random.choice(source.chunk_sizes),
            readahead=self.random.choice([None, 0, 1, 8]),
            threads=self.random.choice([None, 1, 4]),
        )
        if source.movable and keywords["backend"] == "uffd" and self.random.random() < 0.5:
            keywords["install"] = "move"
        keywords.update(more)
        try:
            snap = lazymem.open(source.location, **keywords)
        except BackendUnavailable:
            if "install" not in keywords:
                raise
            snap = lazymem.open(source.location, **{**keywords, "install": "auto"})
        return Opened(source, snap, source.expected)

    def open(self) -> str:
        if len(self.opened) >= OPEN_MAX:
            return ""
        remote = self.random.random() < 0.25  # slower by far
        fitting = [source for source in self.sources if source.is_remote == remote] or self.sources
        one = self.open_one(self.random.choice(fitting), self.random.choice("rc"))
        self.opened.append(one)
        return f"{one.source.name} {one.snap!r}"

    def close(self) -> str:
        if not self.opened:
            return ""
        one = self.opened.pop(self.random.randrange(len(self.opened)))
        self.await_threads(one)
        if self.random.random() < 0.3:
            one.snap.prefetch()  # under way
        one.snap.close()
        return one.source.name

    def touch(self) -> str:
        one = self.pick()
        if one is None:
            return ""
        name = self.name_in(one)
        self.touch_some(self.random, one, name)
        return f"{one.source.name} {name}"

    def touch_some(self, rng: random.Random, one: Opened, name: str) -> None:
        shown, expected = one.snap[name], one.expected[name]
        kind = rng.choice(["all", "slice", "bytes", "bytes"])
        what = f"{one.source.name} {one.snap.backend} {name} {kind}"
        if kind == "all" or expected.ndim == 0 or expected.size == 0:
            self.compare(shown, expected, what)
            return
        flat, wanted = shown.reshape(-1), expected.reshape(-1)
        for _ in range(rng.randint(1, 8)):
            begin = rng.randrange(len(wanted))
            end = begin + 1 if kind == "bytes" else rng.randint(begin, len(wanted))
            self.compare(flat[begin:end], wanted[begin:end], f"{what}[{begin}:{end}]")

    def write(self) -> str:
        one = self.pick(lambda one: one.mode == "c" and not one.threads)
        if one is None:
            return ""
        name = self.name_in(one)
        if one.expected is one.source.expected:
            one.expected = {key: array.copy() for key, array in one.expected.items()}
        size = one.expected[name].nbytes
        if size == 0:
            return ""
        begin = self.random.randrange(size)
        end = min(size, begin + self.random.choice([1, 3, 5000, 200_000]))
        data = np.frombuffer(self.random.randbytes(end - begin), np.uint8)
        one.snap[name].reshape(-1).view(np.uint8)[begin:end] = data
        one.expected[name].reshape(-1).view(np.uint8)[begin:end] = data
        return f"{one.source.name} {name}[{begin}:{end}]"

    def evict(self) -> str:
        # Of one that was written to, only where no thread reads what is about to change.
        one = self.pick(lambda one: one.expected is one.source.expected or not one.threads)
        if one is None:
            return ""
        names = None if self.random.random() < 0.4 else [self.name_in(one)]
        one.snap.evict(names)
        if one.expected is not one.source.expected:
            self.adopt(one)
        return f"{one.source.name} {names}"

    def prefetch(self) -> str:
        one = self.pick()
        if one is None:
            return ""
        names = None if self.random.random() < 0.4 else self.two_of(one)
        wait = self.random.random() < 0.5
        one.snap.prefetch(names, wait=wait)
        return f"{one.source.name} {names} wait={wait}"

    def read(self) -> str:
        one = self.pick()
        if one is None:
            return ""
        name = self.name_in(one)
        self.compare(one.snap.read(name), one.expected[name], f"read {one.source.name} {name}")
        return f"{one.source.name} {name}"

    def thread(self) -> str:
        """A thread that touches, asks and evicts beside everything that follows."""
        one = self.pick()
        if one is None or sum(len(one.threads) for one in self.opened) >= THREADS_MAX:
            return ""
        rng, rounds = random.Random(self.random.random()), self.random.randint(3, 60)
        may_evict = one.expected is one.source.expected

        def work() -> None:
            try:
                for _ in range(rounds):
                    name = rng.choice(sorted(one.expected))
                    deed = rng.choice(["touch"] * 5 + ["prefetch", "read", "evict", "stats"])
                    if deed == "prefetch":
                        one.snap.prefetch(name, wait=True)
                    elif deed == "read":
                        self.compare(one.snap.read(name), one.expected[name], f"thread read {name}")
                    elif deed == "evict" and may_evict:
                        one.snap.evict(name)
                    elif deed == "stats":
                        one.snap.stats()
                    else:
                        self.touch_some(rng, one, name)
            except BaseException:
                one.wrong.append(traceback.format_exc())

        thread = threading.Thread(target=work, daemon=True)
        one.threads.append(thread)
        thread.start()
        return f"{one.source.name} {rounds} rounds"

    def await_threads(self, one: Opened) -> None:
        for thread in one.threads:
            thread.join()
        one.threads.clear()
        if one.wrong:
            raise AssertionError("in a thread: " + one.wrong[0])

    def join(self) -> str:
        count = sum(len(one.threads) for one in self.opened)
        for one in self.opened:
            self.await_threads(one)
        return f"{count} threads" if count else ""

    def give_back(self) -> str:
        """madvise(MADV_DONTNEED) by the application, on whole pages of an array."""
        lazy = ("uffd", "uffd-user", "sigsegv", "map")
        one = self.pick(lambda one: one.snap.backend in lazy and not (one.mode == "c" and one.threads))
        if one is None:
            return ""
        name = self.name_in(one)
        shown = raw_address(one.snap[name])
        begin, end = (shown[0] + PAGE - 1) // PAGE, shown[1] // PAGE
        if end <= begin:
            return ""
        first = self.random.randrange(begin, end)
        count = self.random.randint(1, end - first)
        if libc.madvise(ctypes.c_void_p(first * PAGE), ctypes.c_size_t(count * PAGE), 4) != 0:
            raise OSError(ctypes.get_errno(), "madvise")
        if one.expected is not one.source.expected:
            self.adopt(one)
        return f"{one.source.name} {name} {count} pages"

    def fork(self) -> str:
        seed = self.random.random()
        nested = self.random.randint(0, 2)
        pid = os.fork()
        if pid == 0:
            self.run_child(random.Random(seed), nested)
        self.await_child(pid)
        return f"nested {nested}"

    def run_child(self, rng: random.Random, nested: int) -> None:
        status = 1
        try:
            for one in self.opened:
                one.threads.clear()  # they are the parent's
            self.random = rng
            for one in self.opened:
                deed = rng.choice(["all", "some", "prefetch", "evict", "none"])
                if one.source.is_remote and rng.random() < 0.7:  # each child would start a fetcher
                    deed = "none"
                if deed == "prefetch":
                    one.snap.prefetch(wait=rng.random() < 0.5)
                elif deed == "evict" and one.expected is one.source.expected:
                    one.snap.evict()
                if deed == "all":
                    self.check_all(one)
                elif deed != "none":
                    for _ in range(3):
                        self.touch_some(rng, one, self.name_in(one))
            if rng.random() < 0.3 and len(self.opened) < OPEN_MAX:
                self.open()
                self.touch()
            if nested:
                self.random = random.Random(rng.random())
                pid = os.fork()
                if pid == 0:
                    self.run_child(random.Random(rng.random()), nested - 1)
                self.await_child(pid)
            self.check_kept()
            status = 0
        except BaseException:
            self.log("child: " + traceback.format_exc())
        finally:
            os._exit(status)

    def await_child(self, pid: int, wanted: int = 0) -> None:
        end = time.monotonic() + CHILD_DEADLINE
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > end:
                os.kill(os.getpid(), signal.SIGSTOP)  # the watcher looks at both, and ends them
            time.sleep(0.002)
        if os.waitstatus_to_exitcode(status) != wanted:
            raise AssertionError(f"child ended with {os.waitstatus_to_exitcode(status)}, not {wanted}")

    def kill_fetcher(self) -> str:
        pid = fetcher_pid()
        if pid > 0:
            os.kill(pid, self.random.choice([signal.SIGKILL, signal.SIGTERM]))
        return f"process {pid}" if pid else ""

    def drop(self) -> str:
        """Arrays outlive their snapshot, and go in any order."""
        one = self.pick(lambda one: not one.threads)
        if one is None or len(self.kept) > 6:
            self.random.shuffle(self.kept)
            del self.kept[::2]
            return "some arrays"
        names = self.two_of(one)
        self.kept += [(one.snap[name], one.expected[name], f"{one.source.name} {name}") for name in names]
        self.opened.remove(one)
        return f"{one.source.name} {names}"

    def collect(self) -> str:
        self.check_kept()
        return str(gc.collect())


libc = ctypes.CDLL(None, use_errno=True)


def raw_address(array: NDArray[Any]) -> tuple[int, int]:
    begin = array.__array_interface__["data"][0]
    return begin, begin + array.nbytes
