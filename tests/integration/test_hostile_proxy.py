# SPDX-License-Identifier: Apache-2.0
"""The hostile network itself: a test that relies on it must know that it does what it was told."""

from __future__ import annotations

import contextlib
import http.client
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from ..servers.proxy import Fault, HostileProxy

if TYPE_CHECKING:
    from ..servers.s3 import Bucket

DATA = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def target(s3: Bucket) -> str:
    """A path that anybody who has it may read."""
    s3.put("data", DATA)
    url = urlsplit(s3.client.generate_presigned_url("get_object", {"Bucket": s3.bucket, "Key": "data"}))
    return f"{url.path}?{url.query}"


@contextlib.contextmanager
def connected(proxy: HostileProxy, timeout: float = 30) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=timeout)
    try:
        yield connection
    finally:
        connection.close()


def ask(connection: http.client.HTTPConnection, s3: Bucket, target: str, **headers: str) -> tuple[int, bytes]:
    # The signature was made for the server's own name.
    connection.request("GET", target, headers={"Host": urlsplit(s3.endpoint).netloc, **headers})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_without_rules_requests_pass_unchanged_and_are_counted(
    s3: Bucket, proxy: HostileProxy, target: str
) -> None:
    with connected(proxy) as connection:
        assert ask(connection, s3, target) == (200, DATA)
        assert ask(connection, s3, target, Range="bytes=5-9") == (206, DATA[5:10])
        assert ask(connection, s3, target, **{"If-Match": '"other"'})[0] == 412
        assert proxy.connections == 1  # kept alive
    first, second, third = proxy.requests("GET", key="data")
    assert (first.status, first.body_bytes, first.range) == (200, len(DATA), None)
    assert (second.status, second.body_bytes, second.range) == (206, 5, "bytes=5-9")
    assert (third.status, third.if_match) == (412, '"other"')
    assert first.ended is not None
    assert first.ended >= first.began
    signature = first.query["Signature" if "Signature" in first.query else "X-Amz-Signature"]
    assert signature not in f"{first} {first!r}"


def test_what_boto3_sends_passes(s3: Bucket, proxy: HostileProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    s3.through(proxy)
    client = boto3.client("s3")
    body = bytes(6 << 20)
    upload = client.create_multipart_upload(Bucket=s3.bucket, Key="big")["UploadId"]
    parts = [
        {"PartNumber": n, "ETag": client.upload_part(
            Bucket=s3.bucket, Key="big", PartNumber=n, UploadId=upload, Body=body)["ETag"]}
        for n in (1, 2)
    ]  # fmt: skip
    client.complete_multipart_upload(
        Bucket=s3.bucket, Key="big", UploadId=upload, MultipartUpload={"Parts": parts}
    )
    listed = client.list_objects_v2(Bucket=s3.bucket)["Contents"]
    client.close()
    assert [(item["Key"], item["Size"]) for item in listed] == [("big", 12 << 20)]
    assert len(proxy.requests("PUT", key="big")) == 2


def test_status_bursts_end(s3: Bucket, proxy: HostileProxy, target: str) -> None:
    proxy.add(Fault(status=503, code="SlowDown", retry_after=7), times=2, skip=1)
    with connected(proxy) as connection:
        assert [ask(connection, s3, target)[0] for _ in range(4)] == [200, 503, 503, 200]
        proxy.add(Fault(status=503, code="SlowDown", retry_after=7))
        connection.request("GET", target)
        answer = connection.getresponse()
        assert answer.getheader("Retry-After") == "7"
        assert b"SlowDown" in answer.read()
    assert [request.status for request in proxy.log] == [200, 503, 503, 200, 503]


def test_rules_choose_their_requests(s3: Bucket, proxy: HostileProxy, target: str) -> None:
    proxy.add(Fault(status=500), ranged=True, where=lambda request: request.range == "bytes=0-0")
    proxy.add(Fault(status=429), method="PUT")
    with connected(proxy) as connection:
        assert ask(connection, s3, target)[0] == 200
        assert ask(connection, s3, target, Range="bytes=0-1")[0] == 206
        assert ask(connection, s3, target, Range="bytes=0-0")[0] == 500
        proxy.heal()
        assert ask(connection, s3, target, Range="bytes=0-0")[0] == 206
        proxy.add(Fault(status=500), probability=0.5, seed=3)
        statuses = [ask(connection, s3, target, Range="bytes=0-0")[0] for _ in range(40)]
    assert 8 < statuses.count(500) < 32


def test_a_flipped_bit_is_one_bit(s3: Bucket, proxy: HostileProxy, target: str) -> None:
    proxy.add(Fault(flip=700_001))
    with connected(proxy) as connection:
        _, data = ask(connection, s3, target)
    assert [at for at in range(len(DATA)) if data[at] != DATA[at]] == [700_001]
    assert data[700_001] ^ DATA[700_001] == 1


def test_headers_are_replaced_and_taken_away(s3: Bucket, proxy: HostileProxy, target: str) -> None:
    proxy.add(Fault(headers={"etag": '"forged"', "accept-ranges": None}))
    with connected(proxy) as connection:
        connection.request("GET", target, headers={"Host": urlsplit(s3.endpoint).netloc})
        answer = connection.getresponse()
        answer.read()
    assert answer.getheader("ETag") == '"forged"'
    assert answer.getheader("Accept-Ranges") is None


def test_bodies_are_cut_short(s3: Bucket, proxy: HostileProxy, target: str) -> None:
    proxy.add(Fault(truncate=100_000), times=1)
    proxy.add(Fault(reset=100_000), times=1)
    with connected(proxy) as connection, pytest.raises(http.client.IncompleteRead) as caught:
        ask(connection, s3, target)
    assert caught.value.partial == DATA[:100_000]
    with connected(proxy) as connection, pytest.raises(ConnectionResetError):
        ask(connection, s3, target)
    assert [request.body_bytes for request in proxy.log] == [100_000, 100_000]


def test_a_stall_lasts_until_the_client_gives_up(s3: Bucket, proxy: HostileProxy, target: str) -> None:
    proxy.add(Fault(stall=1000), times=1)
    proxy.add(Fault(silence=True), times=1)
    for _ in range(2):
        with connected(proxy, timeout=0.3) as connection, pytest.raises(TimeoutError):
            ask(connection, s3, target)
    with connected(proxy) as connection:
        assert ask(connection, s3, target)[0] == 200
    assert [(request.status, request.body_bytes) for request in proxy.log] == [
        (200, 1000),
        (None, 0),
        (200, len(DATA)),
    ]


def test_garbage_is_no_http(s3: Bucket, proxy: HostileProxy, target: str) -> None:
    proxy.add(Fault(garbage=b"\x16\x03\x01 this is not the server you are looking for\r\n\r\n"))
    with connected(proxy) as connection, pytest.raises(http.client.BadStatusLine):
        ask(connection, s3, target)


def test_latency_and_rate_take_their_time(s3: Bucket, proxy: HostileProxy, target: str) -> None:
    proxy.add(Fault(delay=0.3, jitter=0.1, rate=4 << 20))
    with connected(proxy) as connection:
        began = time.monotonic()
        assert ask(connection, s3, target) == (200, DATA)
    assert time.monotonic() - began >= 0.3 + 0.25  # never less than was asked for


def test_an_endpoint_goes_down_and_comes_back(s3: Bucket, proxy: HostileProxy, target: str) -> None:
    with connected(proxy) as connection:
        assert ask(connection, s3, target)[0] == 200
        for _ in range(3):
            proxy.down()
            with pytest.raises(ConnectionResetError):
                ask(connection, s3, target)
            connection.close()
            with pytest.raises(ConnectionRefusedError):
                connection.connect()
            proxy.up()
            assert ask(connection, s3, target) == (200, DATA)


def test_stopping_ends_what_hangs(s3: Bucket, proxy: HostileProxy, target: str) -> None:
    proxy.add(Fault(stall=10))
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(connected(proxy))
            connection.request("GET", target, headers={"Host": urlsplit(s3.endpoint).netloc})
        while [request.body_bytes for request in proxy.requests()] != [10, 10, 10]:
            time.sleep(0.01)
        proxy.stop()  # a thread that is left would block here
    assert proxy.connections == 0
