# SPDX-License-Identifier: Apache-2.0
"""Writer and reader together: bytes, codecs, zero runs, digests, damage."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lazymem.errors import BuildError, ChunkCorrupt, FormatError, UnsupportedDtype
from lazymem.format import structs
from lazymem.format.index import content_digest
from lazymem.format.reader import SnapshotReader
from lazymem.format.writer import SnapshotWriter
from lazymem.options import BuildOptions

from .format_tools import MemoryBlob, parse, tail_fields, write_snapshot

CHUNK = 1 << 16
RNG = np.random.default_rng(7)
WEIGHTS = (RNG.standard_normal(100_000) * 0.02).astype(np.float32)


def writer(**options: Any) -> SnapshotWriter:
    return SnapshotWriter(io.BytesIO(), BuildOptions(chunk_size=CHUNK, threads=2, **options))


def contents(data: bytes) -> dict[str, bytes]:
    reader = SnapshotReader(MemoryBlob(data))
    index = reader.index
    return {name: b"".join(reader.read_range(*index.range_of(row))) for name, row in index.rows.items()}


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("planes", [None, True, False])
def test_written_arrays_read_back(codec: str, planes: bool | None) -> None:
    arrays = {
        "f4": WEIGHTS,
        "bf16": WEIGHTS.astype(ml_dtypes.bfloat16),
        "c8": (WEIGHTS + 1j * WEIGHTS[::-1]).astype(np.complex64),
        "f8": WEIGHTS.astype(np.float64)[:77],
        "noise": RNG.integers(0, 256, 150_001, np.uint8),
        "zeros": np.zeros(300_000, np.uint8),
        "text": np.frombuffer(b"abcdefgh" * 20_000, np.uint8),
        "scalar": np.array(2.5),
        "empty": np.zeros((3, 0)),
    }
    data = write_snapshot(arrays, codec=codec, planes=planes)
    assert contents(data) == {name: array.tobytes() for name, array in arrays.items()}


def test_zero_chunks_have_no_records_and_no_bytes() -> None:
    data = write_snapshot({"zeros": np.zeros(40 * CHUNK, np.uint8)})
    index = parse(data)
    assert index.chunk_count == 40
    assert len(index.records) == 0
    assert index.runs.tolist() == [(0, 40, structs.ZERO_RUN)]


def test_skip_of_a_tebibyte_costs_no_bytes() -> None:
    file = io.BytesIO()
    size = 1 << 40
    with SnapshotWriter(file, BuildOptions(chunk_size=2 << 20, threads=1)) as out:
        out.add_array("huge", np.dtype(np.uint8), (size,))
        out.skip(size // 2 + 5)
        out.write(b"here")
        out.skip(size // 2 - 9)
        result = out.finish()
    assert result.chunks - result.zero_chunks == 1
    assert len(file.getvalue()) < 4096
    reader = SnapshotReader(MemoryBlob(file.getvalue()))
    assert b"".join(reader.read_range(size // 2 + 3, 8)) == b"\0\0here\0\0"
    assert [s.chunk for s in reader.segments(0, size)] == [None, (size // 2) // (2 << 20), None]


def test_incompressible_chunks_are_stored_raw() -> None:
    noise = RNG.integers(0, 256, 4 * CHUNK, np.uint8)
    index = parse(write_snapshot({"noise": noise}))
    assert index.records["codec"].tolist() == [structs.RAW] * 4
    assert index.records["stored_length"].tolist() == [CHUNK] * 4


def test_planes_are_chosen_where_they_pay() -> None:
    pays = parse(write_snapshot({"w": WEIGHTS.astype(np.float64) + 0.0}, codec="lz4"))
    assert set(pays.records["width"].tolist()) == {8}
    constant = np.tile(np.arange(4, dtype=np.float32), CHUNK)
    assert set(parse(write_snapshot({"w": constant})).records["width"].tolist()) == {0}
    forced = parse(write_snapshot({"w": constant}, planes=True))
    assert set(forced.records["width"].tolist()) == {4}
    integers = np.arange(100_000, dtype=np.int32)
    assert set(parse(write_snapshot({"w": integers}, planes=True)).records["width"].tolist()) == {0}


@pytest.mark.parametrize(("dtype", "kind"), [("f4", 2), (ml_dtypes.bfloat16, 2), ("f2", 2), ("f8", 1)])
@pytest.mark.parametrize("chunk_size", [CHUNK, 1 << 21])
def test_float_planes_are_chosen_for_weights(dtype: Any, kind: int, chunk_size: int) -> None:
    weights = (RNG.standard_normal(1 << 20) * 0.02).astype(dtype)
    data = write_snapshot({"w": weights}, chunk_size=chunk_size)
    index = parse(data)
    assert set(index.records["filter"].tolist()) == {kind}
    assert set(index.records["codec"].tolist()) == {structs.ZSTD}
    assert b"".join(SnapshotReader(MemoryBlob(data)).read_range(0, weights.nbytes)) == weights.tobytes()
    assert index.summary().filters == {f"{structs.FILTER_NAMES[kind]}{weights.itemsize}": len(index.records)}


@pytest.mark.parametrize("level", [-5, 1, 19])
def test_a_level_that_is_asked_for_gives_the_smaller_of_the_ways(level: int) -> None:
    weights = (RNG.standard_normal(1 << 20) * 0.02).astype(ml_dtypes.bfloat16)
    stored = parse(write_snapshot({"w": weights}, level=level, chunk_size=1 << 21)).records["stored_length"]
    default = parse(write_snapshot({"w": weights}, chunk_size=1 << 21)).records["stored_length"]
    assert stored.sum() <= default.sum()


def test_float_planes_need_zstd_and_are_smaller_than_planes() -> None:
    weights = (RNG.standard_normal(1 << 20) * 0.02).astype(ml_dtypes.bfloat16)
    stored = parse(write_snapshot({"w": weights}, chunk_size=1 << 21)).records["stored_length"].sum()
    assert weights.nbytes / stored > 1.5
    lz4 = parse(write_snapshot({"w": weights}, codec="lz4", planes=True))
    assert structs.FILTER_FLOAT_PLANES not in lz4.records["filter"].tolist()
    plain = parse(write_snapshot({"w": weights}, planes=False))
    assert set(plain.records["filter"].tolist()) == {0}
    assert plain.records["stored_length"].sum() > stored


@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        ("f2", 2),
        ("f4", 4),
        ("f8", 8),
        ("c8", 4),
        ("c16", 8),
        (ml_dtypes.bfloat16, 2),
        (ml_dtypes.float8_e4m3fn, 0),
    ],
)
def test_plane_width_is_that_of_a_real_number(dtype: Any, width: int) -> None:
    array = np.tile(np.arange(16).astype(dtype), 40_000)
    assert set(parse(write_snapshot({"w": array}, planes=True)).records["width"].tolist()) == {width}


def test_codec_none_puts_chunks_on_pages_one_after_another() -> None:
    index = parse(write_snapshot({"w": WEIGHTS, "x": WEIGHTS}, codec="none"))
    offsets = index.records["offset"].tolist()
    assert offsets == [4096 + i * CHUNK for i in range(len(offsets))]


def test_digest_depends_on_content_only() -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {"w": WEIGHTS, "z": np.zeros(200_000, np.uint8)}
    digests = {
        tail_fields(write_snapshot(arrays, codec=codec, planes=planes))["digest"]
        for codec in ("none", "lz4", "zstd")
        for planes in (True, False)
    }
    assert len(digests) == 1
    changed = WEIGHTS.copy()
    changed[-1] += 1
    assert tail_fields(write_snapshot({"w": changed, "z": arrays["z"]}))["digest"] not in digests
    assert tail_fields(write_snapshot({"v": WEIGHTS, "z": arrays["z"]}))["digest"] not in digests


def test_digest_is_what_the_specification_says() -> None:
    data = write_snapshot({"w": WEIGHTS, "z": np.zeros(3 * CHUNK + 11, np.uint8)})
    reader = SnapshotReader(MemoryBlob(data))
    index = reader.index
    expected = hashlib.sha256(b"lazymem content 1\n")
    expected.update(CHUNK.to_bytes(8, "little") + index.content_size.to_bytes(8, "little"))
    for chunk in range(index.chunk_count):
        expected.update(hashlib.sha256(reader.read_chunk(chunk)).digest())
    for name in ("ARRS", "NAME", "SHAP", "DTYP", "META", "CONT", "EXTN", "VIEW"):
        raw = index.sections.get(name, b"")
        expected.update(len(raw).to_bytes(8, "little") + raw)
    assert index.digest == expected.digest()
    digests = reader.chunk_digests()
    assert digests is not None
    assert content_digest(CHUNK, index.content_size, index.runs, digests, index.sections) == index.digest


def test_read_chunk_of_damaged_bytes_names_file_chunk_and_array() -> None:
    data = bytearray(write_snapshot({"pad": np.arange(5), "w": WEIGHTS}))
    index = parse(bytes(data))
    chunk = index.chunk_count - 1
    record = index.record_of(chunk)
    assert record is not None
    data[int(index.records["offset"][record]) + 3] ^= 1
    reader = SnapshotReader(MemoryBlob(bytes(data)))
    with pytest.raises(ChunkCorrupt, match=rf"memory\.lzm: chunk {chunk} .*'w'") as caught:
        reader.read_chunk(chunk)
    assert (caught.value.chunk, caught.value.array, caught.value.url) == (chunk, "w", "memory.lzm")
    assert reader.read_chunk(chunk - 1)


def test_chunk_arrays_names_all_that_share_it() -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "a": np.arange(10),
        "none": np.zeros(0),
        "b": np.arange(10),
        "big": WEIGHTS,
    }
    reader = SnapshotReader(MemoryBlob(write_snapshot(arrays)))
    assert reader.chunk_arrays(0) == ["a", "b"]
    assert reader.chunk_arrays(1) == ["big"]


def test_read_range_refuses_what_is_outside() -> None:
    reader = SnapshotReader(MemoryBlob(write_snapshot({"a": np.arange(10)})))
    for offset, length in ((-1, 2), (0, 81), (81, 0), (0, -1)):
        with pytest.raises(ValueError, match="outside"):
            list(reader.read_range(offset, length))


def test_damaged_digest_section_is_found_when_it_is_read() -> None:
    data = bytearray(write_snapshot({"w": WEIGHTS}))
    data[parse(bytes(data)).cold["CDIG"].offset] ^= 1
    reader = SnapshotReader(MemoryBlob(bytes(data)))
    with pytest.raises(FormatError, match="CDIG"):
        reader.chunk_digests()


def test_stream_of_unknown_length_becomes_one_array() -> None:
    file = io.BytesIO()
    with SnapshotWriter(file, BuildOptions(chunk_size=CHUNK, threads=1)) as out:
        out.add_stream("data")
        for _ in range(5):
            out.write(b"x" * 50_000)
        out.finish()
    index = parse(file.getvalue())
    assert index.shape_of(0) == (250_000,)
    assert contents(file.getvalue()) == {"data": b"x" * 250_000}


def test_writer_in_small_pieces_makes_the_same_file() -> None:
    whole, pieces = io.BytesIO(), io.BytesIO()
    raw = WEIGHTS.tobytes()
    for file, step in ((whole, len(raw)), (pieces, 7_001)):
        with SnapshotWriter(file, BuildOptions(chunk_size=CHUNK, threads=2)) as out:
            out.add_array("w", WEIGHTS.dtype, WEIGHTS.shape)
            for begin in range(0, len(raw), step):
                out.write(raw[begin : begin + step])
            out.finish()
    assert whole.getvalue() == pieces.getvalue()


def test_writer_copes_with_short_writes() -> None:
    class Short(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            part = bytes(data[:999])
            self.data += part
            return len(part)

    file: Any = Short()
    with SnapshotWriter(file, BuildOptions(chunk_size=CHUNK, threads=1)) as out:
        out.add_array("w", WEIGHTS.dtype, WEIGHTS.shape)
        out.write(WEIGHTS.tobytes())
        out.finish()
    assert contents(bytes(file.data)) == {"w": WEIGHTS.tobytes()}


def test_writer_refuses_arrays_that_end_early_or_late() -> None:
    with writer() as out:
        out.add_array("x", np.dtype(np.uint8), (10,))
        out.write(b"123")
        with pytest.raises(BuildError, match="'x' ended 7 bytes early"):
            out.add_array("y", np.dtype(np.uint8), (1,))
        with pytest.raises(BuildError, match="early"):
            out.finish()
        with pytest.raises(BuildError, match="'x' got more"):
            out.write(b"12345678")


def test_writer_refuses_names_it_cannot_write() -> None:
    with writer() as out:
        out.add_array("x", np.dtype(np.uint8), (0,))
        with pytest.raises(BuildError, match="two arrays are called 'x'"):
            out.add_array("x", np.dtype(np.uint8), (0,))
        with pytest.raises(BuildError, match="surrogates"):
            out.add_array("\ud800", np.dtype(np.uint8), (0,))
        with pytest.raises(BuildError, match="65536 bytes"):
            out.add_array("n" * 65_536, np.dtype(np.uint8), (0,))
        with pytest.raises(UnsupportedDtype, match="'o'"):
            out.add_array("o", np.dtype(object), (0,))
        with pytest.raises(BuildError, match="2\\^46"):
            out.add_array("h", np.dtype(np.uint8), (2**46 + 1,))


def test_writer_refuses_metadata_that_is_not_json() -> None:
    for metadata in ({"x": object()}, {"x": float("nan")}, {"x": "\ud800"}):
        with writer() as out, pytest.raises(BuildError, match="JSON"):
            out.finish(metadata=metadata)


def test_empty_snapshot_opens() -> None:
    index = parse(write_snapshot({}))
    assert (index.chunk_count, index.names, dict(index.rows)) == (0, [], {})
