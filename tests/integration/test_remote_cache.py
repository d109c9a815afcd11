# SPDX-License-Identifier: Apache-2.0
"""The cache on disk under a remote snapshot: what is in it is asked of nobody, and nothing wrong comes of it.

Requests are counted by a proxy in front of the server.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import select
import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

import lazymem
from lazymem.cache import piece

from ..children import DEADLINE, check_child, run_child

if TYPE_CHECKING:
    from ..servers.proxy import HostileProxy, Request
    from ..servers.s3 import Bucket

KEY = "model.lzm"
CHUNK = 64 * 1024

# argv: URL, cache (a directory, "" for the environment's, "-" for none), names of arrays (none: all).
READ = """
    import hashlib, json, sys, lazymem
    from lazymem.fetcher.client import fetcher_pid
    url, cache, names = sys.argv[1], {"": None, "-": False}.get(sys.argv[2], sys.argv[2]), sys.argv[3:]
    with lazymem.open(url, cache=cache, readahead=0) as snap:
        print(json.dumps({
            name: hashlib.sha256(snap[name].tobytes()).hexdigest() for name in names or snap
        }))
    print(fetcher_pid())
"""


def make_arrays(seed: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        "a": rng.integers(0, 2000, 500_000, dtype=np.int32),
        "b": rng.standard_normal(300_000).astype(np.float32),
        "zeros": np.zeros(500_000, np.uint8),
    }


def digests(arrays: dict[str, NDArray[Any]], *names: str) -> dict[str, str]:
    return {name: hashlib.sha256(arrays[name].tobytes()).hexdigest() for name in names or arrays}


def put(s3: Bucket, tmp_path: Path, arrays: dict[str, NDArray[Any]], key: str = KEY) -> None:
    lazymem.build(arrays, tmp_path / "built.lzm", chunk_size=CHUNK, overwrite=True)
    s3.put(key, (tmp_path / "built.lzm").read_bytes())


@pytest.fixture
def remote(s3: Bucket, proxy: HostileProxy, tmp_path: Path) -> dict[str, NDArray[Any]]:
    """A snapshot in the bucket, reached through the proxy; its arrays."""
    arrays = make_arrays(1)
    put(s3, tmp_path, arrays)
    s3.through(proxy)
    return arrays


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def sent(proxy: HostileProxy, key: str = KEY) -> list[Request]:
    """Requests for the object since the last call."""
    found = proxy.requests(key=key)
    del proxy.log[:]
    return found


def read(s3: Bucket, cache: Path | str, *names: str, key: str = KEY, **options: Any) -> dict[str, str]:
    return result(check_child(READ, s3.url(key), cache, *names, **options))


def result(out: str) -> dict[str, str]:
    """What READ has printed, once its fetcher has written to the cache what it still had to, and ended."""
    text, pid = out.splitlines()
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(int(pid))
        ended, _, _ = select.select([fd], [], [], DEADLINE)
        os.close(fd)
        assert ended
    found: dict[str, str] = json.loads(text)
    return found


def pieces(cache: Path) -> list[Path]:
    return [path for path in cache.glob("v1/*/*") if piece.is_piece(path.name)]


def test_warm_cache_leaves_one_request(
    s3: Bucket, proxy: HostileProxy, remote: dict[str, NDArray[Any]], cache: Path
) -> None:
    assert read(s3, cache) == digests(remote)
    assert len(sent(proxy)) > 2
    assert pieces(cache)
    assert read(s3, cache) == digests(remote)
    assert len(sent(proxy)) == 1
    assert read(s3, "-") == digests(remote)
    assert len(sent(proxy)) > 2  # without it, all over again


@pytest.mark.needs_lazy
def test_warm_cache_of_a_snapshot_with_a_large_index_leaves_one_request(
    s3: Bucket, proxy: HostileProxy, cache: Path, tmp_path: Path
) -> None:
    """The index is longer than what the first request brings."""
    arrays = {f"layer.{i}.some.rather.long.name.of.a.weight": np.full(20, i) for i in range(20_000)}
    lazymem.build(arrays, tmp_path / "many.lzm", chunk_size=CHUNK)
    s3.put(KEY, (tmp_path / "many.lzm").read_bytes())
    s3.through(proxy)
    check_child("import sys, lazymem; lazymem.open(sys.argv[1])", s3.url(KEY))
    assert len(sent(proxy)) == 2
    names = list(arrays)[::5000]
    assert read(s3, cache, *names) == digests(arrays, *names)
    assert len(sent(proxy)) > 2
    assert read(s3, cache, *names) == digests(arrays, *names)
    assert len(sent(proxy)) == 1


def test_environment_turns_it_on_and_the_caller_off(
    s3: Bucket, proxy: HostileProxy, remote: dict[str, NDArray[Any]], cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert read(s3, "", "a") == digests(remote, "a")
    assert not cache.exists()
    monkeypatch.setenv("LAZYMEM_CACHE_DIR", str(cache))
    assert read(s3, "-", "a") == digests(remote, "a")
    assert not cache.exists()
    assert read(s3, "", "a") == digests(remote, "a")
    sent(proxy)
    assert read(s3, "", "a") == digests(remote, "a")
    assert len(sent(proxy)) == 1


def test_processes_share_it(
    s3: Bucket, proxy: HostileProxy, remote: dict[str, NDArray[Any]], cache: Path
) -> None:
    code = """
        import hashlib, subprocess, sys, lazymem
        snap = lazymem.open(sys.argv[1], cache=sys.argv[2], readahead=0)
        def show(name):
            snap.prefetch([name], wait=True)  # which is in the cache when it returns
            print(hashlib.sha256(snap[name].tobytes()).hexdigest(), flush=True)
        show("a")
        if sys.argv[3:]:  # while this process has it open, another one reads the same, and more
            show("b")
        else:
            subprocess.run([sys.executable, "-c", code, *sys.argv[1:3], "other"], check=True)
            show("b")  # which that one has fetched
    """
    out = check_child(f"code = {textwrap.dedent(code)!r}\n{textwrap.dedent(code)}", s3.url(KEY), cache)
    a, b = digests(remote, "a", "b").values()
    assert out.split() == [a, a, b, b]
    ranges = [request.range for request in sent(proxy)]
    fetched = [one for one in ranges if one and not one.startswith("bytes=-")]
    assert len(fetched) >= 2  # one for each array at least; how many depends on what is queued
    spans = sorted(tuple(map(int, one.removeprefix("bytes=").split("-"))) for one in fetched)
    assert all(first[1] < second[0] for first, second in itertools.pairwise(spans)), spans  # no byte twice
    assert len(ranges) - len(fetched) == 2  # both have asked for the identity


def test_replaced_object_is_another_one(
    s3: Bucket, proxy: HostileProxy, remote: dict[str, NDArray[Any]], cache: Path, tmp_path: Path
) -> None:
    assert read(s3, cache) == digests(remote)
    newer = make_arrays(2)
    put(s3, tmp_path, newer)
    sent(proxy)
    assert read(s3, cache) == digests(newer)
    assert len(sent(proxy)) > 2
    put(s3, tmp_path, remote)  # and back: what was kept of it is good again
    assert read(s3, cache) == digests(remote)
    assert len(sent(proxy)) == 1


def test_replaced_container_is_another_one(s3: Bucket, cache: Path, tmp_path: Path) -> None:
    """Same key, same size, same layout, and no checksum in it that would tell."""
    for seed in (1, 2):
        array = make_arrays(seed)["a"]
        np.save(tmp_path / "a.npy", array)
        s3.put("a.npy", (tmp_path / "a.npy").read_bytes())
        (found,) = read(s3, cache, key="a.npy").values()
        assert found == hashlib.sha256(array.tobytes()).hexdigest()


@pytest.mark.needs_lazy
def test_object_replaced_while_open_is_never_mixed(
    s3: Bucket, remote: dict[str, NDArray[Any]], cache: Path, tmp_path: Path
) -> None:
    """What is in the cache is still of the version that was opened; what is not raises."""
    assert read(s3, cache, "a") == digests(remote, "a")
    code = """
        import hashlib, os, subprocess, sys, boto3, lazymem
        snap = lazymem.open(sys.argv[1], cache=sys.argv[2], readahead=0)
        with open(sys.argv[4], "rb") as newer:
            boto3.client("s3").put_object(Bucket=sys.argv[3], Key="model.lzm", Body=newer)
        print(hashlib.sha256(snap["a"].tobytes()).hexdigest())
        try:
            snap.prefetch(["b"], wait=True)
        except lazymem.SnapshotChanged as error:
            print(error)
    """
    lazymem.build(make_arrays(2), tmp_path / "newer.lzm", chunk_size=CHUNK)
    out = check_child(code, s3.url(KEY), cache, s3.bucket, tmp_path / "newer.lzm").split("\n")
    assert out[0] == digests(remote)["a"]
    assert s3.url(KEY) in out[1]


def test_the_same_key_of_another_endpoint_is_another_object(
    s3: Bucket, proxy: HostileProxy, remote: dict[str, NDArray[Any]], cache: Path
) -> None:
    assert read(s3, cache) == digests(remote)
    sent(proxy)
    assert read(s3, cache, env={"AWS_ENDPOINT_URL": s3.endpoint}) == digests(remote)
    folders = {path.parent for path in pieces(cache)}
    assert len(folders) == 2


def test_container_in_place_is_cached_too(
    s3: Bucket, proxy: HostileProxy, remote: dict[str, NDArray[Any]], cache: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "a.npy", remote["a"])
    s3.put("a.npy", (tmp_path / "a.npy").read_bytes())
    for requests in (None, 1):
        (found,) = read(s3, cache, key="a.npy").values()
        assert found == digests(remote)["a"]
        assert requests in (None, len(sent(proxy, "a.npy")))


@pytest.mark.needs_lazy
def test_removed_while_open_it_is_made_again(
    s3: Bucket, proxy: HostileProxy, remote: dict[str, NDArray[Any]], cache: Path
) -> None:
    code = """
        import hashlib, shutil, sys, lazymem
        snap = lazymem.open(sys.argv[1], cache=sys.argv[2], readahead=0)
        for name in ("a", "b"):
            snap.prefetch([name], wait=True)
            print(hashlib.sha256(snap[name].tobytes()).hexdigest())
            shutil.rmtree(sys.argv[2]) if name == "a" else None
    """
    out = check_child(code, s3.url(KEY), cache).split()
    assert out == [*digests(remote, "a", "b").values()]
    sent(proxy)
    assert read(s3, cache, "b") == digests(remote, "b")
    assert len(sent(proxy)) == 1


def damage_all(cache: Path) -> None:
    for path in pieces(cache):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


def forge_all(cache: Path) -> None:
    """Wrong bytes with a checksum that fits: what a store that flips bits would leave behind."""
    for path in pieces(cache):
        data = bytearray(path.read_bytes()[piece.HEADER_SIZE :])
        data[len(data) // 2] ^= 1
        offset, length = (int(number, 16) for number in path.name.split("-"))
        header = piece.make_header(path.parent.name, offset, length, piece.digest_of(memoryview(data)))
        path.write_bytes(header + data)


def empty_all(cache: Path) -> None:
    for path in pieces(cache):
        path.write_bytes(b"")


def link_all(cache: Path) -> None:
    for path in pieces(cache):
        path.unlink()
        path.symlink_to("/dev/zero")


def pipe_all(cache: Path) -> None:
    for path in pieces(cache):
        path.unlink()
        os.mkfifo(path)


@pytest.mark.parametrize("harm", [damage_all, forge_all, empty_all, link_all, pipe_all])
def test_harmed_pieces_are_fetched_again_and_mended(
    s3: Bucket, proxy: HostileProxy, remote: dict[str, NDArray[Any]], cache: Path, harm: Any
) -> None:
    assert read(s3, cache) == digests(remote)
    harm(cache)
    sent(proxy)
    assert read(s3, cache) == digests(remote)
    assert len(sent(proxy)) > 1
    assert read(s3, cache) == digests(remote)
    assert len(sent(proxy)) == 1


def test_limit_holds(s3: Bucket, remote: dict[str, NDArray[Any]], cache: Path) -> None:
    limit = 512 * 1024
    found = read(s3, cache, env={"LAZYMEM_CACHE_SIZE": str(limit)})
    assert found == digests(remote)
    kept = sum(piece.disk_usage(path.stat().st_size) for path in pieces(cache))
    assert limit // 4 < kept <= limit * 11 // 10


def test_full_disk_costs_nothing_but_the_cache(
    s3: Bucket, remote: dict[str, NDArray[Any]], cache: Path
) -> None:
    cache.mkdir(mode=0o700)
    # In a mount namespace of its own: the disk is gone when the process is.
    script = 'mount -t tmpfs -o size=300k,mode=700 lazymem-test "$0" || exit 77; exec "$@"'
    prefix = ("unshare", "--mount", "sh", "-c", script, str(cache))
    done = run_child(READ, s3.url(KEY), cache, prefix=prefix)
    if done.returncode == 77 or done.stderr.startswith("unshare: "):
        pytest.skip("needs the right to mount a tmpfs")
    assert done.returncode == 0, done.stderr
    assert result(done.stdout) == digests(remote)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_impossible_directory_costs_nothing_but_the_cache(
    s3: Bucket, remote: dict[str, NDArray[Any]], tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").touch()
    assert read(s3, tmp_path / name) == digests(remote)


def test_nothing_in_it_names_the_object_or_its_secrets(
    s3: Bucket, remote: dict[str, NDArray[Any]], cache: Path
) -> None:
    read(s3, cache)
    for path in cache.rglob("*"):
        content = b"" if path.is_dir() else path.read_bytes()
        for word in (s3.bucket, s3.credentials.access_key, s3.credentials.secret_key):
            assert word not in str(path.relative_to(cache))
            assert word.encode() not in content


def test_verbs_read_through_it(
    s3: Bucket, proxy: HostileProxy, remote: dict[str, NDArray[Any]], cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """`lazymem cat` of what another process has read sends no more than the request for the identity."""
    monkeypatch.setenv("LAZYMEM_CACHE_DIR", str(cache))
    assert read(s3, "") == digests(remote)
    sent(proxy)
    code = "import sys; from lazymem.cli import main; sys.argv[0] = 'lazymem'; main()"
    check_child(code, "cat", s3.url(KEY), "zeros")
    assert len(sent(proxy)) == 1
    shutil.rmtree(cache)
