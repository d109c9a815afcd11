# SPDX-License-Identifier: Apache-2.0
"""Remote objects as memory: every kind of file, every way in, against a real S3 server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

import lazymem
from lazymem.fetcher.client import fetcher_pid, fetcher_status

from ..children import check_child

if TYPE_CHECKING:
    from ..servers.proxy import HostileProxy
    from ..servers.s3 import Bucket

Arrays = dict[str, NDArray[np.generic]]


def put_file(s3: Bucket, key: str, path: Path) -> str:
    s3.put(key, path.read_bytes())
    return s3.url(key)


@pytest.mark.parametrize("mode", ["r", "c"])
@pytest.mark.parametrize("backend", ["auto", "uffd-user", "sigsegv", "eager"])
def test_every_backend_shows_the_same_bytes(
    s3: Bucket, snapshot_path: Path, arrays: Arrays, backend: str, mode: str
) -> None:
    url = put_file(s3, "small.lzm", snapshot_path)
    with lazymem.open(url, backend=backend, mode=mode) as snap:
        assert snap.url == url
        assert list(snap) == list(lazymem.open(snapshot_path))
        for name, expected in arrays.items():
            assert np.array_equal(snap[name], expected), name
        if mode == "c":
            snap["ids"][0] = 77
            assert snap["ids"][0] == 77
            assert snap["ids"][1] == arrays["ids"][1]


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("chunk_size", [65536, 1 << 21])
def test_every_codec_and_chunk_size(
    s3: Bucket, tmp_path: Path, arrays: Arrays, codec: str, chunk_size: int
) -> None:
    lazymem.build(arrays, tmp_path / "a.lzm", codec=codec, chunk_size=chunk_size)
    url = put_file(s3, "a.lzm", tmp_path / "a.lzm")
    with lazymem.open(url, install="copy") as snap:
        snap.prefetch(wait=True)
        stats = snap.stats()
        if chunk_size == 65536:
            assert stats.requests < stats.chunks_populated / 4  # ranges of several chunks
        for name, expected in arrays.items():
            assert np.array_equal(snap[name], expected), name


@pytest.mark.needs_userfaultfd
def test_chunks_can_be_moved_in(s3: Bucket, huge_path: Path, arrays: Arrays) -> None:
    url = put_file(s3, "huge.lzm", huge_path)
    with lazymem.open(url, install="move") as snap:
        assert all(np.array_equal(snap[name], expected) for name, expected in arrays.items())
        assert snap.stats().moved_chunks > 0


def test_containers_are_read_in_place(s3: Bucket, tmp_path: Path, arrays: Arrays) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    weights = {name: array for name, array in arrays.items() if array.flags.c_contiguous and array.ndim}
    safetensors.save_file(weights, tmp_path / "m.safetensors")
    np.save(tmp_path / "a.npy", arrays["layer.0.weight"])
    np.savez(tmp_path / "b.npz", **weights)
    (tmp_path / "c.bin").write_bytes(arrays["ids"].tobytes())
    for name in ("m.safetensors", "a.npy", "b.npz", "c.bin"):
        put_file(s3, name, tmp_path / name)
    with lazymem.open(s3.url("m.safetensors"), chunk_size=65536) as snap:
        assert all(np.array_equal(snap[name], array) for name, array in weights.items())
    assert np.array_equal(lazymem.open_array(s3.url("a.npy")), arrays["layer.0.weight"])
    with lazymem.open(s3.url("b.npz")) as snap:
        assert all(np.array_equal(snap[name], array) for name, array in weights.items())
    assert np.array_equal(lazymem.open_array(s3.url("c.bin")).view(np.int64), arrays["ids"])


@pytest.mark.needs_lazy
def test_torch_files_are_read_in_place_in_few_requests(
    s3: Bucket, proxy: HostileProxy, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    state = {f"layers.{i}.weight": torch.randn(64, 300) for i in range(30)}
    state["tied"] = state["layers.3.weight"]
    state["last"] = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    torch.save(state, tmp_path / "m.pt")
    url = put_file(s3, "m.pt", tmp_path / "m.pt")
    s3.through(proxy)
    code = """
        import sys, numpy as np, lazymem
        snap = lazymem.open(sys.argv[1], readahead=0, chunk_size=65536)
        np.savez(sys.argv[2], **{name: snap[name] for name in ("layers.3.weight", "tied", "last")})
    """
    check_child("import sys, lazymem; print(len(lazymem.open(sys.argv[1])))", url)
    assert len(proxy.log) == 2
    check_child(code, url, tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as found:
        for name in found.files:
            assert np.array_equal(found[name], state[name].numpy())


def test_sharded_model_opens_by_its_index(s3: Bucket, arrays: Arrays) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    shards = {
        "model-1.safetensors": {f"layer.{i}.weight": arrays[f"layer.{i}.weight"] for i in range(5)},
        "model-2.safetensors": {f"layer.{i}.weight": arrays[f"layer.{i}.weight"] for i in range(5, 10)},
    }
    for name, shard in shards.items():
        s3.put(f"big/{name}", safetensors.save(shard))
    index = {name: shard for shard, content in shards.items() for name in content}
    s3.put("big/model.safetensors.index.json", json.dumps({"weight_map": index}).encode())
    for url in (s3.url("big/model.safetensors.index.json"), s3.url("big/")):
        with lazymem.open(url) as snap:
            assert all(np.array_equal(snap[name], arrays[name]) for name in index)


def test_small_and_empty_objects(s3: Bucket) -> None:
    s3.put("tiny", b"abc")
    assert lazymem.open_array(s3.url("tiny")).tobytes() == b"abc"
    s3.put("empty", b"")
    with lazymem.open(s3.url("empty")) as snap:
        assert snap.nbytes == 0
        assert len(snap["data"]) == 0


@pytest.mark.needs_lazy
def test_prefetching_many_arrays_asks_for_as_much_at_a_time_as_one(s3: Bucket, tmp_path: Path) -> None:
    mib = 1 << 20
    arrays = {f"w{i}": np.random.default_rng(i).integers(0, 256, 4 * mib, np.uint8) for i in range(24)}
    lazymem.build(arrays, tmp_path / "w.lzm", codec="none", chunk_size=mib)
    with lazymem.open(put_file(s3, "w.lzm", tmp_path / "w.lzm")) as snap:
        snap.prefetch(list(arrays)[::-1], wait=True)  # no two of them in one span
        assert snap.stats().requests <= 64  # towards the end they become smaller
        assert np.array_equal(snap["w7"], arrays["w7"])


@pytest.mark.needs_lazy
@pytest.mark.parametrize(("what", "requests"), [("open", 1), ("touch", 2)])
def test_opening_and_touching_cost_few_requests(
    s3: Bucket, proxy: HostileProxy, huge_path: Path, arrays: Arrays, what: str, requests: int
) -> None:
    url = put_file(s3, "huge.lzm", huge_path)
    s3.through(proxy)
    # The proxy needs this process's GIL, which a touch would hold.
    out = check_child(
        """
        import sys, lazymem
        snap = lazymem.open(sys.argv[1], readahead=0)
        if sys.argv[2] == "touch":
            weight = snap["layer.3.weight"]
            print(float(weight[5, 5]), float(weight[5, 6]))
            stats = snap.stats()
            print(stats.requests, stats.chunks_demand, stats.faults)
        """,
        url,
        what,
    )
    assert len(proxy.log) == requests
    if what == "touch":
        weight = arrays["layer.3.weight"]
        assert out == f"{float(weight[5, 5])} {float(weight[5, 6])}\n1 1 1\n"


@pytest.mark.needs_lazy
def test_what_can_be_asked_first_raises(s3: Bucket, snapshot_path: Path) -> None:
    url = put_file(s3, "a.lzm", snapshot_path)
    with lazymem.open(url) as snap:
        s3.put("a.lzm", b"something else")
        with pytest.raises(lazymem.SnapshotChanged, match=r"a\.lzm.*chunk"):
            snap.prefetch("layer.1.weight", wait=True)
        with pytest.raises(lazymem.SnapshotChanged):
            snap.read("layer.2.weight")
        s3.delete("a.lzm")
        with pytest.raises((lazymem.SnapshotChanged, lazymem.SnapshotNotFound)):
            snap.read("layer.3.weight")
    with pytest.raises(lazymem.SnapshotNotFound, match=r"a\.lzm"):
        lazymem.open(url)


@pytest.mark.needs_lazy
def test_a_chunk_heals_when_its_object_is_right_again(
    s3: Bucket, snapshot_path: Path, arrays: Arrays
) -> None:
    data = bytearray(snapshot_path.read_bytes())
    good = bytes(data)
    with lazymem.open(put_file(s3, "a.lzm", snapshot_path)) as snap:
        s3.put("a.lzm", b"gone for now")
        with pytest.raises(lazymem.SnapshotChanged):
            snap.prefetch("layer.1.weight", wait=True)
        s3.put("a.lzm", good)  # the same bytes have the same ETag
        snap.prefetch("layer.1.weight", wait=True)
        assert np.array_equal(snap["layer.1.weight"], arrays["layer.1.weight"])


def test_damage_in_the_object_is_named(s3: Bucket, snapshot_path: Path) -> None:
    data = bytearray(snapshot_path.read_bytes())
    data[100_000] ^= 0x10
    s3.put("a.lzm", bytes(data))
    with (  # at open, where that reads everything
        pytest.raises(lazymem.ChunkCorrupt, match="checksum"),
        lazymem.open(s3.url("a.lzm")) as snap,
    ):
        snap.prefetch(wait=True)


@pytest.mark.needs_lazy
def test_closing_does_not_wait_for_the_network(
    s3: Bucket, proxy: HostileProxy, long_path: Path, counts_before: tuple[int, int]
) -> None:
    url = put_file(s3, "long.lzm", long_path)
    s3.through(proxy)
    for _ in range(5):
        snap = lazymem.open(url)
        snap.prefetch()
        snap.close()
    assert lazymem._native.engine_counts()[0] == counts_before[0]


def test_the_application_imports_no_client(s3: Bucket, snapshot_path: Path) -> None:
    url = put_file(s3, "a.lzm", snapshot_path)
    out = check_child(
        """
        import sys, lazymem
        snap = lazymem.open(sys.argv[1])
        snap.prefetch(wait=True)
        print(sorted({"boto3", "botocore", "obstore", "urllib3", "http.client"} & sys.modules.keys()))
        """,
        url,
    )
    assert out == "[]\n"


def test_map_is_refused(s3: Bucket, snapshot_path: Path) -> None:
    with pytest.raises(lazymem.BackendUnavailable, match="not a local file"):
        lazymem.open(put_file(s3, "a.lzm", snapshot_path), backend="map")


@pytest.mark.needs_lazy
def test_status_counts(s3: Bucket, snapshot_path: Path) -> None:
    with lazymem.open(put_file(s3, "a.lzm", snapshot_path)) as snap:
        before = fetcher_status()
        snap.prefetch(wait=True)
        after = fetcher_status()
    assert fetcher_pid() > 0
    assert after["requests"] > before["requests"]
    assert after["starts"] == before["starts"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bogus": 1}, "bogus"),
        ({"key": "a"}, "secret_access_key"),
        ({"endpoint_url": "ftp://x"}, "endpoint_url"),
        ({"timeout": -1}, "timeout"),
        ({"concurrency": 0}, "concurrency"),
    ],
)
def test_wrong_storage_options_are_named(options: dict[str, Any], word: str) -> None:
    with pytest.raises(lazymem.OptionError, match=word):
        lazymem.open("s3://bucket/key", storage_options=options)
