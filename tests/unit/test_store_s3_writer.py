# SPDX-License-Identifier: Apache-2.0
"""Uploads to a server that damages, forgets, refuses and loses: the object is there, or an error says why."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lazymem.errors import AccessDenied, BuildError, LazymemError
from lazymem.options import StoreOptions
from lazymem.store import aws
from lazymem.store.base import Store
from lazymem.store.remote import store_for
from lazymem.store.s3_writer import MEMORY, PARTS_MOST, part_size

from .raw_server import Asked, Hangup, RawServer, answer

MIB = 1 << 20


def error(status: str, code: str) -> bytes:
    return answer(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())


def etag_of(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


class FakeS3:
    """Just enough of S3 for one object. spoil: gets the operation's name; may answer instead, or raise."""

    def __init__(self) -> None:
        self.parts: dict[int, bytes] | None = None  # of the upload that is under way
        self.object: bytes | None = None
        self.etag = ""
        self.done: list[str] = []
        self.spoil: Callable[[str, Asked], bytes | None] = lambda name, asked: None
        self._lock = threading.Lock()

    def __call__(self, asked: Asked) -> bytes:
        query = asked.target.partition("?")[2]
        number = re.search(r"partNumber=(\d+)", query)
        name = {
            "HEAD": "head",
            "DELETE": "abort",
            "POST": "begin" if "uploads" in query else "complete",
            "PUT": "part" if number else "put",
        }[asked.method]
        with self._lock:
            self.done.append(name)
        spoilt = self.spoil(name, asked)
        return spoilt if spoilt is not None else getattr(self, name)(asked, int(number[1]) if number else 0)

    def head(self, asked: Asked, number: int) -> bytes:
        if self.object is None:
            return answer("404 Not Found")
        return answer("200 OK", Content_Length=len(self.object), ETag=self.etag)

    def begin(self, asked: Asked, number: int) -> bytes:
        self.parts = {}
        return answer("200 OK", b"<R><UploadId>up/1</UploadId></R>")

    def part(self, asked: Asked, number: int) -> bytes:
        digest = base64.b64encode(hashlib.md5(asked.body).digest()).decode()
        assert asked.headers["content-md5"] == digest
        if self.parts is None:
            return error("404 Not Found", "NoSuchUpload")
        self.parts[number] = asked.body
        return answer("200 OK", ETag=etag_of(asked.body))

    def complete(self, asked: Asked, number: int) -> bytes:
        if self.parts is None:
            return error("404 Not Found", "NoSuchUpload")
        numbers = [int(text) for text in re.findall(r"<PartNumber>(\d+)<", asked.body.decode())]
        assert numbers == sorted(self.parts)
        self.object = b"".join(self.parts[one] for one in numbers)
        digests = b"".join(hashlib.md5(self.parts[one]).digest() for one in numbers)
        self.etag = etag_of(digests)[:-1] + f'-{len(numbers)}"'
        self.parts = None
        return answer("200 OK", f"<R><ETag>{self.etag.replace(chr(34), '&quot;')}</ETag></R>".encode())

    def put(self, asked: Asked, number: int) -> bytes:
        if asked.headers.get("if-none-match") == "*" and self.object is not None:
            return error("412 Precondition Failed", "PreconditionFailed")
        self.object, self.etag = asked.body, etag_of(asked.body)
        return answer("200 OK", ETag=self.etag)

    def abort(self, asked: Asked, number: int) -> bytes:
        self.parts = None
        return answer("204 No Content", Content_Length=None)


@pytest.fixture
def fake() -> FakeS3:
    return FakeS3()


@pytest.fixture
def store(fake: FakeS3) -> Iterator[Store]:
    aws._forget_sessions()
    with RawServer(fake) as server:
        options = StoreOptions(
            endpoint_url=server.endpoint,
            access_key_id="AKID",
            secret_access_key="hushhush",
            environment={"AWS_CONFIG_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true"},
        )
        yield store_for("s3://bucket/key", options)


Upload = Callable[..., None]


@pytest.fixture
def upload(store: Store) -> Upload:
    """Write bytes through the store, in pieces."""

    def write(data: bytes, overwrite: bool = True) -> None:
        with store.writer("s3://bucket/key", overwrite=overwrite) as target:
            for begin in range(0, len(data), 3 * MIB):
                target.file.write(data[begin : begin + 3 * MIB])

    return write


BIG = os.urandom(1 << 16) * (20 * 16)  # three parts
SMALL = b"x" * 1000


def first(count: int, name: str, spoiled: Callable[[], bytes]) -> Callable[[str, Asked], bytes | None]:
    """The answer to the first `count` requests of that name."""
    seen: list[str] = []
    lock = threading.Lock()

    def spoil(operation: str, asked: Asked) -> bytes | None:
        if operation != name:
            return None
        with lock:
            seen.append(name)
            return spoiled() if len(seen) <= count else None

    return spoil


def after(name: str, fake: FakeS3) -> Callable[[str, Asked], bytes | None]:
    """The first request of that name is carried out, but its answer is lost."""
    seen: list[str] = []

    def spoil(operation: str, asked: Asked) -> bytes | None:
        if operation == name and not seen:
            seen.append(name)
            getattr(fake, name)(asked, 0)
            raise Hangup
        return None

    return spoil


def test_parts_grow_to_five_tebibytes() -> None:
    sizes = [part_size(number) for number in range(1, PARTS_MOST + 1)]
    assert sizes[0] == 8 * MIB
    assert sizes == sorted(sizes)
    assert sum(sizes) >= 5 << 40
    assert sizes[-1] <= 5 << 30
    assert sum(sizes[:100]) > 1 << 30
    assert sizes[100] < 20 * MIB


def test_parts_come_in_any_order_and_the_object_in_one(fake: FakeS3, upload: Upload) -> None:
    late = threading.Event()

    def spoil(name: str, asked: Asked) -> None:
        if "partNumber=1&" in asked.target + "&":
            late.wait(10)
        elif name == "part":
            late.set()

    fake.spoil = spoil
    upload(BIG)
    assert fake.object == BIG
    assert sorted(fake.done) == ["begin", "complete", "part", "part", "part"]


def test_a_small_object_is_one_request(fake: FakeS3, upload: Upload) -> None:
    upload(SMALL)
    assert (fake.object, fake.done) == (SMALL, ["put"])


def test_memory_is_bounded(fake: FakeS3, store: Store) -> None:
    taken = [0]
    slow = threading.Event()

    def spoil(name: str, asked: Asked) -> None:
        if name == "part":
            slow.wait(0.05)
            taken[0] += len(asked.body)

    fake.spoil = spoil
    with store.writer("s3://bucket/key") as target:
        for _ in range(100):
            target.file.write(bytes(MIB))
            assert target.file.tell() - taken[0] <= MEMORY + 4 * part_size(10)
        assert fake.done.count("part") > 1
    assert fake.object == bytes(100 * MIB)


def test_the_upload_is_aborted_when_its_last_part_has_arrived(fake: FakeS3, upload: Upload) -> None:
    under_way, seen, slow = [0], [], threading.Event()
    lock = threading.Lock()

    def spoil(name: str, asked: Asked) -> bytes | None:
        if name == "part" and "partNumber=1&" in asked.target + "&":
            return error("403 Forbidden", "AccessDenied")
        with lock:
            under_way[0] += name == "part"
        if name == "part":
            slow.wait(0.3)
        if name == "abort":
            seen.append(under_way[0])
        with lock:
            under_way[0] -= name == "part"
        return None

    fake.spoil = spoil
    with pytest.raises(AccessDenied):
        upload(bytes(70 * MIB))
    assert seen == [0]


@pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
def test_bytes_that_arrive_damaged_are_sent_again(fake: FakeS3, upload: Upload, data: bytes) -> None:
    name = "put" if data is SMALL else "part"
    fake.spoil = first(2, name, lambda: error("400 Bad Request", "BadDigest"))
    upload(data)
    assert fake.object == data


@pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
@pytest.mark.parametrize(
    ("spoiled", "kind", "words"),
    [
        (lambda: error("400 Bad Request", "BadDigest"), BuildError, "BadDigest"),
        (lambda: answer("200 OK", ETag=f'"{"0" * 32}"'), BuildError, "has other bytes than were sent"),
        (lambda: error("403 Forbidden", "AccessDenied"), AccessDenied, "s3:PutObject"),
        (lambda: error("404 Not Found", "NoSuchBucket"), BuildError, "has no bucket 'bucket'"),
        (lambda: error("507 Full", "QuotaExceeded"), BuildError, "QuotaExceeded"),
    ],
)
def test_an_upload_that_fails_is_aborted_and_says_why(
    fake: FakeS3,
    upload: Upload,
    data: bytes,
    spoiled: Callable[[], bytes],
    kind: type[LazymemError],
    words: str,
) -> None:
    fake.spoil = first(99, "put" if data is SMALL else "part", spoiled)
    with pytest.raises(kind, match=words) as caught:
        upload(data)
    assert str(caught.value).startswith("s3://bucket/key: ")
    assert (fake.object, fake.parts) == (None, None)
    assert fake.done[-1] == ("abort" if data is BIG else "put")


def test_an_upload_that_cannot_begin_has_nothing_to_abort(fake: FakeS3, upload: Upload) -> None:
    fake.spoil = first(99, "begin", lambda: error("403 Forbidden", "AccessDenied"))
    with pytest.raises(AccessDenied):
        upload(BIG)
    assert fake.done == ["begin"]


def test_a_success_with_an_error_in_it_is_none(fake: FakeS3, upload: Upload) -> None:
    fake.spoil = first(99, "complete", lambda: error("200 OK", "InternalError"))
    with pytest.raises(BuildError, match="InternalError"):
        upload(BIG)
    assert (fake.object, fake.parts) == (None, None)
    assert fake.done[-1] == "abort"


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
def test_a_success_whose_answer_is_lost_is_one(
    fake: FakeS3, upload: Upload, data: bytes, overwrite: bool
) -> None:
    fake.spoil = after("put" if data is SMALL else "complete", fake)
    upload(data, overwrite)
    assert fake.object == data
    assert "abort" not in fake.done


def test_another_s_object_is_not_taken_for_a_lost_success(fake: FakeS3, upload: Upload) -> None:
    def spoil(name: str, asked: Asked) -> bytes | None:
        if name == "complete" and fake.parts is not None:
            fake.parts, fake.object, fake.etag = None, b"another's", etag_of(b"another's")
            raise Hangup
        return None

    fake.spoil = spoil
    with pytest.raises(BuildError, match="NoSuchUpload"):
        upload(BIG)
    assert fake.object == b"another's"


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        ("412 Precondition Failed", "PreconditionFailed", "exists already"),
        ("409 Conflict", "ConditionalRequestConflict", "somebody else is writing it"),
        ("501 Not Implemented", "NotImplemented", "cannot write only where nothing is"),
    ],
)
@pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
def test_a_condition_that_is_not_met_or_not_known(
    fake: FakeS3, upload: Upload, data: bytes, status: str, code: str, words: str
) -> None:
    conditions: list[Any] = []

    def spoil(name: str, asked: Asked) -> bytes | None:
        if name in ("put", "complete"):
            conditions.append(asked.headers.get("if-none-match"))
            return error(status, code)
        return None

    fake.spoil = spoil
    with pytest.raises(BuildError, match=words):
        upload(data, False)
    assert set(conditions) == {"*"}
    assert (fake.object, fake.parts) == (None, None)


def test_an_object_that_may_not_be_looked_at_is_left_to_the_condition(fake: FakeS3, upload: Upload) -> None:
    fake.spoil = first(99, "head", lambda: answer("403 Forbidden"))
    upload(SMALL, False)
    with pytest.raises(BuildError, match="exists already"):
        upload(b"other", False)
    assert fake.object == SMALL


def test_an_etag_that_is_no_md5_is_not_compared(fake: FakeS3, upload: Upload) -> None:
    fake.spoil = first(
        99, "put", lambda: answer("200 OK", ETag=f'"{"0" * 32}"', x_amz_server_side_encryption="aws:kms")
    )
    upload(SMALL)


def test_parts_that_cannot_be_removed_are_reported(
    fake: FakeS3, upload: Upload, caplog: pytest.LogCaptureFixture
) -> None:
    def spoil(name: str, asked: Asked) -> bytes | None:
        return error("403 Forbidden", "AccessDenied") if name in ("abort", "complete") else None

    fake.spoil = spoil
    with caplog.at_level(logging.WARNING, "lazymem"), pytest.raises(AccessDenied):
        upload(BIG)
    (record,) = caplog.records
    assert "abort-multipart-upload --bucket bucket --key key --upload-id up/1" in record.getMessage()
    assert "hushhush" not in record.getMessage()
