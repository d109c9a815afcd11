# SPDX-License-Identifier: Apache-2.0
"""Every verb with URLs, against a real S3 server: what comes out, what it costs, what an end leaves."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save, save_file

import lazymem
from lazymem import verifier
from lazymem.cli import run
from lazymem.errors import ChunkCorrupt, SnapshotChanged
from lazymem.extractor import cat
from lazymem.format.index import parse_index
from lazymem.store import ahead
from lazymem.summary import summarize

from ..servers.nginx import Nginx
from ..servers.proxy import Fault, HostileProxy, Request
from ..servers.s3 import Bucket

Capture = pytest.CaptureFixture[str]
COMMAND = [sys.executable, "-m", "lazymem"]
TIMEOUT = 90
CHUNK = 64 * 1024
RNG = np.random.default_rng(0)
MODEL = {
    "w": (RNG.standard_normal((512, 1024)) * 0.02).astype(np.float32),
    "zeros": np.zeros(10 * CHUNK, np.uint8),
    "b": RNG.standard_normal(1000),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A .safetensors file of 2.7 MB."""
    save_file(MODEL, tmp_path / "model.safetensors", metadata={"by": "a test"})
    return tmp_path / "model.safetensors"


@pytest.fixture
def snapshot(model: Path) -> Path:
    """A snapshot of the model: 75 chunks of 64 KiB, of which 34 are stored."""
    path = model.with_suffix(".lzm")
    lazymem.build(model, path, chunk_size=CHUNK, metadata={"run": "7"})
    return path


@pytest.fixture
def url(s3: Bucket, snapshot: Path) -> str:
    s3.put("models/model.lzm", snapshot.read_bytes())
    return s3.url("models/model.lzm")


def shown(capsys: Capture, *args: object) -> str:
    """Standard output of a run that must succeed and have nothing to complain of."""
    assert run([*map(str, args)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys: Capture, code: int, *args: object) -> str:
    """The one sentence of a run that must fail with this exit code."""
    assert run([*map(str, args)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("lazymem: ")
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in err
    return err


def written(s3: Bucket, key: str) -> bool:
    return s3.keys().count(key) > 0


def damaged(data: bytes, record: int) -> bytes:
    """A snapshot with a flipped bit in the stored bytes of a record."""
    index = parse_index("x", data, lambda offset, length: data[offset : offset + length], len(data))
    at = int(index.records["offset"][record]) + 5
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


# ---- reading ----


def test_ls_info_and_verify_say_the_same_of_a_url(url: str, snapshot: Path, capsys: Capture) -> None:
    for verb in (["ls"], ["ls", "--long"], ["ls", "--json"], ["info", "--json"], ["info"]):
        there, here = shown(capsys, *verb, url), shown(capsys, *verb, snapshot)
        assert there == here.replace(str(snapshot), url)
    assert shown(capsys, "verify", url).startswith(f"{url}: fine: 34 stored chunks of 75")
    assert shown(capsys, "verify", "--quick", url).startswith(f"{url}: fine")


def test_verify_lists_damage_behind_a_url(s3: Bucket, snapshot: Path, capsys: Capture) -> None:
    s3.put("x.lzm", damaged(snapshot.read_bytes(), 20))
    for options in ([], ["--quick"]):
        assert run(["verify", *options, s3.url("x.lzm")]) == 1
        out = capsys.readouterr().out
        assert "DAMAGED: 1 of 34 stored chunks" in out
        assert "holds w" in out


def test_cat_and_extract_give_the_bytes_of_a_url(
    url: str, model: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert run(["cat", url, "w"]) == 0
    assert capfdbinary.readouterr() == (MODEL["w"].tobytes(), b"")
    assert run(["extract", url, str(tmp_path / "again")]) == 0
    assert (tmp_path / "again").read_bytes() == model.read_bytes()
    for form in ("npz", "npy", "safetensors"):
        assert run(["extract", "--format", form, url, str(tmp_path / f"all-{form}")]) == 0
    with np.load(tmp_path / "all-npz") as archive:
        assert {name: archive[name].tobytes() for name in archive.files} == {
            name: array.tobytes() for name, array in MODEL.items()
        }
    assert np.array_equal(np.load(tmp_path / "all-npy" / "b.npy"), MODEL["b"])
    folder = tmp_path / "all-npy"  # which exists: under their own names
    assert run(["extract", url, str(folder)]) == 0
    assert run(["extract", "--format", "npz", url, str(folder), "b"]) == 0
    assert {"model.safetensors", "model.npz"} <= set(os.listdir(folder))


def container_bytes(kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "npy":
        np.save(stream, MODEL["w"])
    elif kind == "npz":
        np.savez(stream, **MODEL)
    elif kind == "npz-compressed":
        np.savez_compressed(stream, **MODEL)
    elif kind == "safetensors":
        return save(MODEL)
    else:
        stream.write(b"some bytes of no format" * 9999)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["npy", "npz", "npz-compressed", "safetensors", "raw"])
def test_containers_are_read_and_built_from_by_url(
    s3: Bucket, tmp_path: Path, kind: str, capsys: Capture
) -> None:
    data = container_bytes(kind)
    path = tmp_path / f"x.{kind}"
    path.write_bytes(data)
    s3.put(f"x.{kind}", data)
    source = s3.url(f"x.{kind}")
    for verb in (["ls", "--json"], ["info", "--json"]):
        assert shown(capsys, *verb, source) == shown(capsys, *verb, path).replace(str(path), source)
    report = lazymem.build(source, s3.url("x.lzm"), chunk_size=CHUNK)
    assert report.exact
    assert report.path == s3.url("x.lzm")
    assert report.digest == lazymem.build(path, tmp_path / "x.lzm", chunk_size=CHUNK).digest
    assert s3.get("x.lzm") == (tmp_path / "x.lzm").read_bytes()
    assert lazymem.extract(s3.url("x.lzm"), tmp_path / "again") == [tmp_path / "again"]
    assert (tmp_path / "again").read_bytes() == data


@pytest.fixture
def shards(s3: Bucket, tmp_path: Path) -> str:
    """The URL of a folder with a model in two shards."""
    weight_map = {}
    for number, (name, array) in enumerate(MODEL.items()):
        shard = f"model-{number}.safetensors"
        s3.put(f"shards/{shard}", save({name: array}))
        weight_map[name] = shard
    s3.put("shards/model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())
    s3.put("shards/sub/other.safetensors", save({"other": np.arange(3)}))
    return s3.url("shards/")


def test_sharded_model_by_folder_or_index(s3: Bucket, shards: str, tmp_path: Path, capsys: Capture) -> None:
    for source in (shards, shards + "model.safetensors.index.json"):
        listed = [line.split()[-1] for line in shown(capsys, "ls", source).splitlines()]
        assert sorted(listed) == sorted(MODEL)
    shown(capsys, "build", shards, s3.url("built.lzm"))
    shown(capsys, "extract", s3.url("built.lzm"), tmp_path / "out")
    for name in ("model-0.safetensors", "model.safetensors.index.json"):
        assert (tmp_path / "out" / name).read_bytes() == s3.get(f"shards/{name}")
    s3.delete("shards/model.safetensors.index.json")
    assert len(shown(capsys, "ls", shards).splitlines()) == len(MODEL)  # without sub-folders
    assert "nowhere/" in refused(capsys, 3, "ls", s3.url("nowhere/"))
    s3.put("other/x.txt", b"text")
    assert "holds no .safetensors" in refused(capsys, 3, "ls", s3.url("other/"))


def test_every_reading_verb_takes_https_and_presigned_urls(
    s3: Bucket, nginx: Nginx, url: str, snapshot: Path, tmp_path: Path, capsys: Capture
) -> None:
    (nginx.root / "web.lzm").write_bytes(snapshot.read_bytes())
    signed = s3.client.generate_presigned_url(
        "get_object", Params={"Bucket": s3.bucket, "Key": "models/model.lzm"}
    )
    trust = ["-o", f"ca_bundle={nginx.certificate}"]
    for source, name, options in ((f"{nginx.tls_endpoint}/web.lzm", "web", trust), (signed, "model", [])):
        bare = source.partition("?")[0]
        assert shown(capsys, "ls", *options, source) == shown(capsys, "ls", snapshot)
        assert shown(capsys, "info", *options, source).startswith(f"{bare}\n")
        assert shown(capsys, "verify", *options, source).startswith(f"{bare}: fine")
        shown(capsys, "extract", *options, source, tmp_path / name)
        shown(capsys, "copy", *options, source, f"{tmp_path}/{name}.lzm")
        shown(capsys, "build", "--chunk-size", "64K", *options, source, tmp_path / f"{name}.again")
        assert lazymem.verify(tmp_path / f"{name}.again").digest == lazymem.verify(snapshot).digest
        for verb in ("build", "copy"):
            assert f"{bare}: http" in refused(capsys, 3, verb, *options, snapshot, source)
    s3.delete("models/model.lzm")
    for verb in ("ls", "verify", "copy"):
        said = refused(capsys, 3, verb, signed, *(["x"] if verb == "copy" else []))
        assert "Signature" not in said
        assert signed.partition("?")[0] in said


# ---- what it costs ----


def test_requests_that_looking_costs(
    s3: Bucket, proxy: HostileProxy, url: str, model: Path, shards: str, capsys: Capture
) -> None:
    s3.put("model.safetensors", model.read_bytes())
    s3.through(proxy)
    for verb in (["ls"], ["info"]):
        for source, most in ((url, 1), (s3.url("model.safetensors"), 2), (shards, 4 + 2)):
            proxy.log.clear()
            shown(capsys, *verb, source)
            assert 1 <= len(proxy.log) <= most, proxy.log
            assert {request.method for request in proxy.log} == {"GET"}


def test_one_array_costs_its_chunks_only(
    s3: Bucket, proxy: HostileProxy, url: str, tmp_path: Path, capsys: Capture
) -> None:
    s3.through(proxy)
    proxy.log.clear()
    shown(capsys, "extract", "--format", "raw", url, tmp_path / "b", "b")
    assert (tmp_path / "b").read_bytes() == MODEL["b"].tobytes()
    assert len(proxy.log) == 2
    assert sum(request.body_bytes for request in proxy.log) <= 3 * CHUNK


@pytest.fixture
def big(s3: Bucket, tmp_path: Path) -> str:
    """An object of 48 MiB that does not compress, and its snapshot; the URL of the snapshot."""
    data = RNG.integers(0, 256, 48 << 20, np.uint8)
    lazymem.build({"x": data}, tmp_path / "big.lzm", codec="none")
    s3.put("big.lzm", (tmp_path / "big.lzm").read_bytes())
    s3.put("big.bin", data.tobytes())
    return s3.url("big.lzm")


@pytest.mark.parametrize(
    "verb", ["verify", "extract", "copy", "build", "build-container", "cat", "cat-container"]
)
def test_whole_objects_are_read_several_ranges_at_a_time(
    s3: Bucket, proxy: HostileProxy, big: str, tmp_path: Path, verb: str
) -> None:
    s3.through(proxy)
    proxy.add(Fault(delay=0.2), method="GET")
    target = str(tmp_path / "out")
    work: dict[str, Callable[[], Any]] = {
        "verify": lambda: lazymem.verify(big),
        "extract": lambda: lazymem.extract(big, target, format="raw"),
        "copy": lambda: lazymem.copy(big, target),
        "build": lambda: lazymem.build(big, target, codec="none"),
        "build-container": lambda: lazymem.build(s3.url("big.bin"), target, codec="none"),
        "cat": lambda: cat(big, "x", io.BytesIO()),
        "cat-container": lambda: cat(s3.url("big.bin"), "data", io.BytesIO()),
    }
    work[verb]()
    assert most_at_once(proxy.log) >= 4
    assert len(proxy.log) <= 4 + (48 << 20) // ahead.PIECE


def most_at_once(log: list[Request]) -> int:
    """How many of the requests were under way at one moment."""
    ends = sorted(
        [(request.began, 1) for request in log] + [(request.ended or request.began, -1) for request in log]
    )
    running = most = 0
    for _, change in ends:
        running += change
        most = max(most, running)
    return most


# ---- writing ----


def test_build_to_a_url_is_the_file_it_would_be_here(
    s3: Bucket, model: Path, snapshot: Path, capsys: Capture
) -> None:
    target = s3.url("models/built.lzm")
    options = ["--chunk-size", "64K", "--metadata", "run=7"]
    assert shown(capsys, "build", *options, model, target) == ""
    assert s3.get("models/built.lzm") == snapshot.read_bytes()
    assert s3.keys() == ["models/built.lzm"]
    assert np.array_equal(lazymem.open(target).read("b"), MODEL["b"])
    # A snapshot may be built from itself.
    shown(capsys, "build", "--codec", "lz4", target, target)
    assert shown(capsys, "verify", target)


def test_build_and_copy_replace_snapshots_only(
    s3: Bucket, model: Path, snapshot: Path, capsys: Capture
) -> None:
    s3.put("x", b"precious")
    for verb, source in (("build", model), ("copy", snapshot)):
        assert "--overwrite" in refused(capsys, 3, verb, source, s3.url("x"))
        for flag in ("--no-overwrite", "--if-none-match"):
            assert "exists" in refused(capsys, 3, verb, flag, source, s3.url("x"))
        assert s3.get("x") == b"precious"
        shown(capsys, verb, "--if-none-match", source, s3.url(f"new-{verb}"))
        assert "exists" in refused(capsys, 3, verb, "--if-none-match", source, s3.url(f"new-{verb}"))
        shown(capsys, verb, source, s3.url(f"new-{verb}"))
    shown(capsys, "copy", "--overwrite", snapshot, s3.url("x"))
    assert s3.get("x") == snapshot.read_bytes()
    s3.put("empty", b"")
    shown(capsys, "copy", snapshot, s3.url("empty"))
    assert not s3.uploads()


def test_build_never_replaces_a_source_that_it_could_not_give_back(
    s3: Bucket, tmp_path: Path, capsys: Capture
) -> None:
    import zipfile

    stream, member = io.BytesIO(), io.BytesIO()
    np.save(member, np.arange(10_000) % 77)
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a.npy", member.getvalue())
    s3.put("x.npz", stream.getvalue())
    assert "is the source" in refused(capsys, 3, "build", "--overwrite", s3.url("x.npz"), s3.url("x.npz"))
    assert s3.get("x.npz") == stream.getvalue()
    assert not s3.uploads()
    assert not lazymem.build(s3.url("x.npz"), s3.url("y.lzm")).exact


def test_copy_between_stores(
    s3: Bucket, nginx: Nginx, snapshot: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = snapshot.read_bytes()
    (nginx.root / "model.lzm").write_bytes(data)
    shown(capsys, "copy", snapshot, s3.url("a.lzm"))
    shown(capsys, "copy", s3.url("a.lzm"), s3.url("folder/"))
    shown(capsys, "copy", f"{nginx.endpoint}/model.lzm?ignored=1", s3.url("from/web/"))
    shown(capsys, "copy", s3.url("from/web/model.lzm"), tmp_path / "back.lzm")
    assert s3.get("folder/a.lzm") == s3.get("from/web/model.lzm") == data
    assert (tmp_path / "back.lzm").read_bytes() == data
    raw = bytes(ahead.PIECE) + RNG.bytes(3 * ahead.PIECE + 1)
    s3.put("raw", raw)
    shown(capsys, "copy", s3.url("raw"), s3.url("raw again"))
    assert s3.get("raw again") == raw
    s3.put("nothing", b"")
    shown(capsys, "copy", s3.url("nothing"), tmp_path / "nothing")
    assert (tmp_path / "nothing").read_bytes() == b""
    assert "is the source" in refused(capsys, 2, "copy", s3.url("raw"), s3.url("raw"))


def test_copy_with_other_options_for_the_destination(
    s3: Bucket, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put("a.lzm", snapshot.read_bytes())
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    nowhere = {"endpoint_url": "http://127.0.0.1:9", "timeout": 0.5}
    here = {"endpoint_url": s3.endpoint}
    lazymem.copy(s3.url("a.lzm"), s3.url("b.lzm"), storage_options=here)
    lazymem.copy(snapshot, s3.url("c.lzm"), storage_options=nowhere, destination_options=here)
    assert s3.get("b.lzm") == s3.get("c.lzm") == snapshot.read_bytes()
    assert run(
        ["copy", "-o", f"endpoint_url={s3.endpoint}", "--destination-option", f"endpoint_url={s3.endpoint}",
         s3.url("a.lzm"), s3.url("d.lzm")]
    ) == 0  # fmt: skip


def test_copy_does_not_carry_damage_on_nor_leave_parts(s3: Bucket, big: str, tmp_path: Path) -> None:
    s3.put("bad.lzm", damaged((tmp_path / "big.lzm").read_bytes(), 20))
    with pytest.raises(ChunkCorrupt, match=r"s3://.*bad\.lzm: chunk 20 "):
        lazymem.copy(s3.url("bad.lzm"), s3.url("copy.lzm"))
    assert not s3.uploads()
    assert not written(s3, "copy.lzm")
    with pytest.raises(ChunkCorrupt):
        lazymem.build(s3.url("bad.lzm"), s3.url("copy.lzm"), codec="lz4")
    assert not s3.uploads()
    assert not written(s3, "copy.lzm")


@pytest.mark.parametrize("verb", ["copy", "build", "verify", "extract"])
def test_object_replaced_meanwhile_is_never_a_mixture(
    s3: Bucket, big: str, tmp_path: Path, verb: str
) -> None:
    def replace(done: int, total: int | None) -> None:
        if not replaced:
            replaced.append(True)
            s3.put("big.lzm", bytes(len(s3.get("big.lzm"))))

    replaced: list[bool] = []
    work: dict[str, Callable[[], Any]] = {
        "copy": lambda: lazymem.copy(big, s3.url("out"), progress=replace),
        "build": lambda: lazymem.build(big, s3.url("out"), codec="none", progress=replace),
        "verify": lambda: lazymem.verify(big, threads=1, progress=replace),
        "extract": lambda: lazymem.extract(big, tmp_path / "out", format="raw", progress=replace),
    }
    # All that is left to read when the first bytes are through must be more than what is read ahead.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "PIECE", 1 << 20)
        patch.setattr(verifier, "_BATCH_BYTES", 1 << 20)
        patch.setattr(verifier, "_WAITING", 1)
        with pytest.raises(SnapshotChanged, match=r"big\.lzm"):
            work[verb]()
    assert not s3.uploads()
    assert not written(s3, "out")
    assert not (tmp_path / "out").exists()


def test_errors_are_one_sentence_each(
    s3: Bucket, url: str, snapshot: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for verb in ("ls", "info", "verify"):
        assert s3.url("none.lzm") in refused(capsys, 3, verb, s3.url("none.lzm"))
        assert "no-such-bucket" in refused(capsys, 3, verb, "s3://no-such-bucket/x.lzm")
    assert "no-such-bucket" in refused(capsys, 3, "build", snapshot, "s3://no-such-bucket/x.lzm")
    assert "no-such-bucket" in refused(capsys, 3, "copy", snapshot, "s3://no-such-bucket/x.lzm")
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong" + secret[5:])
    for args in (["ls", url], ["verify", url], ["copy", url, "x"], ["build", snapshot, s3.url("y")],
                 ["copy", "--overwrite", snapshot, s3.url("y")]):  # fmt: skip
        assert secret[5:] not in refused(capsys, 3, *args)
    assert not s3.uploads()


def test_hostile_network_changes_no_byte(s3: Bucket, proxy: HostileProxy, big: str, tmp_path: Path) -> None:
    s3.through(proxy)
    proxy.add(Fault(reset=100_000), method="GET", probability=0.1, seed=1)
    proxy.add(Fault(status=503, code="SlowDown"), method="GET", probability=0.1, seed=2)
    proxy.add(Fault(status=503, code="SlowDown"), method="PUT", probability=0.1, seed=3)
    lazymem.copy(big, s3.url("copy.lzm"))
    assert s3.get("copy.lzm") == (tmp_path / "big.lzm").read_bytes()
    assert lazymem.verify(s3.url("copy.lzm")).ok
    assert any(request.fault for request in proxy.log)


def test_destination_that_may_not_be_looked_at(
    s3: Bucket, proxy: HostileProxy, model: Path, capsys: Capture
) -> None:
    s3.through(proxy)
    proxy.add(Fault(status=403, code="AccessDenied"), method="GET")
    said = refused(capsys, 3, "build", model, s3.url("x.lzm"))
    assert "nobody can tell what would be replaced" in said
    assert "--if-none-match" in said
    assert not s3.keys()
    shown(capsys, "build", "--if-none-match", model, s3.url("x.lzm"))
    shown(capsys, "build", "--overwrite", model, s3.url("x.lzm"))
    assert s3.keys() == ["x.lzm"]


def test_whole_file_work_leaves_the_cache_alone(
    s3: Bucket, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYMEM_CACHE_DIR", str(tmp_path / "cache"))
    assert lazymem.verify(url).ok
    lazymem.extract(url, tmp_path / "out.safetensors")
    lazymem.copy(url, tmp_path / "out.lzm")
    lazymem.build(url, tmp_path / "built.lzm")
    assert cat(url, "b", io.BytesIO()) == MODEL["b"].nbytes
    assert not (tmp_path / "cache").exists()
    lazymem.verify(url, cache=tmp_path / "cache")
    assert (tmp_path / "cache").exists()


# ---- as a process ----


def noise(length: int) -> Iterator[bytes]:
    """Bytes that do not compress, 1 MiB at a time, made quickly: a block, each time turned by another key."""
    block = RNG.integers(0, 256, 1 << 20, np.uint8)
    for number in range(length >> 20):
        yield (block ^ np.uint8(hashlib.sha256(number.to_bytes(8, "little")).digest()[0])).tobytes()


def feed(process: subprocess.Popen[bytes], pieces: Iterator[bytes]) -> None:
    assert process.stdin is not None
    for piece in pieces:
        process.stdin.write(piece)
    process.stdin.flush()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_build_ended_by_a_signal_while_it_uploads_leaves_no_parts(s3: Bucket, number: int, code: int) -> None:
    process = subprocess.Popen(
        [*COMMAND, "build", "--codec", "none", "-", s3.url("x.lzm")],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        feeder = threading.Thread(target=feed, args=(process, noise(64 << 20)))
        feeder.start()
        feeder.join(TIMEOUT)  # then it waits for more, parts of it sent
        wait_until(s3.uploads)
        process.send_signal(number)
        _, err = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == code
    assert b"Traceback" not in err
    assert s3.uploads() == []
    assert s3.keys() == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_copy_ended_by_a_signal_while_the_store_is_silent_ends(
    s3: Bucket, proxy: HostileProxy, big: str, number: int, code: int
) -> None:
    s3.through(proxy)
    # The first requests look and read the index; then nothing more comes.
    stuck = proxy.add(
        Fault(stall=1000), method="GET", where=lambda request: request.range is not None, skip=2
    )
    process = subprocess.Popen(
        [*COMMAND, "copy", "-o", "timeout=600", "-o", "attempt_timeout=600", big, s3.url("out.lzm")],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        wait_until(lambda: stuck.matched >= 4)
        process.send_signal(number)
        _, err = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == code
    assert b"Traceback" not in err
    assert s3.uploads() == []
    assert not written(s3, "out.lzm")


MEASURED = """
import sys
from lazymem.cli import run
code = run(sys.argv[1:])
# Not getrusage: that counts what the process was before it became this program.
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
sys.exit(code)
"""


def peak_of(arguments: list[str], pieces: Iterator[bytes]) -> int:
    """Most memory that the command had resident, in bytes; its standard input is `pieces`."""
    process = subprocess.Popen(
        [sys.executable, "-c", MEASURED, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        feed(process, pieces)
        out, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 0
    return int(out) * 1024


def test_build_and_copy_of_much_need_little_memory(s3: Bucket) -> None:
    size = 500 << 20
    peak = peak_of(["build", "--threads", "2", "-", s3.url("x.lzm")], noise(size))
    assert peak < size / 2, peak
    peak = peak_of(["copy", s3.url("x.lzm"), s3.url("y.lzm")], iter(()))
    assert peak < 3 * size / 4, peak
    objects = s3.client.list_objects_v2(Bucket=s3.bucket)["Contents"]
    assert {item["Key"] for item in objects} == {"x.lzm", "y.lzm"}
    assert all(item["Size"] > 0.9 * size for item in objects)
    assert summarize(s3.url("y.lzm")).array_bytes == size


def test_build_of_much_tells_progress_on_a_terminal(s3: Bucket, tmp_path: Path) -> None:
    from .test_cli_process import on_terminal

    np.save(tmp_path / "x.npy", RNG.standard_normal(1_000_000))
    for args in (["build", tmp_path / "x.npy", s3.url("x.lzm")], ["copy", s3.url("x.lzm"), s3.url("y.lzm")],
                 ["verify", s3.url("x.lzm")], ["extract", s3.url("x.lzm"), tmp_path / "y.npy"]):  # fmt: skip
        code, text = on_terminal(*args)
        assert code == 0, text
        assert "\x1b[2K" in text  # the bar, drawn and wiped away
