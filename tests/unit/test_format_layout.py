# SPDX-License-Identifier: Apache-2.0
"""Where arrays are placed in the content."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazymem.format import layout

MIB = 1 << 20
CHUNKS = [1 << 16, 1 << 18, 2 * MIB, 8 * MIB]


def placed(sizes: list[int], chunk_size: int) -> list[tuple[int, int]]:
    cursor, result = 0, []
    for nbytes in sizes:
        offset = layout.place(cursor, nbytes, chunk_size)
        result.append((offset, nbytes))
        cursor = offset + nbytes
    return result


def test_place_small_arrays_share_a_chunk_at_cache_lines() -> None:
    assert placed([10, 100, 4095], 1 << 16) == [(0, 10), (64, 100), (192, 4095)]


def test_place_medium_array_starts_on_a_page() -> None:
    assert placed([10, 4096], 1 << 16) == [(0, 10), (4096, 4096)]


def test_place_array_of_a_chunk_starts_on_a_chunk() -> None:
    assert placed([10, 1 << 16], 1 << 16) == [(0, 10), (1 << 16, 1 << 16)]


def test_place_big_array_starts_on_a_huge_page() -> None:
    assert placed([10, 2 * MIB], 1 << 16) == [(0, 10), (2 * MIB, 2 * MIB)]


def test_place_small_array_does_not_straddle_chunks() -> None:
    chunk = 1 << 16
    assert layout.place(chunk - 64, 100, chunk) == chunk
    assert layout.place(chunk - 128, 100, chunk) == chunk - 128


def test_place_keeps_the_phase_that_is_asked_for() -> None:
    chunk = 1 << 16
    assert layout.place(0, chunk, chunk, 8) == 8
    assert layout.place(chunk + 8, chunk, chunk, 8) == chunk + 8  # right behind the one before
    assert layout.place(chunk + 9, chunk, chunk, 8) == 2 * chunk + 8
    assert layout.place(10, 100, chunk, 8) == 64 + 8
    assert layout.place(4, 100, chunk, 8) == 8
    assert layout.place(chunk - 60, 100, chunk, 8) == chunk + 8
    assert layout.place(5000, 5000, chunk, 40) == 2 * 4096 + 40


def test_place_empty_array_takes_no_room() -> None:
    assert layout.place(123, 0, 1 << 16) == 123


@given(st.lists(st.integers(0, 5 * MIB) | st.integers(0, 9000), max_size=40), st.sampled_from(CHUNKS))
def test_placement_keeps_its_promises(sizes: list[int], chunk_size: int) -> None:
    result = placed(sizes, chunk_size)
    end = 0
    big_chunks: set[int] = set()
    for offset, nbytes in result:
        assert offset >= end
        end = offset + nbytes
        if not nbytes:
            continue
        assert offset % layout.SMALL_ALIGNMENT == 0
        first, last = offset // chunk_size, (end - 1) // chunk_size
        if nbytes >= layout.PAGE:
            assert offset % layout.PAGE == 0
        if nbytes >= layout.HUGE_PAGE:
            assert offset % layout.HUGE_PAGE == 0
        if nbytes <= chunk_size // 8:
            assert first == last
        if nbytes >= chunk_size:
            assert offset % chunk_size == 0
            chunks = set(range(first, last + 1))
            assert not chunks & big_chunks
            big_chunks |= chunks
