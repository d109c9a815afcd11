# SPDX-License-Identifier: Apache-2.0
"""The cache against a model that is a dict: what it gives is what was written last, or nothing.

Between calls anything may happen to its files.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lazymem.cache import ChunkCache

LIMIT = 40_000
KEYS = [ChunkCache.object_key("url", identity, 9) for identity in ("1", "2")]
PIECES = st.tuples(st.sampled_from(KEYS), st.integers(0, 3), st.sampled_from([1, 5000, 12_288, 50_000]))


class CacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.caches = [ChunkCache(self.folder, LIMIT) for _ in range(2)]
        self.model: dict[tuple[str, int, int], bytes] = {}

    def teardown(self) -> None:
        for cache in self.caches:
            cache.close()
        shutil.rmtree(self.folder)

    def files(self) -> list[Path]:
        return sorted(Path(self.folder).glob("v1/*/*"))

    @rule(who=st.integers(0, 1), where=PIECES, fill=st.integers(0, 255))
    def write(self, who: int, where: tuple[str, int, int], fill: int) -> None:
        data = bytes([fill]) * where[2]
        self.caches[who].write(where[0], where[1], data)
        self.model[where] = data

    @rule(who=st.integers(0, 1), where=PIECES)
    def read(self, who: int, where: tuple[str, int, int]) -> None:
        out = bytearray(where[2])
        if self.caches[who].read_into(where[0], where[1], memoryview(out)):
            assert out == self.model[where]

    @rule(who=st.integers(0, 1), where=PIECES, fill=st.integers(0, 255))
    def written_is_there_at_once(self, who: int, where: tuple[str, int, int], fill: int) -> None:
        if where[2] <= LIMIT // 2:
            self.write(who, where, fill)
            out = bytearray(where[2])
            assert self.caches[who].read_into(where[0], where[1], memoryview(out))
            assert out == self.model[where]

    @rule(who=st.integers(0, 1), where=PIECES)
    def discard(self, who: int, where: tuple[str, int, int]) -> None:
        # After `vanish` it may still be in the directory that the other instance has made.
        self.caches[who].discard(*where)
        assert not self.caches[who].read_into(where[0], where[1], memoryview(bytearray(where[2])))

    @rule(who=st.integers(0, 1), limit=st.integers(0, LIMIT))
    def prune(self, who: int, limit: int) -> None:
        assert self.caches[who].prune(limit).bytes <= limit

    @precondition(lambda self: self.files())
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(self.files()))
        content = bytearray(path.read_bytes())
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])

    @precondition(lambda self: len(self.files()) > 1)
    @rule(data=st.data())
    def stray(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(self.files()))
        shutil.copy(source, data.draw(st.sampled_from([path for path in self.files() if path != source])))

    @rule()
    def vanish(self) -> None:
        shutil.rmtree(Path(self.folder, "v1"), ignore_errors=True)

    @invariant()
    def nothing_failed(self) -> None:
        assert all(cache.counters().failed == 0 for cache in self.caches)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
