# SPDX-License-Identifier: Apache-2.0
"""Casts, and composed catalogs and regions: other dtypes and other orders of the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import lazymem
from lazymem import _native
from lazymem.catalog import DirectoryCatalog
from lazymem.composition import TARGETS, ComposedCatalog, Part, Recipe, as_recipe, float_dtype
from lazymem.containers.detect import open_container
from lazymem.opener import LocationOpener
from lazymem.options import StoreOptions

DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name) for name in _native.FLOATS
}
SMALL = [name for name in DTYPES if DTYPES[name].itemsize <= 2]


def cast(data: NDArray[Any], to: np.dtype[Any]) -> NDArray[Any]:
    out = np.zeros(data.size * to.itemsize + 1, np.uint8)
    code = _native.FLOATS[data.dtype.name] << 8 | _native.FLOATS[to.name]
    _native.cast(data.tobytes(), out, data.size, code)
    assert out[-1] == 0
    return out[:-1].view(to)


def is_same(got: NDArray[Any], wanted: NDArray[Any]) -> bool:
    """Equal bit for bit, but that one NaN is as good as another."""
    nan = np.isnan(wanted)
    bits = np.dtype(f"u{wanted.dtype.itemsize}")
    return bool(np.isnan(got[nan]).all() and (got.view(bits)[~nan] == wanted.view(bits)[~nan]).all())


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("source", SMALL)
def test_cast_of_every_small_number_is_that_of_numpy(source: str, to: str) -> None:
    dtype = DTYPES[source]
    every = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype)
    with np.errstate(all="ignore"):
        assert is_same(cast(every, DTYPES[to]), every.astype(DTYPES[to]))


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("source", ["float32", "float64"])
def test_cast_of_wide_numbers_is_that_of_numpy(source: str, to: str) -> None:
    bits = np.random.default_rng(3).integers(0, 1 << 63, 400_001, np.uint64) << np.uint64(1)
    data = bits.view(source)
    halves = np.arange(1 << 16, dtype=np.uint16)
    edges = [np.inf, -np.inf, np.nan, 0.0, -0.0, 65504, 65519.996, 65520, 2.0**-24, 2.0**-25, 2.0**-25 * 1.01]
    with np.errstate(all="ignore"):
        near = halves.view(np.float16).astype(source)
        data = np.concatenate([data, near, near * data.dtype.type(1 + 2**-11), np.array(edges, source)])
        wanted = data.astype(DTYPES[to])
        if source == "float64" and to in ("float16", "bfloat16"):
            wanted = data.astype(np.float32).astype(DTYPES[to])  # as torch does it; ml_dtypes, too
        assert is_same(cast(data, DTYPES[to]), wanted)


def test_cast_that_does_not_exist_is_refused() -> None:
    out = np.zeros(8, np.uint8)
    for code in (1, 0xFFFF, _native.FLOATS["float32"] << 8 | _native.FLOATS["float8_e5m2"]):
        with pytest.raises(_native.NativeError):
            _native.cast(b"12345678", out, 1, code)


@pytest.fixture(scope="module")
def weights() -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(9)
    arrays: dict[str, NDArray[Any]] = {
        "embed": (rng.standard_normal((500, 300)) * 0.02).astype(ml_dtypes.bfloat16),
        "half": rng.standard_normal(33_333).astype(np.float16),
        "ids": np.arange(70_001),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5, ml_dtypes.bfloat16),
        "complex": np.full(10, 1 + 2j, np.complex64),
        "zeros": np.zeros(400_000, ml_dtypes.bfloat16),
        "fortran": np.asfortranarray(rng.standard_normal((40, 50)).astype(np.float32)),
    }
    for i in range(40):
        arrays[f"bias.{i}"] = rng.standard_normal(50 + i).astype(ml_dtypes.float8_e4m3fn)
    return arrays


@pytest.mark.parametrize("codec", ["zstd", "lz4", "none"])
@pytest.mark.parametrize("backend", ["auto", "uffd-user", "sigsegv", "eager"])
@pytest.mark.parametrize("dtype", TARGETS)
def test_dtype_converts_floats_and_nothing_else(
    weights: dict[str, NDArray[Any]], tmp_path: Path, codec: str, backend: str, dtype: str
) -> None:
    lazymem.build(weights, tmp_path / "w.lzm", codec=codec, chunk_size=64 << 10)
    with lazymem.open(tmp_path / "w.lzm", dtype=dtype, backend=backend) as snap:
        assert list(snap) == list(weights)
        for name, array in weights.items():
            is_float = array.dtype.name in _native.FLOATS
            wanted = array.astype(TARGETS[dtype]) if is_float else array
            assert snap[name].dtype == wanted.dtype
            assert snap[name].tobytes() == wanted.tobytes()
            assert snap.read(name).tobytes() == wanted.tobytes()


def test_conversion_reads_what_is_touched(weights: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    lazymem.build(weights, tmp_path / "w.lzm", chunk_size=64 << 10)
    with lazymem.open(tmp_path / "w.lzm", dtype="float32", readahead=0) as snap:
        assert snap["embed"][0, 0] == np.float32(weights["embed"][0, 0])
        stats = snap.stats()
        assert (stats.chunks_populated, stats.requests) == (1, 1)
        assert snap.chunk_size == 2 * 64 << 10  # most bytes are bfloat16, which become twice as many


def test_each_chunk_of_the_stock_is_decoded_once(tmp_path: Path) -> None:
    """Though arrays of a safetensors file begin a few bytes after a chunk does, or anywhere at all."""
    from safetensors.numpy import save_file

    arrays = {f"w{i}": np.ones((96, 1024), ml_dtypes.bfloat16) * i for i in range(5)}  # three chunks each
    save_file(arrays, tmp_path / "w.safetensors")
    lazymem.build(tmp_path / "w.safetensors", tmp_path / "w.lzm", chunk_size=64 << 10)
    with lazymem.open(tmp_path / "w.lzm", dtype="float32", threads=1) as snap:
        assert snap.chunk_size == 128 << 10
        snap.prefetch(wait=True)
        stats = snap.stats()
        assert stats.requests <= stats.chunks_populated + len(arrays)
        assert all(np.array_equal(snap[name], array.astype(np.float32)) for name, array in arrays.items())
        assert all(snap[name].ctypes.data % 16 == 0 for name in arrays)


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_numbers_that_straddle_chunks_of_a_file_are_whole(
    weights: dict[str, NDArray[Any]], tmp_path: Path, shift: int
) -> None:
    """Tensors of a safetensors file may begin at any byte, so that no chunk boundary falls between two."""
    from safetensors.numpy import save

    data = save({name: array for name, array in weights.items() if name not in ("complex", "fortran")})
    length = int.from_bytes(data[:8], "little")
    path = tmp_path / "w.safetensors"
    header = data[8 : 8 + length] + b" " * shift
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with lazymem.open(path, dtype="float32", chunk_size=64 << 10) as snap:
        for name, array in weights.items():
            if name in snap:
                wanted = array.astype(np.float32) if array.dtype.name in _native.FLOATS else array
                assert snap[name].tobytes() == wanted.tobytes(), name


def test_nothing_to_convert_changes_nothing(tmp_path: Path) -> None:
    lazymem.build({"x": np.ones(100_000, np.float32)}, tmp_path / "x.lzm", codec="none")
    with lazymem.open(tmp_path / "x.lzm", dtype=np.float32) as snap:
        assert snap.backend == "map"


@pytest.mark.parametrize("dtype", ["int8", "float8_e5m2", "no such thing", np.complex64, object(), ">f4"])
def test_dtype_that_cannot_be_had_is_refused(tmp_path: Path, dtype: object) -> None:
    np.save(tmp_path / "x.npy", np.ones(3))
    with pytest.raises(lazymem.OptionError, match="float16, bfloat16, float32, float64"):
        lazymem.open(tmp_path / "x.npy", dtype=dtype)


def test_float_dtype_takes_names_and_types() -> None:
    for value in ("bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)):
        assert float_dtype(value) == ml_dtypes.bfloat16
    assert float_dtype(float) == np.float64


# ---- parts in any order ----


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_parts_in_any_order_are_what_numpy_concatenates(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    lengths = data.draw(st.lists(st.integers(1, 60_000), min_size=1, max_size=5))
    arrays = {f"a{i}": rng.standard_normal(n).astype(np.float32) for i, n in enumerate(lengths)}
    path = tmp_path_factory.mktemp("parts") / "p.lzm"
    lazymem.build(arrays, path, chunk_size=64 << 10, codec=data.draw(st.sampled_from(["zstd", "none"])))
    dtype = data.draw(st.sampled_from([np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)]))
    recipes, wanted = [], {}
    for number in range(data.draw(st.integers(1, 4))):
        parts, pieces = [], []
        for _ in range(data.draw(st.integers(1, 5))):
            name = data.draw(st.sampled_from(list(arrays)))
            first = data.draw(st.integers(0, arrays[name].size - 1))
            count = data.draw(st.integers(1, arrays[name].size - first))
            parts.append(Part(name, 4 * first, 4 * count))
            pieces.append(arrays[name][first : first + count])
        joined = np.concatenate(pieces)
        wanted[f"r{number}"] = joined.astype(dtype)
        recipes.append(Recipe(f"r{number}", np.dtype(np.float32), dtype, joined.shape, tuple(parts)))
    with lazymem.open(path) as stock, stock.compose(recipes, mode="c") as composed:
        for name, array in wanted.items():
            assert composed[name].tobytes() == array.tobytes()


def test_composed_snapshot_outlives_what_it_is_made_of(tmp_path: Path) -> None:
    array = np.arange(300_000, dtype=np.float32)
    lazymem.build({"x": array}, tmp_path / "x.lzm", chunk_size=64 << 10)
    with lazymem.open(tmp_path / "x.lzm") as stock:
        halves = (Part("x", 600_000, 600_000), Part("x", 0, 600_000))
        composed = stock.compose([Recipe("y", array.dtype, array.dtype, array.shape, halves)])
    assert stock.closed
    assert np.array_equal(composed["y"], np.concatenate([array[150_000:], array[:150_000]]))
    composed.close()


def test_tied_arrays_stay_one(tmp_path: Path) -> None:
    array = np.arange(100_000, dtype=np.float32)
    lazymem.build({"x": array, "z": array + 1}, tmp_path / "x.lzm")
    whole = (Part("x", 0, array.nbytes),)
    double = np.dtype(np.float64)
    recipes = [Recipe(name, array.dtype, double, array.shape, whole) for name in ("a", "b")]
    with lazymem.open(tmp_path / "x.lzm") as stock, stock.compose(recipes, mode="c") as composed:
        composed["a"][5] = 17
        assert composed["b"][5] == 17


def test_damaged_chunk_names_the_composed_array(tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 255, 300_000, np.uint8)
    lazymem.build({"x": array}, tmp_path / "x.lzm", chunk_size=64 << 10)
    raw = bytearray((tmp_path / "x.lzm").read_bytes())
    raw[100_000] ^= 1
    (tmp_path / "x.lzm").write_bytes(raw)
    with lazymem.open(tmp_path / "x.lzm") as stock:
        composed = stock.compose(
            [Recipe("y", array.dtype, array.dtype, array.shape, (Part("x", 0, 300_000),))]
        )
    with pytest.raises(lazymem.ChunkCorrupt) as caught:
        composed.prefetch(wait=True)
    assert (caught.value.chunk, caught.value.array) == (1, "y")
    composed.close()


def test_catalog_knows_arrays_by_place(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones(50_000, np.float32))
    directory = open_container(str(tmp_path / "x.npy"), LocationOpener(StoreOptions()))
    stock = DirectoryCatalog(directory, 64 << 10)
    catalog = ComposedCatalog(stock, [as_recipe(stock.info("data"), np.dtype(np.float64))])
    begin = catalog.info("data").offset
    assert catalog.name_at(begin, begin + 1) == "data"
    assert catalog.name_at(0, begin) is None
    assert catalog.name_at(begin + 400_000, begin + 500_000) is None
    assert catalog.tables().names == b"data"
    directory.close()
