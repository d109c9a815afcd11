# SPDX-License-Identifier: Apache-2.0
"""Random arrays through `build` and back, against the arrays themselves."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lazymem.builder import build
from lazymem.format.reader import SnapshotReader
from lazymem.store.local import LocalBlob
from lazymem.verifier import verify

Array = np.ndarray[Any, Any]

dtypes = st.one_of(
    hnp.scalar_dtypes(),
    hnp.unicode_string_dtypes(min_len=1),
    hnp.byte_string_dtypes(min_len=1),
    hnp.array_dtypes(min_size=1),
    st.sampled_from(
        [np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.int4)]
    ),
)


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Zeros, runs or noise, of any dtype, shape and memory order; some of several chunks."""
    dtype = draw(dtypes)
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))
    if draw(st.booleans()) and shape:
        shape = (draw(st.integers(0, 250_000 // max(dtype.itemsize, 1))), *(1 for _ in shape[1:]))
    count = int(np.prod(shape, dtype=np.int64))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    fill = draw(st.sampled_from(["zeros", "noise", "ramp", "gap"]))
    raw = np.zeros(count * dtype.itemsize, np.uint8)
    if fill == "noise":
        raw[:] = rng.integers(0, 256, len(raw), np.uint8)
    elif fill == "ramp":
        raw[:] = np.arange(len(raw)) // 3
    elif fill == "gap":
        raw[:5] = raw[-5:] = 7
    # Not bytes: those of length one are the interpreter's, so two arrays would be one and its view.
    array: Array = np.ndarray(shape, dtype, bytearray(raw) or bytearray(max(dtype.itemsize, 1)))
    view = draw(st.sampled_from(["C", "F", "step", "flip"]))
    if view == "F":
        return array.T
    if view == "step" and shape:
        return array[::2]
    if view == "flip" and shape:
        return array[..., ::-1]
    return array


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), arrays(), max_size=6),
    st.sampled_from([("none", None), ("lz4", None), ("lz4", 4), ("zstd", None), ("zstd", -3), ("zstd", 6)]),
    st.sampled_from([1 << 16, 1 << 17, 1 << 21]),
    st.sampled_from([None, True, False]),
    st.integers(1, 3),
)
def test_built_arrays_come_back(
    source: dict[str, Array],
    codec: tuple[str, int | None],
    chunk_size: int,
    planes: bool | None,
    threads: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.lzm"
        report = build(
            source,
            path,
            codec=codec[0],
            level=codec[1],
            chunk_size=chunk_size,
            planes=planes,
            threads=threads,
        )
        assert verify(path, threads=1).ok
        with LocalBlob(path) as blob:
            reader = SnapshotReader(blob)
            index = reader.index
            assert list(index.rows) == list(source)
            for name, expected in source.items():
                row = index.rows[name]
                raw = b"".join(reader.read_range(*index.range_of(row)))
                assert index.shape_of(row) == expected.shape
                assert index.dtype_of(row) == expected.dtype
                assert raw == expected.tobytes("F" if index.order_of(row) == "F" else "C")
            assert report.digest == index.digest.hex()
            assert report.chunks == index.chunk_count
            # What belongs to no array is zeros.
            content = np.frombuffer(b"".join(reader.read_range(0, index.content_size)), np.uint8).copy()
            for row in range(len(index.names)):
                offset, nbytes = index.range_of(row)
                content[offset : offset + nbytes] = 0
            assert not content.any()
