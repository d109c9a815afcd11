# SPDX-License-Identifier: Apache-2.0
"""Float planes against the words of FORMAT.md, and the frames that hold them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import zstandard

from lazymem import _native
from lazymem._native import literals


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("length", [0, 1, 7, 64, 1000, 4099])
def test_float_planes_are_those_of_the_specification(width: int, length: int) -> None:
    data = np.random.default_rng(length).integers(0, 256, length, np.uint8)
    count = length // width
    elements = data[: count * width].view(f"<u{width}")
    one, rest = elements.dtype.type(1), elements.dtype.type(8 * width - 1)
    turned = (elements << one) | (elements >> rest)
    expected = turned.view(np.uint8).reshape(count, width).T.tobytes() + data[count * width :].tobytes()
    planes, back = bytearray(length), bytearray(length)
    _native.planes_split(data, planes, width, _native.FILTER_FLOAT_PLANES)
    assert planes == expected
    _native.planes_join(planes, back, width, _native.FILTER_FLOAT_PLANES)
    assert back == data.tobytes()


def test_float_planes_end_with_the_exponents() -> None:
    numbers = np.array([1.0, -1.0, 0.5, 3.0, np.inf], np.float32)
    planes = bytearray(numbers.nbytes)
    _native.planes_split(numbers, planes, 4, _native.FILTER_FLOAT_PLANES)
    assert list(planes[-5:]) == [127, 127, 126, 128, 255]
    assert [byte & 1 for byte in planes[:5]] == [0, 1, 0, 0, 0]  # the signs


@pytest.mark.parametrize("make", [_native.literal_compressor, literals.by_parameters])
def test_literal_frames_are_zstd_and_hold_what_went_in(make: Callable[[], literals.Compress]) -> None:
    compress = make()
    rng = np.random.default_rng(5)
    for length in (0, 1, 100, 70_000, 1_000_000):
        data = np.minimum(rng.exponential(3, length), 255).astype(np.uint8).tobytes()
        frame = compress(memoryview(data), length // 2)
        assert zstandard.ZstdDecompressor().decompress(frame, max_output_size=length) == data
        assert length < 1000 or len(frame) < 0.5 * length
    noise = rng.integers(0, 256, 1_000_000, np.uint8)
    assert len(compress(noise, 500_000)) < 1_000_200


@pytest.mark.parametrize("make", [_native.literal_compressor, literals.by_parameters])
@pytest.mark.parametrize("length", [1 << 13, 1 << 16, 1 << 20])
def test_literal_frames_keep_planes_apart(make: Callable[[], literals.Compress], length: int) -> None:
    rng = np.random.default_rng(6)
    noise, narrow = rng.integers(0, 256, length, np.uint8), rng.integers(0, 4, length).astype(np.uint8)
    frame = make()(np.concatenate([noise, narrow]), length)
    assert len(frame) < length + length // 4 + length // 30
