# SPDX-License-Identifier: Apache-2.0
"""The soak's verbs for files that go bad: a chunk that is damaged and heals, a file that is replaced."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np

import lazymem
from lazymem.errors import LazymemError, SnapshotChanged
from lazymem.format.reader import load_index
from lazymem.store.local import LocalBlob

from .soak_operations import Opened, Soak, Verb, raw
from .soak_sources import Source


def spoil(path: Path, name: str) -> None:
    """Flip a bit in the stored bytes of the chunk that an array begins in; the file's times stay."""
    with LocalBlob(path) as blob:
        index = load_index(blob)
        record = index.record_of(index.range_of(index.rows[name])[0] // index.chunk_size)
        assert record is not None
        at = int(index.records["offset"][record]) + 50
    times = path.stat()
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


class DamagingSoak(Soak):
    def verbs(self) -> dict[Verb, int]:
        return {**super().verbs(), self.damage: 3, self.swap: 2}

    def private_copy(self) -> Source:
        """A compressed local snapshot in a file of its own."""
        source = self.random.choice([s for s in self.sources if s.is_local_snapshot and s.faulting])
        path = self.folder / f"copy-{next(self.numbers)}.lzm"
        shutil.copy(source.location, path)
        return replace(source, name=f"copy of {source.name}", location=str(path))

    def damage(self) -> str:
        """A chunk goes bad, is named, ends whoever touches it, and heals when its bytes are right again."""
        if self.backend == "eager":
            return ""
        source = self.private_copy()
        path = Path(source.location)
        good, times = path.read_bytes(), path.stat()
        name = "big" if source.movable else self.random.choice(["big", "noise"])
        lazy = self.backend or self.random.choice(["uffd", "uffd-user", "sigsegv"])
        one = self.open_one(source, self.random.choice("rc"), backend=lazy)
        spoil(path, name)
        said = self.suffer(one, name)
        with open(path, "r+b") as file:
            file.write(good)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        one.snap.prefetch(wait=True)
        self.check_all(one)
        one.snap.close()
        path.unlink()
        return f"{source.name} {name}: {said}"

    def suffer(self, one: Opened, name: str) -> str:
        said = ""
        for deed in self.random.sample(["ask", "touch", "others"], 3):
            if deed == "ask":
                try:
                    one.snap.prefetch(name, wait=True)
                except LazymemError as error:
                    said = type(error).__name__
                else:
                    raise AssertionError(f"damage was not seen: {one.source.name} {name}")
            elif deed == "others":
                if not one.source.movable:  # there all arrays lie in two chunks
                    self.touch_some(self.random, one, "ids")
            else:
                pid = os.fork()
                if pid == 0:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                    bytes(raw(one.snap[name])[:10])
                    os._exit(0)
                self.await_child(pid, -signal.SIGBUS)
        return said

    def swap(self) -> str:
        """The file is another one: what is in place stays right, the rest is refused, never mixed."""
        source = self.private_copy()
        path = Path(source.location)
        one = self.open_one(source, "r", readahead=0)  # nothing under way when the file changes
        name = self.name_in(one)
        self.touch_some(self.random, one, name)
        how = self.random.choice(["rename", "rewrite", "cut"])
        if how == "rename":
            other = path.with_suffix(".new")
            lazymem.build({"big": np.ones(1000)}, other)
            os.replace(other, path)
            self.check_all(one)
        else:
            missing = 0 in one.snap.chunk_states()
            with open(path, "r+b") as file:
                file.truncate(100 if how == "cut" else None)
                file.write(bytes(100))
            try:
                one.snap.prefetch(wait=True)
                if missing and how == "cut":
                    raise AssertionError(f"a cut was not seen: {source.name}")
                self.check_all(one)
            except SnapshotChanged:
                pass
        one.snap.close()
        path.unlink()
        return f"{source.name} {how}"
