# SPDX-License-Identifier: Apache-2.0
"""A network that does its worst: right bytes, or a named error within the deadline. No hang, no zeros.

Each child process goes through a proxy of ours to a real S3 server; see tests/servers/mischief.py for
what it can do.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import lazymem

from ..servers.proxy import Fault, Request
from .network import Child, check, wait_until

if TYPE_CHECKING:
    from ..servers.proxy import HostileProxy
    from ..servers.radosgw import RadosGateway
    from ..servers.s3 import Bucket

KEY = "model.lzm"
# Small ranges, so that there are many requests for the network to spoil.
PATIENT = {"timeout": 60, "attempt_timeout": 1.5, "coalesce_size": 256 * 1024}
HASTY = {"timeout": 4, "attempt_timeout": 2}  # a loaded machine opens in a second


@pytest.fixture
def url(s3: Bucket, proxy: HostileProxy, snapshot_path: Path) -> str:
    """A snapshot of some four hundred chunks, seen through the proxy."""
    s3.put(KEY, snapshot_path.read_bytes())
    s3.through(proxy)
    return s3.url(KEY)


def of_chunks(request: Request) -> bool:
    """Not the first request, for the object's last bytes."""
    return request.range is not None and not request.range.startswith("bytes=-")


# ---- what passes ----

PASSING: dict[str, tuple[Fault, dict[str, Any]]] = {
    "latency": (Fault(delay=0.02, jitter=0.3), {}),
    "slow": (Fault(rate=2 << 20), {}),
    "reset in mid-body": (Fault(reset=20_000), {"probability": 0.3}),
    "reset at once": (Fault(reset=0), {"probability": 0.3}),
    "truncated": (Fault(truncate=20_000), {"probability": 0.3}),
    "stalled": (Fault(stall=20_000), {"probability": 0.1}),
    "no answer": (Fault(silence=True), {"probability": 0.1}),
    "garbage": (Fault(garbage=b"SSH-2.0-OpenSSH_9.2\r\n\x00\xff"), {"probability": 0.2}),
    "500 burst": (Fault(status=500), {"times": 8, "skip": 2}),
    "503 now and then": (Fault(status=503, code="SlowDown"), {"probability": 0.4}),
    "429 with a date": (Fault(status=429, code="TooManyRequests", retry_after=1), {"times": 4, "skip": 1}),
    "flipped bit": (Fault(flip=1000), {"probability": 0.1, "where": of_chunks}),
}

SCAN = """
snap = opened()
print(wrong(snap), set(snap.chunk_states()) <= {2})
snap.close()
"""


@pytest.mark.parametrize("condition", PASSING)
def test_right_bytes_in_spite_of(condition: str, proxy: HostileProxy, url: str) -> None:
    fault, rule = PASSING[condition]
    rule = proxy.add(fault, **rule)
    assert check(SCAN, url, json.dumps(PATIENT)) == ["[] True"]
    assert rule.matched > 0


@pytest.mark.parametrize("client", ["boto3", "obstore"])
def test_right_bytes_through_other_clients(client: str, proxy: HostileProxy, url: str) -> None:
    for number, name in enumerate(("reset in mid-body", "truncated", "503 now and then", "flipped bit")):
        fault, rule = PASSING[name]
        proxy.add(fault, **{**rule, "probability": 0.1, "seed": number})
    assert check(SCAN, url, json.dumps({**PATIENT, "client": client})) == ["[] True"]


def test_right_bytes_in_spite_of_everything_at_once(proxy: HostileProxy, url: str) -> None:
    for number, (fault, rule) in enumerate(PASSING.values()):
        if "probability" in rule:
            proxy.add(fault, **{**rule, "probability": 0.05, "seed": number})
    assert check(SCAN, url, json.dumps(PATIENT)) == ["[] True"]


@pytest.mark.parametrize("headers", [
    {"content-range": "bytes 0-9/10"}, {"content-range": None}, {"content-range": "bytes 9-0/-1"},
    {"content-range": "bytes 0-99999999999999999999/999999999999999999999"}, {"content-range": "nonsense"},
    {"content-length": "7"}, {"content-length": "-1"}, {"content-length": "1e3"}, {"content-length": None},
    {"etag": '"another"'}, {"etag": None}, {"transfer-encoding": "chunked"}, {"content-encoding": "gzip"},
])  # fmt: skip
def test_right_bytes_or_a_named_error_where_an_answer_contradicts_itself(
    headers: dict[str, str | None], proxy: HostileProxy, url: str
) -> None:
    rule = proxy.add(Fault(headers=headers), where=of_chunks, probability=0.2)
    code = """
    snap = opened()
    error = error_of(snap.prefetch, wait=True)
    print(error if error != "no error" else wrong(snap))
    """
    (told,) = check(code, url, json.dumps({**PATIENT, "timeout": 3}))
    if told != "[]":
        assert told.split(":")[0] in ("ReadError", "SnapshotChanged"), told
        assert url in told
    assert rule.matched > 0


@pytest.mark.parametrize("headers", [
    {"content-range": "bytes 0-9/10"}, {"content-range": "bytes 0-0/0"}, {"content-range": None},
    {"content-range": "bytes 0-9/99999999999999999999999"}, {"content-length": "99999999999999999999"},
    {"content-length": "0"}, {"etag": None}, {"etag": "x" * 60_000},
])  # fmt: skip
def test_open_of_an_answer_that_contradicts_itself(
    headers: dict[str, str | None], proxy: HostileProxy, url: str
) -> None:
    proxy.add(Fault(headers=headers))
    (told,) = check("print(error_of(opened))", url, json.dumps(HASTY))
    if told != "no error":  # without an ETag another way to tell versions may be found
        assert told.split(":")[0] in ("ReadError", "SnapshotChanged", "FormatError"), told
        assert url in told
        assert len(told) < 3000


# ---- what does not pass ----

#: What an error must say, beside the URL.
LASTING: dict[str, tuple[Fault, str, tuple[str, ...]]] = {
    "500": (Fault(status=500), "ReadError", ("500", "attempt")),
    "503": (Fault(status=503, code="SlowDown"), "ReadError", ("503", "attempt")),
    "reset": (Fault(reset=0), "ReadError", ("attempt",)),
    "truncated": (Fault(truncate=5), "ReadError", ("attempt",)),
    "stalled": (Fault(stall=5), "ReadError", ("attempt",)),
    "no answer": (Fault(silence=True), "ReadError", ("attempt",)),
    "garbage": (Fault(garbage=b"\x00\x01\x02\x03\r\n\r\n"), "ReadError", ("attempt",)),
    "flipped bit": (Fault(flip=1000), "ChunkCorrupt", ("checksum",)),
    "forbidden": (Fault(status=403, code="AccessDenied"), "AccessDenied", ("AccessDenied",)),
    "gone": (Fault(status=404, code="NoSuchKey"), "SnapshotNotFound", ()),
}

TOUCH_AFTER_ERROR = """
snap = opened()
tell("opened")
wait()
tell(error_of(snap.prefetch, "fortran", wait=True))
pid = os.fork() if sys.argv[3] == "fork" else 0
if pid == 0:
    tell(float(snap["fortran"][0, 0]))
    os._exit(0)
tell(os.WTERMSIG(os.waitpid(pid, 0)[1]))
wait()
snap.prefetch(wait=True)
tell(wrong(snap))
snap.close()
"""


@pytest.mark.parametrize("condition", LASTING)
def test_named_error_sigbus_after_a_line_and_healing(condition: str, proxy: HostileProxy, url: str) -> None:
    fault, error, parts = LASTING[condition]
    # The one who touches is the child of a fork, so that the other can go on when the network heals.
    with Child(TOUCH_AFTER_ERROR, url, json.dumps(HASTY), "fork") as child:
        assert child.hear() == "opened"
        proxy.add(fault, where=of_chunks)
        child.say()
        told = child.hear()
        assert told.startswith(f"{error}: "), told
        assert url in told
        assert all(part in told for part in parts), told
        assert child.hear() == str(int(signal.SIGBUS))
        proxy.heal()
        child.say()
        assert child.hear() == "[]"
        assert child.finish() == 0
        assert child.stderr.count("\n") == 1
        assert url in child.stderr
        assert "chunk" in child.stderr
        assert all(part in child.stderr for part in parts), child.stderr


def test_touch_in_the_process_that_opened_is_sigbus(proxy: HostileProxy, url: str) -> None:
    with Child(TOUCH_AFTER_ERROR, url, json.dumps(HASTY), "no fork") as child:
        assert child.hear() == "opened"
        proxy.down()
        child.say()
        told = child.hear()
        assert told.startswith(f"ReadError: {url}"), told
        assert "refuses connections" in told
        assert child.finish() == -signal.SIGBUS
        assert child.stderr.count("\n") == 1
        assert url in child.stderr
        assert "refuses connections" in child.stderr
    proxy.up()


@pytest.mark.parametrize("condition", [*LASTING, "down"])
def test_open_raises_what_the_store_says(condition: str, proxy: HostileProxy, url: str) -> None:
    if condition == "down":
        proxy.down()
        error, parts = "ReadError", ("refuses connections",)
    else:
        fault, error, parts = LASTING[condition]
        if condition == "flipped bit":  # of the index, here; its own checksum says so
            fault, error, parts = Fault(flip=64 * 1024 - 1000), "FormatError", ()
        proxy.add(fault)
    (told,) = check("print(error_of(opened))", url, json.dumps(HASTY))
    assert told.startswith(f"{error}: "), told
    assert url in told
    assert all(part in told for part in parts), told
    if condition == "down":
        proxy.up()


def test_an_answer_that_never_comes_at_all_is_an_error_in_time(proxy: HostileProxy, url: str) -> None:
    """Not even connections are taken: the kernel accepts them and nobody reads."""
    proxy.add(Fault(silence=True))
    (told,) = check("print(error_of(opened))", url, json.dumps({"timeout": 3, "attempt_timeout": 30}))
    assert told.startswith(f"ReadError: {url}")
    assert "timeout" in told


# ---- endpoint down ----


def test_an_endpoint_that_is_down_for_ten_seconds_is_waited_for(proxy: HostileProxy, url: str) -> None:
    code = """
    snap = opened()
    tell("opened")
    wait()
    tell("touching")
    tell(wrong(snap))
    snap.close()
    """
    with Child(code, url, json.dumps(PATIENT)) as child:
        assert child.hear() == "opened"
        proxy.down()
        child.say()
        assert child.hear() == "touching"
        time.sleep(10)
        proxy.up()
        assert child.hear() == "[]"
        assert child.finish() == 0


def test_an_endpoint_that_goes_down_in_mid_scan_is_waited_for(proxy: HostileProxy, url: str) -> None:
    proxy.add(Fault(delay=0.05, rate=4 << 20))
    code = """
    snap = opened()
    tell(wrong(snap))
    snap.close()
    """
    with Child(code, url, json.dumps(PATIENT)) as child:
        for count in (3, 8):
            wait_until(lambda count=count: len(proxy.requests(key=KEY)) > count)
            proxy.down()
            time.sleep(1)
            proxy.up()
        assert child.hear() == "[]"
        assert child.finish() == 0


# ---- another object under the same name ----

REPLACED = """
snap = opened()
old = {name: expected[name] for name in expected}
tell("opened")
wait()
for name in snap:
    try:
        data = snap.read(name)
    except SnapshotChanged as error:
        assert url in str(error), error
        tell("changed")
        break
    assert np.array_equal(data, old[name]), name
else:
    tell("all old")
tell(error_of(snap.prefetch, wait=True).split(":")[0])
snap.close()
"""


@pytest.fixture(scope="module")
def other_snapshot(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The same names, shapes and chunks; other bytes."""
    from ..arrays import CHUNK, make_arrays

    path = tmp_path_factory.mktemp("other") / KEY
    lazymem.build(make_arrays(seed=1), path, codec="zstd", chunk_size=CHUNK)
    return path.read_bytes()


def test_an_object_replaced_while_open_is_never_mixed(
    s3: Bucket, proxy: HostileProxy, url: str, other_snapshot: bytes
) -> None:
    with Child(REPLACED, url, json.dumps(PATIENT)) as child:
        assert child.hear() == "opened"
        s3.put(KEY, other_snapshot)
        child.say()
        assert child.hear() == "changed"
        assert child.hear() == "SnapshotChanged"
        assert child.finish() == 0


def test_an_object_replaced_in_mid_scan_is_never_mixed(
    s3: Bucket, proxy: HostileProxy, url: str, other_snapshot: bytes
) -> None:
    proxy.add(Fault(delay=0.02, rate=8 << 20))
    with Child(REPLACED, url, json.dumps(PATIENT)) as child:
        assert child.hear() == "opened"
        child.say()
        wait_until(lambda: len(proxy.requests(key=KEY)) > 4)
        s3.put(KEY, other_snapshot)
        assert child.hear() in ("changed", "all old")
        assert child.hear() in ("SnapshotChanged", "no error")
        assert child.finish() == 0


@pytest.mark.parametrize("lie", ["ignores if-match", "ignores it and forges the etag"])
def test_a_server_that_does_not_compare_versions_cannot_mix_them(
    lie: str, s3: Bucket, proxy: HostileProxy, url: str, other_snapshot: bytes
) -> None:
    etag = s3.client.head_object(Bucket=s3.bucket, Key=KEY)["ETag"]
    code = """
    snap = opened()
    tell("opened")
    wait()
    tell(error_of(snap.prefetch, wait=True).split(":")[0])
    """
    with Child(code, url, json.dumps(PATIENT)) as child:
        assert child.hear() == "opened"
        forged = {"etag": etag} if "forges" in lie else {}
        size = len(s3.get(KEY))
        s3.put(KEY, other_snapshot[:size].ljust(size, b"\0"))  # of the same size, too
        proxy.add(Fault(forget=("if-match",), headers=forged))
        child.say()
        assert child.hear() == ("ChunkCorrupt" if forged else "SnapshotChanged")
        assert child.finish() == 0


def test_an_object_deleted_while_open_is_named(s3: Bucket, proxy: HostileProxy, url: str) -> None:
    code = """
    snap = opened()
    tell("opened")
    wait()
    tell(error_of(snap.prefetch, wait=True))
    snap["layer.3.weight"].sum()
    """
    with Child(code, url, json.dumps(PATIENT)) as child:
        assert child.hear() == "opened"
        s3.delete(KEY)
        child.say()
        told = child.hear()
        assert told.split(":")[0] in ("SnapshotNotFound", "SnapshotChanged"), told
        assert url in told
        assert child.finish() == -signal.SIGBUS
        assert url in child.stderr


# ---- credentials ----


def test_credentials_that_end_while_open_are_named_and_may_come_back(
    s3_server: RadosGateway, s3: Bucket, proxy: HostileProxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = s3_server.new_user()
    s3.client.put_bucket_policy(
        Bucket=s3.bucket,
        Policy=json.dumps(
            {
                "Version": "2012-10-17",
                "Statement": [
                    {
                        "Effect": "Allow",
                        "Principal": {"AWS": [f"arn:aws:iam:::user/{s3_server.user_of(user)}"]},
                        "Action": ["s3:GetObject", "s3:ListBucket"],
                        "Resource": [f"arn:aws:s3:::{s3.bucket}", f"arn:aws:s3:::{s3.bucket}/*"],
                    }
                ],
            }
        ),
    )
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", user.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", user.secret_key)
    code = """
    snap = opened()
    tell("opened")
    wait()
    tell(error_of(snap.prefetch, "fortran", wait=True))
    wait()
    tell(wrong(snap))
    snap.close()
    """
    with Child(code, url, json.dumps(PATIENT)) as child:
        assert child.hear() == "opened"
        s3_server.change_secret(user, "the/former+one=expired")
        child.say()
        told = child.hear()
        assert told.startswith("AccessDenied: "), told
        assert url in told
        assert user.secret_key not in told
        s3_server.change_secret(user, user.secret_key)
        child.say()
        assert child.hear() == "[]"
        assert child.finish() == 0


@pytest.mark.parametrize("status", [400, 403])
def test_a_token_that_has_expired_is_not_waited_for(status: int, proxy: HostileProxy, url: str) -> None:
    """Amazon answers 400 with that code; others 403."""
    with Child(TOUCH_AFTER_ERROR, url, json.dumps(PATIENT), "fork") as child:
        assert child.hear() == "opened"
        proxy.add(Fault(status=status, code="ExpiredToken"))
        child.say()
        told = child.hear()
        assert told.startswith("AccessDenied: "), told
        assert url in told
        assert "xpired" in told
        assert child.hear() == str(int(signal.SIGBUS))
        proxy.heal()
        child.say()
        assert child.hear() == "[]"
        assert child.finish() == 0


# ---- nothing stays behind ----

LEAK = """
def count():
    both = ("self", fetcher_pid())
    return [len(os.listdir(f"/proc/{process}/{kind}")) for process in both for kind in ("fd", "task")]

def round():
    snap = opened()
    try:
        snap.prefetch("ids", wait=True)
    except LazymemError:
        pass
    snap.close()
    del snap
    gc.collect()

round()
tell("warm")
wait()
for _ in range(2):
    round()
before = count()
for _ in range(6):
    round()
after = count()
tell(json.dumps([before, after]))
"""


@pytest.mark.parametrize("condition", ["reset in mid-body", "stalled", "no answer", "500", "flipped bit"])
def test_failures_leave_no_descriptors_or_threads(condition: str, proxy: HostileProxy, url: str) -> None:
    fault = PASSING[condition][0] if condition in PASSING else LASTING[condition][0]
    options = {**HASTY, "coalesce_size": 256 * 1024}
    with Child(LEAK, url, json.dumps(options)) as child:
        assert child.hear() == "warm"
        proxy.add(fault, where=of_chunks, probability=0.5)
        child.say()
        before, after = json.loads(child.hear())
        assert child.finish() == 0
    assert after[:2] == before[:2]
    # The fetcher keeps connections for the next question, and a few threads: a limit, not one a failure.
    assert all(late <= early + 16 for early, late in zip(before[2:], after[2:], strict=True)), (before, after)
    wait_until(lambda: proxy.connections == 0)


def test_arrays_read_from_the_network_equal_those_of_the_file(url: str, snapshot_path: Path) -> None:
    """That the tests above compare with the right thing."""
    from ..arrays import make_arrays

    with lazymem.open(snapshot_path) as snap:
        expected = make_arrays()
        assert all(np.array_equal(snap[name], expected[name]) for name in expected)
