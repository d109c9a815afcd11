# SPDX-License-Identifier: Apache-2.0
"""Where the bytes of arrays, tensors and buffers lie."""

from __future__ import annotations

import array
import ctypes
import mmap
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazymem.extents import extents_of

PIECE = 64 << 10
BASE = np.zeros(64 * PIECE, np.uint8)
START = BASE.ctypes.data


def places(what: Any) -> list[tuple[int, int]]:
    extents = extents_of(what)
    assert extents is not None
    return [(begin - START, end - START) for begin, end in extents]


def test_contiguous_array_is_one_extent() -> None:
    assert places(BASE[5:100]) == [(5, 100)]
    assert places(BASE.view(np.float32)[3:4]) == [(12, 16)]
    assert places(BASE[:1024].view(np.float64).reshape(8, 16, order="F")) == [(0, 1024)]


def test_small_gaps_are_not_worth_an_extent_and_large_ones_are() -> None:
    rows = BASE.reshape(16, 4 * PIECE)
    assert places(rows[:, : 3 * PIECE + 1]) == [(0, 63 * PIECE + 1)]
    assert places(rows[2:4, 7:9]) == [
        (2 * 4 * PIECE + 7, 2 * 4 * PIECE + 9),
        (3 * 4 * PIECE + 7, 3 * 4 * PIECE + 9),
    ]


def test_negative_and_repeating_strides() -> None:
    assert places(BASE[100:50:-1]) == [(51, 101)]
    assert places(np.broadcast_to(BASE[7:8], (5, 1000))) == [(7, 8)]
    assert places(BASE.reshape(2, 32 * PIECE)[::-1, 3:5]) == [(3, 5), (32 * PIECE + 3, 32 * PIECE + 5)]


STEPS = [slice(None), slice(1, 3), slice(None, None, -1), slice(3, 0, -2), slice(2, 2)]
ROW = [slice(7, 8), slice(5, 300), slice(None, None, 4096), slice(None, None, -5000), slice(9, 5, -1)]


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_extents_hold_every_element_and_begin_and_end_with_one(data: st.DataObject) -> None:
    steps = tuple(data.draw(st.sampled_from(STEPS)) for _ in range(3))
    shown = BASE.reshape(4, 4, 4, PIECE)[(*steps, data.draw(st.sampled_from(ROW)))]
    shown = shown.transpose(data.draw(st.permutations(range(4))))
    found = places(shown)
    if not shown.size:
        assert found == []
        return
    offsets = np.zeros((1,), np.int64)
    for length, stride in zip(shown.shape, shown.strides, strict=True):
        offsets = np.add.outer(offsets, np.arange(length) * stride).ravel()
    offsets += shown.__array_interface__["data"][0] - START
    starts, ends = np.array(found).T
    assert np.all(starts[1:] > ends[:-1])
    inside = np.searchsorted(starts, offsets, side="right") - 1
    assert np.all((offsets >= starts[inside]) & (offsets < ends[inside]))
    assert set(starts) | set(ends - 1) <= set(offsets.tolist())


def test_buffers_of_all_kinds_have_extents() -> None:
    assert places(memoryview(BASE)[3:9]) == [(3, 9)]
    assert places(memoryview(BASE)[3:9:2]) == [(3, 8)]
    assert places((ctypes.c_char * 10).from_buffer(BASE.data, 20)) == [(20, 30)]
    for buffer in (b"abc", bytearray(b"abc"), array.array("d", [1.0]), mmap.mmap(-1, 4096)):
        (extent,) = extents_of(buffer) or []
        assert extent[1] - extent[0] == memoryview(buffer).nbytes
    assert extents_of(b"") == []
    assert extents_of(np.zeros((0, 5))) == []
    assert extents_of(np.array(2.5)) is not None


def test_tensors_have_extents_and_wrappers_have_none() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(BASE.view(np.float32)).view(torch.bfloat16)
    assert places(tensor[4:8]) == [(8, 16)]
    assert places(torch.nn.Parameter(tensor[4:8])) == [(8, 16)]
    assert places(tensor.view(16, -1)[:, 0]) == [(i * 4 * PIECE, i * 4 * PIECE + 2) for i in range(16)]
    assert extents_of(torch.empty(3, device="meta")) == []
    assert extents_of(torch.eye(3).to_sparse()) == []


@pytest.mark.parametrize("what", [3, "text", None, object(), [b"bytes"]])
def test_what_has_no_memory_has_no_extents(what: object) -> None:
    assert extents_of(what) is None
