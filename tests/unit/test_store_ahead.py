# SPDX-License-Identifier: Apache-2.0
"""Reading ahead: right bytes however they are asked for, few requests, bounded memory, no threads left."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymem.errors import ReadError
from lazymem.store import ahead
from lazymem.store.ahead import PIECES, AheadBlob

SIZE = 10_000
DATA = bytes(i * 7 % 251 for i in range(SIZE))


class Counting:
    """A blob that remembers what was read."""

    url, identity, size = "mem://x", "1", SIZE

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []
        self.fails_at = -1
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        with self._lock:
            self.reads.append((offset, length))
        if offset <= self.fails_at < offset + length:
            raise ReadError("mem://x: no", url=self.url)
        return DATA[offset : offset + length]

    def read_into(self, offset: int, out: memoryview) -> None:
        out[:] = self.read(offset, len(out))

    def has_changed(self) -> bool:
        return False

    def fileno(self) -> None:
        return None

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "PIECE", 100)


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lazymem-ahead")]


def test_ahead_joins_neighbours_and_cuts_them_into_pieces() -> None:
    blob = Counting()
    with AheadBlob(blob, [(0, 30), (30, 20), (50, 100), (400, 10), (420, 250)]) as source:
        for offset, length in [(0, 30), (30, 20), (50, 100), (400, 10), (420, 250)]:
            assert source.read(offset, length) == DATA[offset : offset + length]
    assert sorted(blob.reads) == [(0, 100), (100, 50), (400, 10), (420, 100), (520, 100), (620, 50)]


def test_ahead_asks_for_a_window_and_not_for_everything() -> None:
    blob = Counting()
    with AheadBlob(blob, [(0, SIZE)]) as source:
        for offset in range(0, SIZE, 50):
            source.read(offset, 50)
            assert len(blob.reads) <= offset // 100 + PIECES + 1
    assert sorted(blob.reads) == [(offset, 100) for offset in range(0, SIZE, 100)]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, 700)), max_size=12),
    st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, 700)), max_size=12),
)
def test_ahead_gives_the_right_bytes_whatever_was_announced(
    announced: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> None:
    announced = [(offset, min(length, SIZE - offset)) for offset, length in announced]
    with AheadBlob(Counting(), announced) as source:
        for offset, length in [*announced, *wanted]:
            assert source.read(offset, length) == DATA[offset : min(offset + length, SIZE)]


def test_ahead_what_was_announced_twice_is_read_twice() -> None:
    blob = Counting()
    with AheadBlob(blob, [(500, 50), (0, 50), (500, 50)]) as source:
        for offset in (500, 0, 500):
            assert source.read(offset, 50) == DATA[offset : offset + 50]
    assert sorted(blob.reads) == [(0, 50), (500, 50), (500, 50)]


def test_ahead_failure_reaches_the_read_that_needs_it() -> None:
    blob = Counting()
    blob.fails_at = 450
    with AheadBlob(blob, [(0, 1000)]) as source:
        assert source.read(0, 400) == DATA[:400]
        with pytest.raises(ReadError, match="no"):
            source.read(400, 1)


def test_ahead_abandoned_early_asks_for_no_more() -> None:
    blob = Counting()
    with AheadBlob(blob, [(0, SIZE)]) as source:
        source.read(0, 10)
    asked = len(blob.reads)
    assert asked <= PIECES + 1
    source.close()
    assert len(blob.reads) == asked
