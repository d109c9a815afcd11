# SPDX-License-Identifier: Apache-2.0
"""What a user of numpy expects of an open snapshot."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import lazymem
from lazymem.errors import (
    AccessDenied,
    ArrayNotFound,
    BackendUnavailable,
    FormatError,
    OptionError,
    SnapshotClosed,
    SnapshotNotFound,
    UnsupportedFormat,
)

from ..children import check_child, run_child
from ..faults.network import wait_until

Arrays = dict[str, NDArray[np.generic]]
BACKENDS = ["uffd", "uffd-user", "sigsegv", "eager", "auto"]


@pytest.mark.parametrize("mode", ["r", "c"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_every_backend_shows_the_same_bytes(
    tmp_path: Path, arrays: Arrays, codec: str, backend: str, mode: str
) -> None:
    path = tmp_path / "a.lzm"
    lazymem.build(arrays, path, codec=codec)
    with lazymem.open(path, backend=backend, mode=mode) as snap:
        assert list(snap) == list(arrays)
        for name, expected in arrays.items():
            shown = snap[name]
            assert (shown.dtype, shown.shape) == (expected.dtype, expected.shape)
            assert shown.flags.f_contiguous == expected.flags.f_contiguous
            assert shown.tobytes() == expected.tobytes(), name
            assert shown.flags.writeable == (mode == "c")
            del shown


@pytest.mark.needs_lazy
def test_opening_and_looking_reads_nothing(snapshot_path: Path) -> None:
    with lazymem.open(snapshot_path) as snap:
        for name in snap:
            info = snap.info(name)
            assert snap[name].shape == info.shape
        assert snap.stats() == lazymem.Stats(*[0] * 13, latency=(0,) * 32, last_fault=(0, 0, 0))


@pytest.mark.needs_lazy
def test_touching_an_array_populates_exactly_its_chunks(snapshot_path: Path) -> None:
    with lazymem.open(snapshot_path) as snap:
        name = "layer.4.weight"
        info = snap.info(name)
        first = info.offset // snap.chunk_size
        last = (info.offset + info.nbytes - 1) // snap.chunk_size
        before = snap.chunk_states()
        float(snap[name].sum())
        after = snap.chunk_states()
        changed = [i for i in range(snap.chunk_count) if before[i] != after[i]]
        assert changed == list(range(first, last + 1))
        assert snap.stats().chunks_populated == last - first + 1


@pytest.mark.needs_lazy
def test_touching_one_element_populates_one_chunk(snapshot_path: Path) -> None:
    with lazymem.open(snapshot_path) as snap:
        float(snap["layer.4.weight"][300, 5])
        stats = snap.stats()
        assert (stats.chunks_populated, stats.requests) == (1, 1)
        assert stats.bytes_populated == snap.chunk_size
        assert sum(stats.latency) == 1
        assert 0 < stats.latency_percentile(50) < 60


def test_a_thousand_small_arrays_share_chunks_and_one_mapping(tmp_path: Path) -> None:
    path = tmp_path / "many.lzm"
    many = {f"a{i}": np.full(10, i, np.int32) for i in range(1000)}
    lazymem.build(many, path)
    before = Path("/proc/self/maps").read_text().count("\n")
    with lazymem.open(path) as snap:
        shown = [snap[name] for name in many]
        assert all((array == i).all() for i, array in enumerate(shown))
        assert snap.stats().chunks_populated == 1
        # The region, its tables, and what the engine's threads need; not one for each array.
        assert Path("/proc/self/maps").read_text().count("\n") - before < 60
        del shown


def test_mode_r_refuses_writing(snapshot_path: Path) -> None:
    with lazymem.open(snapshot_path) as snap:
        with pytest.raises(ValueError, match="read-only"):
            snap["ids"][0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            snap["ids"].flags.writeable = True
        assert snap.buffer.readonly


def test_mode_c_keeps_writes_private(snapshot_path: Path, arrays: Arrays) -> None:
    before = snapshot_path.read_bytes()
    with lazymem.open(snapshot_path, mode="c") as snap, lazymem.open(snapshot_path) as other:
        snap["ids"][::1000] = -1
        snap["zeros"][5] = 9
        expected = arrays["ids"].copy()
        expected[::1000] = -1
        assert np.array_equal(snap["ids"], expected)
        assert snap["zeros"][5] == 9
        assert int(snap["zeros"].sum()) == 9
        assert np.array_equal(other["ids"], arrays["ids"])
    assert snapshot_path.read_bytes() == before


@pytest.mark.needs_lazy
def test_asarray_without_copy_is_the_same_memory(snapshot_path: Path) -> None:
    with lazymem.open(snapshot_path) as snap:
        array = snap["ids"]
        assert np.asarray(array, copy=False).ctypes.data == array.ctypes.data
        assert snap["ids"].ctypes.data == array.ctypes.data
        assert snap.stats().chunks_populated == 0
        del array


def test_buffer_is_the_whole_region(snapshot_path: Path, arrays: Arrays) -> None:
    with lazymem.open(snapshot_path) as snap:
        buffer = snap.buffer
        info = snap.info("ids")
        assert len(buffer) == snap.nbytes
        assert bytes(buffer[info.offset : info.offset + info.nbytes]) == arrays["ids"].tobytes()
        del buffer


def test_read_gives_a_writable_copy(snapshot_path: Path, arrays: Arrays) -> None:
    with lazymem.open(snapshot_path) as snap:
        for name in ("fortran", "ids", "empty", "scalar"):
            copy = snap.read(name)
            assert copy.flags.writeable
            assert copy.flags.f_contiguous == arrays[name].flags.f_contiguous
            assert np.array_equal(copy, arrays[name])
    assert np.array_equal(copy, arrays["scalar"])  # outlives the snapshot


def test_prefetch_populates_without_faults(snapshot_path: Path, arrays: Arrays) -> None:
    with lazymem.open(snapshot_path) as snap:
        snap.prefetch(["ids", "layer.1.weight"], wait=True)
        populated = snap.stats().chunks_populated
        assert np.array_equal(snap["ids"], arrays["ids"])
        stats = snap.stats()
        assert (stats.faults, stats.chunks_populated) == (0, populated)
        snap.prefetch(wait=True)
        assert set(snap.chunk_states()) == {2}
        snap.prefetch([], wait=True)


def test_open_array_keeps_its_region(snapshot_path: Path, tmp_path: Path, arrays: Arrays) -> None:
    array = lazymem.open_array(snapshot_path, "ids")
    assert np.array_equal(array, arrays["ids"])
    np.save(tmp_path / "one.npy", arrays["ids"])
    assert np.array_equal(lazymem.open_array(tmp_path / "one.npy"), arrays["ids"])
    with pytest.raises(OptionError, match="say which"):
        lazymem.open_array(snapshot_path)


# ---- other formats, in place ----


@pytest.mark.parametrize("backend", ["auto", "map", "uffd"])
def test_containers_open_in_place(tmp_path: Path, backend: str) -> None:
    from safetensors.numpy import save_file

    data = np.random.default_rng(1).standard_normal((700, 900)).astype(np.float32)
    np.save(tmp_path / "a.npy", np.asfortranarray(data))
    np.savez(tmp_path / "b.npz", x=data, y=np.arange(5))
    save_file({"x": data, "y": np.arange(5)}, tmp_path / "c.safetensors", metadata={"k": "v"})
    (tmp_path / "d.bin").write_bytes(data.tobytes()[:-3])
    with lazymem.open(tmp_path / "a.npy", backend=backend) as snap:
        assert np.array_equal(snap["data"], data)
        assert snap["data"].flags.f_contiguous
        assert snap.format == "npy"
    for name in ("b.npz", "c.safetensors"):
        with lazymem.open(tmp_path / name, backend=backend, chunk_size=1 << 16) as snap:
            assert sorted(snap) == ["x", "y"]
            assert np.array_equal(snap["x"], data)
            assert np.array_equal(snap["y"], np.arange(5))
            assert snap.backend == ("map" if backend == "auto" else backend)
    with lazymem.open(tmp_path / "c.safetensors") as snap:
        assert dict(snap.metadata) == {"k": "v"}
    with lazymem.open(tmp_path / "d.bin", backend=backend) as snap:
        assert snap["data"].tobytes() == data.tobytes()[:-3]


@pytest.mark.parametrize("backend", ["map", "uffd"])
def test_sharded_safetensors_open_in_place(tmp_path: Path, backend: str) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(2)
    parts = [{f"w{i}.{j}": rng.standard_normal((50, 333)) for j in range(3)} for i in range(3)]
    for i, part in enumerate(parts):
        save_file(part, tmp_path / f"model-{i}.safetensors")
    with lazymem.open(tmp_path, backend=backend, chunk_size=1 << 16) as snap:
        for part in parts:
            for name, expected in part.items():
                assert np.array_equal(snap[name], expected)


def test_compressed_npz_says_what_to_do(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(1000))
    with pytest.raises(UnsupportedFormat, match="lazymem build"):
        lazymem.open(tmp_path / "a.npz")
    lazymem.build(tmp_path / "a.npz", tmp_path / "a.lzm")
    with lazymem.open(tmp_path / "a.lzm") as snap:
        assert np.array_equal(snap["x"], np.zeros(1000))


@pytest.mark.needs_mapping
def test_uncompressed_file_shares_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.ones(4_000_000, np.uint8))
    with lazymem.open(path) as snap:
        int(snap["data"].sum())
        smaps = Path("/proc/self/smaps").read_text()
        entry = smaps[smaps.index(str(path)) :].split("VmFlags")[0]
        fields = dict(line.split(":", 1) for line in entry.splitlines()[1:] if ":" in line)
        assert fields["Anonymous"].split() == ["0", "kB"]
        assert int(fields["Rss"].split()[0]) > 3000


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    dtypes = [np.dtype(code) for code in "?bBhHiIlLqQefdgFDGSUVMm" if np.dtype(code).itemsize]
    dtypes += [np.dtype(x) for x in ("S7", "U3", "V5", "M8[ns]", "m8[s]", ">f4", ">i8")]
    dtypes += [np.dtype([("x", "<f4"), ("y", "<i2", (3,))])]
    names = [n for n in dir(ml_dtypes) if n.startswith(("bfloat", "float", "int", "uint"))]
    dtypes += [np.dtype(getattr(ml_dtypes, n)) for n in names if isinstance(getattr(ml_dtypes, n), type)]
    rng = np.random.default_rng(3)
    made = {}
    for i, dtype in enumerate(dtypes):
        raw = rng.integers(0, 2, 24 * dtype.itemsize, dtype=np.uint8)
        made[f"{i} {dtype}"] = raw.view(dtype).reshape(2, 3, 4)
    made["64 dimensions"] = np.arange(2.0).reshape((1,) * 63 + (2,))
    made["имя 名前 🎉"] = np.arange(3)
    lazymem.build(made, tmp_path / "a.lzm")
    with lazymem.open(tmp_path / "a.lzm") as snap:
        assert len(snap) == len(made) > 40
        for name, expected in made.items():
            assert snap[name].dtype == expected.dtype
            assert snap[name].shape == expected.shape
            assert snap[name].tobytes() == expected.tobytes()


# ---- errors ----


def test_missing_array_is_named_with_a_hint(snapshot_path: Path) -> None:
    with lazymem.open(snapshot_path) as snap:
        with pytest.raises(
            ArrayNotFound, match=r"no array 'layer\.1\.wieght'; did you mean 'layer\.1\.weight'"
        ):
            snap["layer.1.wieght"]
        with pytest.raises(KeyError):
            snap["nothing like it"]
        assert snap.get("nothing") is None
        assert "ids" in snap


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mode": "w"}, OptionError),
        ({"backend": "magic"}, OptionError),
        ({"install": "push"}, OptionError),
        ({"threads": 0}, OptionError),
        ({"threads": "2"}, OptionError),
        ({"chunk_size": "2M"}, OptionError),
        ({"readahead": 1.5}, OptionError),
        ({"readahead": -1}, OptionError),
        ({"backend": "map"}, BackendUnavailable),
    ],
)
def test_impossible_options_are_refused(snapshot_path: Path, options: dict[str, object], error: type) -> None:
    with pytest.raises(error):
        lazymem.open(snapshot_path, **options)  # type: ignore[arg-type]


def test_environment_chooses_the_backend(snapshot_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYMEM_BACKEND", "eager")
    with lazymem.open(snapshot_path) as snap:
        assert snap.backend == "eager"
    for name in ("BACKEND", "INSTALL", "THREADS"):
        monkeypatch.setenv(f"LAZYMEM_{name}", "")
    lazymem.open(snapshot_path).close()
    for name in ("BACKEND", "INSTALL", "THREADS"):
        monkeypatch.setenv(f"LAZYMEM_{name}", "many")
        with pytest.raises(OptionError, match=f"^LAZYMEM_{name} is 'many'"):
            lazymem.open(snapshot_path)
        monkeypatch.delenv(f"LAZYMEM_{name}")


def test_names_are_strings(snapshot_path: Path) -> None:
    with lazymem.open(snapshot_path) as snap:
        for wrong in (0, slice(3), ["ids"], None, b"ids"):
            with pytest.raises(ArrayNotFound, match="found by name, a string"):
                snap[wrong]  # type: ignore[index]
        assert snap.get(0) is None  # type: ignore[call-overload]
        assert 0 not in snap  # type: ignore[comparison-overlap]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SnapshotNotFound, match=r"none\.lzm"):
        lazymem.open(tmp_path / "none.lzm")
    assert issubclass(SnapshotNotFound, FileNotFoundError)
    assert issubclass(AccessDenied, PermissionError)


def test_unfinished_snapshot_is_refused(snapshot_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.lzm"
    shutil.copy(snapshot_path, path)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(FormatError, match="cut short"):
        lazymem.open(path)


def test_use_after_close_is_refused(snapshot_path: Path) -> None:
    snap = lazymem.open(snapshot_path)
    snap.close()
    snap.close()
    assert snap.closed
    for use in (lambda: snap["ids"], lambda: snap.buffer, lambda: snap.prefetch(), lambda: snap.stats()):
        with pytest.raises(SnapshotClosed):
            use()
    assert "closed" in repr(snap)


def test_mode_r_memory_cannot_be_written_through_a_pointer(snapshot_path: Path) -> None:
    code = """
    import ctypes, sys, lazymem
    snap = lazymem.open(sys.argv[1], backend=sys.argv[2])
    array = snap["ids"]
    print(int(array[7]), flush=True)
    ctypes.memset(array.ctypes.data, 0, 8)
    print("written")
    """
    for backend in ("uffd", "sigsegv", "eager"):
        done = run_child(code, snapshot_path, backend)
        assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "7\n")


@pytest.mark.needs_lazy
def test_touch_goes_before_a_long_prefetch(long_path: Path) -> None:
    """Its chunk is the last of the queue; were it to wait its turn, everything would be there before it."""
    with lazymem.open(long_path) as snap:
        snap.prefetch()
        assert snap["big"][-1] == 7.0
        assert snap.stats().chunks_prefetch < snap.chunk_count - 2
        snap.prefetch(wait=True)
        assert snap.stats().chunks_populated == snap.chunk_count


@pytest.mark.needs_lazy
def test_readahead_stays_within_the_array(snapshot_path: Path) -> None:
    with lazymem.open(snapshot_path, readahead=8) as snap:
        info = snap.info("layer.2.weight")
        first = info.offset // snap.chunk_size
        last = (info.offset + info.nbytes - 1) // snap.chunk_size
        assert float(np.abs(snap["layer.2.weight"]).sum()) > 0
        snap.prefetch("layer.2.weight", wait=True)
        stats = snap.stats()
        assert stats.chunks_prefetch > 0
        states = snap.chunk_states()
        zeros = lazymem.open(snapshot_path)
        untouched = zeros.chunk_states()
        zeros.close()
        assert [i for i in range(snap.chunk_count) if states[i] != untouched[i]] == list(
            range(first, last + 1)
        )


@pytest.mark.needs_lazy
def test_readahead_follows_threads_that_each_go_through_a_part_of_an_array(snapshot_path: Path) -> None:
    with lazymem.open(snapshot_path, readahead=8) as snap:
        info, size = snap.info("layer.2.weight"), snap.chunk_size
        data = snap["layer.2.weight"].reshape(-1).view(np.uint8)
        untouched = snap.chunk_states()
        parts = [part * (info.nbytes // size // 2) for part in range(2)]
        assert parts[1] > 4, "each part must be longer than what is touched of it"
        for step in range(3):
            for first in parts:
                int(data[(first + step) * size])
        # Who waits for a prefetch goes before what is read ahead, so there is nothing to wait for but that.
        ahead = [info.offset // size + first + 3 for first in parts]
        wait_until(lambda: all(snap.chunk_states()[at] != untouched[at] for at in ahead))
        del data


@pytest.mark.needs_lazy
def test_readahead_is_not_taken_by_random_access(snapshot_path: Path) -> None:
    with lazymem.open(snapshot_path, readahead=8) as snap:
        array = snap["layer.2.weight"].reshape(-1)
        rows = np.random.default_rng(8).permutation(np.arange(0, array.size, 16384))[:10]
        far = [int(row) for i, row in enumerate(rows) if i == 0 or abs(int(row) - int(rows[i - 1])) > 200_000]
        for at in far:
            float(array[at])
        stats = snap.stats()
        assert (stats.chunks_demand, stats.chunks_prefetch) == (len(far), 0)
        del array


@pytest.mark.needs_lazy
def test_install_move_that_cannot_be_is_refused_not_replaced(snapshot_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"install='move' needs .*chunks of whole huge pages"):
        lazymem.open(snapshot_path, install="move")


def test_failed_attempts_leave_no_garbage_that_the_collector_trips_over(snapshot_path: Path) -> None:
    """cffi's buffers over memoryviews crashed the collector when a traceback held them in a cycle."""
    code = """
    import gc, sys, lazymem
    for _ in range(20):
        try:
            lazymem.open(sys.argv[1], install="move")
        except lazymem.LazymemError as error:
            error.cycle = error
        gc.collect()
    print("collected")
    """
    assert check_child(code, snapshot_path) == "collected\n"


@pytest.mark.parametrize("backend", ["map", "uffd"])
@pytest.mark.parametrize("dtype", [None, "float64"])
def test_container_saved_over_while_open_is_a_named_error(
    tmp_path: Path, backend: str, dtype: str | None
) -> None:
    """It has no checksums: what is mapped would show the new bytes, what is populated a mixture of both."""
    if backend == "map" and dtype is not None:
        pytest.skip("what is converted is never mapped")
    path = tmp_path / "x.npy"
    np.save(path, np.zeros(300_000, np.float32))
    with lazymem.open(path, backend=backend, dtype=dtype, chunk_size=64 << 10, readahead=0) as snap:
        assert not snap["data"][:10].any()
        with path.open("r+b") as file:
            file.seek(-100_000, os.SEEK_END)
            file.write(b"\1" * 50_000)
        os.utime(path, ns=(1, 1))  # whatever the clock's grain
        with pytest.raises(lazymem.SnapshotChanged, match="open it again"):
            snap.prefetch(wait=True)
        if backend == "map":
            with pytest.raises(lazymem.SnapshotChanged):
                snap["data"]


def test_descriptors_closed_by_the_process_are_not_taken_for_a_change_of_the_file(
    snapshot_path: Path,
) -> None:
    """Neither where nothing is under their numbers, nor where something else is."""
    code = """
        import os, sys, lazymem
        for again in (False, True):
            snap = lazymem.open(sys.argv[1], backend="sigsegv", readahead=0)
            os.closerange(3, 64)
            for _ in range(60 if again else 0):
                os.open("/dev/zero", os.O_RDONLY)
            try:
                snap.prefetch("layer.3.weight", wait=True)
            except lazymem.ReadError as error:
                print(error.array, "closed by this process" in str(error), "verify" in str(error))
            snap.close()
        """
    assert check_child(code, snapshot_path) == "layer.3.weight True False\n" * 2


@pytest.mark.needs_mapping
def test_mapping_outlives_its_descriptors(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(9))
    code = """
        import os, sys, lazymem
        snap = lazymem.open(sys.argv[1])
        os.closerange(3, 1000)
        print(snap["data"].sum())
        """
    assert check_child(code, tmp_path / "x.npy") == "36\n"
