# SPDX-License-Identifier: Apache-2.0
"""Snapshots and handles go to other processes by reference: each loads what it touches, and no secrets go."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

import lazymem
from lazymem.errors import AccessDenied, OptionError, SnapshotChanged, SnapshotNotFound

from ..children import check_child

if TYPE_CHECKING:
    from ..servers.proxy import HostileProxy
    from ..servers.s3 import Bucket

KEY = "model.lzm"
CHUNK = 64 * 1024
BIG = 4 << 20  # elements of "big", int32: 16 MiB
PLACES = ("local", "s3")


def make_arrays(seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        "big": rng.integers(0, 1 << 20, BIG, dtype=np.int32).reshape(1024, -1),
        "small": np.arange(12, dtype=np.int64).reshape(3, 4),
        "scalar": np.array(2.5),
        "fortran": np.asfortranarray(rng.standard_normal((30, 20))),
    }


@pytest.fixture(scope="module")
def arrays() -> dict[str, NDArray[Any]]:
    return make_arrays()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, NDArray[Any]]) -> Path:
    path = tmp_path_factory.mktemp("pickling") / KEY
    lazymem.build(arrays, path, chunk_size=CHUNK)
    return path


@pytest.fixture(params=PLACES)
def location(request: pytest.FixtureRequest, built: Path, tmp_path: Path) -> str:
    """A path, or a URL, of a snapshot that a test may replace."""
    if request.param == "local":
        path = tmp_path / KEY
        path.write_bytes(built.read_bytes())
        return str(path)
    s3: Bucket = request.getfixturevalue("s3")
    s3.put(KEY, built.read_bytes())
    return s3.url(KEY)


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    """Handles keep snapshots open for the next one; a test's go with it."""
    yield
    from lazymem import snapshot

    snapshot._opened.clear()


def replace(location: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    lazymem.build({"big": np.zeros((2, 2)), "small": np.ones(3)}, tmp_path / "newer.lzm")
    if location.startswith("s3:"):
        request.getfixturevalue("s3").put(KEY, (tmp_path / "newer.lzm").read_bytes())
    else:
        (tmp_path / "newer.lzm").replace(location)


# ---- what it is ----


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_snapshot_comes_back_open(built: Path, arrays: dict[str, NDArray[Any]], protocol: int) -> None:
    with lazymem.open(built, mode="c", backend="eager", readahead=3) as snap:
        data = pickle.dumps(snap, protocol)
        assert len(data) < 1000
        with pickle.loads(data) as other:
            assert list(other) == list(snap)
            assert (other.url, other.mode, other.backend) == (str(built), "c", "eager")
            for name, array in arrays.items():
                assert np.array_equal(other[name], array)


def test_snapshot_can_be_pickled_wherever_it_lies(location: str, arrays: dict[str, NDArray[Any]]) -> None:
    snap = lazymem.open(location)
    other = pickle.loads(pickle.dumps(snap))
    assert other.url == snap.url
    assert other is not snap
    assert np.array_equal(other["small"], arrays["small"])
    assert np.array_equal(copy.copy(snap)["small"], arrays["small"])
    assert np.array_equal(copy.deepcopy({"x": snap})["x"]["small"], arrays["small"])


def test_handle_tells_what_the_array_is_without_reading(
    location: str, arrays: dict[str, NDArray[Any]]
) -> None:
    with lazymem.open(location, backend="auto" if location.startswith("s3:") else "uffd") as snap:
        for name, array in arrays.items():
            handle = snap.handle(name)
            assert isinstance(handle, lazymem.ArrayHandle)
            for one in (handle, pickle.loads(pickle.dumps(handle))):
                assert (one.shape, one.dtype, one.ndim) == (array.shape, array.dtype, array.ndim)
                assert (one.size, one.nbytes, one.name) == (array.size, array.nbytes, name)
                assert (one.url, one.identity) == (location, handle.identity)
                assert name in repr(one)
        assert snap.stats().chunks_populated == 0


def test_handle_works_as_an_array(location: str, arrays: dict[str, NDArray[Any]]) -> None:
    with lazymem.open(location) as snap:
        handles = pickle.loads(pickle.dumps({name: snap.handle(name) for name in snap}))
    big = handles["big"]
    assert big[7, 9] == arrays["big"][7, 9]
    assert np.array_equal(big[5:1000:100, :3], arrays["big"][5:1000:100, :3])
    assert np.array_equal(big.open(), arrays["big"])
    assert np.array_equal(np.asarray(handles["fortran"]), arrays["fortran"])
    assert np.asarray(handles["small"], dtype=np.float32).dtype == np.float32
    assert np.sum(handles["small"]) == 66
    assert handles["scalar"][()] == 2.5
    assert len(big) == 1024
    shown = np.asarray(handles["small"])
    assert not shown.flags.owndata
    assert not shown.flags.writeable
    mine = np.array(handles["small"], copy=True)
    mine[0, 0] = 99
    assert handles["small"][0, 0] == 0
    with pytest.raises(TypeError, match="no length"):
        len(handles["scalar"])


def test_handles_of_one_process_share_memory(location: str) -> None:
    with lazymem.open(location) as snap:
        data = pickle.dumps(snap.handle("big"))
    first, second = pickle.loads(data), pickle.loads(data)
    assert np.shares_memory(first.open(), second.open())


def test_handle_of_no_array_is_refused(built: Path) -> None:
    with lazymem.open(built) as snap, pytest.raises(lazymem.ArrayNotFound, match="no array 'bgi'"):
        snap.handle("bgi")


def test_relative_path_is_found_from_another_directory(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(built.parent)
    with lazymem.open(KEY) as snap:
        data = pickle.dumps((snap, snap.handle("small")))
    monkeypatch.chdir(tmp_path)
    snap, handle = pickle.loads(data)
    assert handle[1, 1] == snap["small"][1, 1] == 5


def test_container_in_place_goes_by_reference_too(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(100))
    with lazymem.open(tmp_path / "x.npy", as_format="raw") as snap:
        assert bytes(pickle.loads(pickle.dumps(snap))["data"][:6]) == b"\x93NUMPY"
    with lazymem.open(tmp_path / "x.npy") as snap:
        (name,) = snap
        assert pickle.loads(pickle.dumps(snap.handle(name)))[42] == 42


# ---- one version only ----


def test_replaced_object_is_refused(location: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with lazymem.open(location) as snap:
        data, handle = pickle.dumps(snap), pickle.dumps(snap.handle("big"))
    replace(location, request, tmp_path)
    with pytest.raises(SnapshotChanged, match=KEY):
        pickle.loads(data)
    late = pickle.loads(handle)  # reads nothing, so it cannot know yet
    for use in (late.open, lambda: late[0, 0], lambda: np.asarray(late)):
        with pytest.raises(SnapshotChanged, match=KEY):
            use()


def test_vanished_object_is_not_found(location: str, request: pytest.FixtureRequest) -> None:
    with lazymem.open(location) as snap:
        data = pickle.dumps(snap.handle("big"))
    if location.startswith("s3:"):
        request.getfixturevalue("s3").delete(KEY)
    else:
        os.unlink(location)
    with pytest.raises(SnapshotNotFound, match=KEY):
        pickle.loads(data)[0, 0]


def test_copy_of_a_local_file_with_its_time_is_the_same_version(built: Path, tmp_path: Path) -> None:
    """A worker on another machine sees it under another inode."""
    path = tmp_path / KEY
    path.write_bytes(built.read_bytes())
    with lazymem.open(path) as snap:
        data = pickle.dumps(snap.handle("small"))
    path.rename(tmp_path / "old")
    path.write_bytes(built.read_bytes())
    assert pickle.loads(data)[2, 3] == 11


# ---- secrets ----


def test_secrets_stay_here(s3: Bucket, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put(KEY, built.read_bytes())
    environment = s3.environment
    key, secret = environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
    options = {"key": key, "secret": secret, "endpoint_url": s3.endpoint, "timeout": 7.0}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token-in-the-environment")
    with lazymem.open(s3.url(KEY), storage_options=options) as snap:
        handle = snap.handle("small")
        for data in (pickle.dumps(snap), pickle.dumps(handle), pickle.dumps(handle, 0)):
            for word in (key, secret, "a-token-in-the-environment"):
                assert word.encode() not in data
            assert s3.endpoint.encode() in data  # what is no secret goes along
        for text in (repr(snap), repr(handle), str(handle), repr(handle._reference)):
            assert secret not in text
            assert key not in text
    # The other side finds its own, or says what it lacks.
    monkeypatch.delenv("AWS_SESSION_TOKEN")
    with pytest.raises((AccessDenied, OptionError), match="credentials") as caught:
        pickle.loads(data)[0, 0]
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    assert pickle.loads(data)[2, 3] == 11


def test_url_with_a_signature_in_it_is_not_passed_on(s3: Bucket, built: Path) -> None:
    s3.put(KEY, built.read_bytes())
    url = s3.client.generate_presigned_url("get_object", Params={"Bucket": s3.bucket, "Key": KEY})
    signature = url.partition("Signature=")[2].partition("&")[0]
    with lazymem.open(url) as snap:
        assert snap["small"][2, 3] == 11
        for make in (lambda: pickle.dumps(snap), lambda: snap.handle("small")):
            with pytest.raises(TypeError, match="credentials") as caught:
                make()
            assert signature not in str(caught.value)
            assert KEY in str(caught.value)


# ---- other processes ----

POOLS = """
    import functools, multiprocessing, operator, sys
    from concurrent.futures import ProcessPoolExecutor
    import numpy as np, lazymem
    with lazymem.open(sys.argv[1], readahead=0) as snap:
        handle = snap.handle("big")
        expected = int(np.sum(snap["big"][:64], dtype=np.int64))
        context = multiprocessing.get_context("spawn")
        rows = [slice(start, start + 16) for start in range(0, 64, 16)]
        total = functools.partial(np.sum, dtype=np.int64)
        with context.Pool(2) as pool:
            parts = pool.starmap(operator.getitem, [(handle, one) for one in rows])
            small = pool.apply(operator.getitem, (snap, "small"))  # a whole Snapshot
        assert sum(int(total(part)) for part in parts) == expected
        assert small.tolist() == snap["small"].tolist()
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            parts = list(pool.map(operator.getitem, [handle] * 4, rows))
        assert sum(int(total(part)) for part in parts) == expected
        print("done")
"""


def test_pools_of_processes(location: str) -> None:
    assert check_child(POOLS, location) == "done\n"


@pytest.mark.needs_lazy
def test_worker_loads_what_it_touches(
    s3: Bucket, proxy: HostileProxy, built: Path, arrays: dict[str, NDArray[Any]]
) -> None:
    """Requests counted at the server: one to open, one for the chunk of the element."""
    s3.put(KEY, built.read_bytes())
    s3.through(proxy)
    with lazymem.open(s3.url(KEY), readahead=0) as snap:
        data = pickle.dumps(snap.handle("big"))
    del proxy.log[:]
    code = """
        import pickle, sys
        handle = pickle.loads(bytes.fromhex(sys.argv[1]))
        again = pickle.loads(bytes.fromhex(sys.argv[1]))
        print(handle[500, 500], again[500, 501])
    """
    expected = arrays["big"]
    assert check_child(code, data.hex()).split() == [str(expected[500, 500]), str(expected[500, 501])]
    requests = proxy.requests(key=KEY)
    assert len(requests) == 2
    assert sum(request.body_bytes for request in requests) < 4 * CHUNK


DASK = """
    import json, os, sys
    import dask.array as da, lazymem
    from distributed import Client, LocalCluster

    def loaded():
        from lazymem.fetcher.client import fetcher_status
        return fetcher_status()

    with lazymem.open(sys.argv[1], readahead=0) as snap:
        handle = snap.handle("big")
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, local_directory=sys.argv[2]
    ) as cluster, Client(cluster) as client:
        array = da.from_array(handle, chunks=(64, -1))  # 16 blocks of 1 MiB
        some = int(array[:128].sum(dtype="int64").compute())
        after_some = client.run(loaded)
        means = array.astype("float64").mean(axis=1).compute()
        after_all = client.run(loaded)
        pids = {os.getpid(), *client.run(os.getpid).values()}
        print(json.dumps({
            "some": some, "means": means.tolist(), "processes": len(pids),
            "after_some": list(after_some.values()), "after_all": list(after_all.values()),
        }))
"""


@pytest.mark.needs_lazy
def test_dask_cluster_computes_over_an_array_in_s3(
    s3: Bucket, proxy: HostileProxy, built: Path, arrays: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    pytest.importorskip("distributed")
    s3.put(KEY, built.read_bytes())
    s3.through(proxy)
    found = json.loads(check_child(DASK, s3.url(KEY), tmp_path, deadline=100).splitlines()[-1])
    big = arrays["big"]
    assert found["some"] == int(big[:128].sum(dtype=np.int64))
    assert np.array_equal(found["means"], big.astype(np.float64).mean(axis=1))
    assert found["processes"] == 3  # this process and two workers
    size = built.stat().st_size
    some = sum(one["received"] for one in found["after_some"])
    assert some < size // 4  # an eighth of the rows, and what opening takes
    everything = [one["received"] for one in found["after_all"]]
    assert all(0 < one < size for one in everything)  # each its share
    assert sum(everything) < 1.5 * size  # hardly anything twice
    told = sum(request.body_bytes for request in proxy.requests(key=KEY))
    assert told < 1.5 * size  # the server's side of it, this process's share included
