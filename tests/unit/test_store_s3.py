# SPDX-License-Identifier: Apache-2.0
"""S3 with a server that says no in all ways: URLs, credentials, regions, and what users read."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from lazymem.errors import (
    AccessDenied,
    LazymemError,
    OptionError,
    ReadError,
    SnapshotChanged,
    SnapshotNotFound,
)
from lazymem.options import StoreOptions, environment_as
from lazymem.store import aws, s3
from lazymem.store.base import Attempt, Opened, Reader, Transient
from lazymem.store.refusals import RENEWABLE
from lazymem.store.remote import store_for
from lazymem.store.s3 import split_s3_url

from .raw_server import Answering, Asked, Hangup, Honest, RawServer, answer, read

DATA = bytes(range(256)) * 40
OPENED = Opened(len(DATA), '"v1"', b"")
Serve = Callable[[Answering], RawServer]
#: Nothing of this machine is looked at.
NOWHERE = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
KEYS = {"AWS_ACCESS_KEY_ID": "AKID", "AWS_SECRET_ACCESS_KEY": "hushhush"}


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that end with the test."""
    with ExitStack() as stack:
        yield lambda answering: stack.enter_context(RawServer(answering))


@pytest.fixture(autouse=True)
def _nothing_is_kept() -> Iterator[None]:
    """Sessions and stores are the process's; each test begins without."""
    aws._forget_sessions()
    yield
    while _readers:
        _readers.pop().close()


_readers: list[Reader] = []


def reader_of(
    server: RawServer | str,
    url: str = "s3://bucket/key",
    environment: dict[str, str] | None = None,
    **options: Any,
) -> Reader:
    """A reader that is closed with the test."""
    endpoint = server if isinstance(server, str) else server.endpoint
    given = StoreOptions(
        endpoint_url=endpoint,
        environment={**NOWHERE, **(KEYS if environment is None else environment)},
        **options,
    )
    _readers.append(store_for(url, given).reader(url))
    return _readers[-1]


def refusing(status: str, code: str = "", said: str = "", more: str = "", **headers: Any) -> Answering:
    body = (
        f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{said}</Message>{more}</Error>"
        if code
        else ""
    )
    return lambda asked: answer(status, b"" if asked.method == "HEAD" else body.encode(), **headers)


# URLs


@pytest.mark.parametrize(
    ("url", "bucket", "key"),
    [
        ("s3://bucket/key", "bucket", "key"),
        ("s3://my.bucket-1/a/b c?versionId=1#x%20é", "my.bucket-1", "a/b c?versionId=1#x%20é"),
        ("S3://Old_Bucket//lead", "Old_Bucket", "/lead"),
        ("s3://bucket", "bucket", ""),
    ],
)
def test_a_url_is_a_bucket_and_a_key_as_it_stands(url: str, bucket: str, key: str) -> None:
    assert split_s3_url(url) == (bucket, key)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://", "names no bucket"),
        ("s3:///key", "names no bucket"),
        ("s3://bucket", "no object in it"),
        ("s3://bucket/", "no object in it"),
        ("s3://bu cket/key", "cannot be the name of a bucket"),
        ("s3://bucket:9000/key", "cannot be the name of a bucket"),
        ("s3://AKID:hushhush@bucket/key", "give credentials as storage options"),
        ("s3://bucket/" + "x" * 1025, "1025 bytes"),
        ("s3://bucket/" + "é" * 513, "1026 bytes"),
        ("s3://bucket/a\0b", "without NUL"),
        ("s3://bucket/\udcff", "UTF-8"),
    ],
)
def test_a_url_that_cannot_be_one_is_refused(url: str, words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        reader_of("http://127.0.0.1:1", url)
    assert "hushhush" not in str(caught.value)


def test_an_unknown_scheme_says_what_there_is() -> None:
    with pytest.raises(OptionError, match=r"ftp:// is not supported; there are paths, .*s3, gs"):
        store_for("ftp://host/x", StoreOptions())


# What is sent


def test_ranges_are_sent_with_one_signature(serve: Serve) -> None:
    server = serve(Honest(DATA))
    reader = reader_of(server, "s3://bucket/a b?é")
    opened = reader.open(100, timeout=5)
    assert (opened.size, opened.identity, opened.tail) == (len(DATA), '"v1"', DATA[-100:])
    assert read(reader, 3, 50, opened) == DATA[3:53]
    assert read(reader, 0, len(DATA), opened) == DATA
    first, second, third = server.asked
    path, _, query = first.target.partition("?")
    assert path == "/bucket/a%20b%3F%C3%A9"
    assert "X-Amz-SignedHeaders=host&" in query
    assert "%2Fus-east-1%2Fs3%2Faws4_request" in query
    assert first.target == second.target == third.target
    assert second.headers["if-match"] == '"v1"'
    assert {asked.connection for asked in server.asked} == {0}
    assert reader.client == "http.client"


def test_a_signature_is_renewed_in_time(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    signatures = []
    real = aws.Session.sign

    def sign(self: aws.Session, *given: Any) -> Any:
        signatures.append(given)
        return real(self, *given)

    monkeypatch.setattr(aws.Session, "sign", sign)
    server = serve(Honest(DATA))
    reader = reader_of(server)
    for _ in range(3):
        reader.open(1, timeout=5)
    assert len(signatures) == 1
    monkeypatch.setattr(s3, "_SIGN_AGAIN", -1.0)
    reader.open(1, timeout=5)
    assert len(signatures) == 2


def test_an_empty_object_costs_a_second_request(serve: Serve) -> None:
    honest = Honest(b"")
    server = serve(lambda asked: honest(asked) if asked.method == "HEAD" else answer("416 x"))
    assert reader_of(server).open(10, timeout=5) == Opened(0, '"v1"', b"")
    assert [asked.method for asked in server.asked] == ["GET", "HEAD"]


def test_anonymous_requests_carry_no_signature(serve: Serve) -> None:
    server = serve(Honest(DATA))
    reader_of(server, environment={}, anonymous=True).open(10, timeout=5)
    assert server.asked[0].target == "/bucket/key"
    assert "authorization" not in server.asked[0].headers


@pytest.mark.parametrize(
    ("style", "target", "host"),
    [
        ("auto", "/bucket/key", "localhost"),
        ("path", "/bucket/key", "localhost"),
        ("virtual", "/key", "bucket.localhost"),
    ],
)
def test_addressing_style(serve: Serve, style: str, target: str, host: str) -> None:
    server = serve(Honest(DATA))
    endpoint = server.endpoint.replace("127.0.0.1", "localhost")
    reader = reader_of(endpoint, addressing_style=style)
    try:
        reader.open(10, timeout=5)
    except Transient as error:  # not every resolver knows names below localhost
        assert f"the host {host} cannot be found" in str(error)  # noqa: PT017
        return
    assert server.asked[0].target.partition("?")[0] == target
    assert server.asked[0].headers["host"] == f"{host}:{server.port}"


# Where credentials and endpoint come from


def key_of(asked: Asked) -> str:
    return asked.target.partition("X-Amz-Credential=")[2].partition("%2F")[0]


def test_the_environment_at_open_counts_and_not_that_of_now(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(Honest(DATA))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOW")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "now")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    before = dict(os.environ)
    environment = {**NOWHERE, **KEYS, "AWS_ENDPOINT_URL_S3": server.endpoint}
    reader = store_for("s3://bucket/key", StoreOptions(environment=environment)).reader("s3://bucket/key")
    reader.open(10, timeout=5)
    reader.close()
    assert key_of(server.asked[0]) == "AKID"
    assert dict(os.environ) == before


def test_environment_as_sets_removes_and_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "now")
    monkeypatch.setenv("AWS_REGION", "now")
    monkeypatch.delenv("AWS_ROLE_ARN", raising=False)
    with environment_as({"AWS_PROFILE": "then", "AWS_ROLE_ARN": "then"}):
        assert [os.environ.get(f"AWS_{name}") for name in ("PROFILE", "ROLE_ARN", "REGION")] == [
            "then",
            "then",
            None,
        ]
    assert [os.environ.get(f"AWS_{name}") for name in ("PROFILE", "ROLE_ARN", "REGION")] == [
        "now",
        None,
        "now",
    ]


def test_options_beat_the_environment(serve: Serve) -> None:
    server = serve(Honest(DATA))
    reader_of(
        server, access_key_id="MINE", secret_access_key="x", session_token="tok", region="eu-west-3"
    ).open(10, timeout=5)
    assert key_of(server.asked[0]) == "MINE"
    assert "%2Feu-west-3%2F" in server.asked[0].target
    assert "X-Amz-Security-Token=tok" in server.asked[0].target


def test_profile_endpoint_and_region_come_from_the_files(serve: Serve, tmp_path: Path) -> None:
    server = serve(Honest(DATA))
    config, credentials = tmp_path / "config", tmp_path / "credentials"
    config.write_text(f"[profile work]\nregion = eu-north-1\nendpoint_url = {server.endpoint}\n")
    credentials.write_text("[work]\naws_access_key_id = FILE\naws_secret_access_key = x\n")
    environment = {
        **NOWHERE, "AWS_CONFIG_FILE": str(config), "AWS_SHARED_CREDENTIALS_FILE": str(credentials)
    }  # fmt: skip
    for given in ({"profile": "work"}, {"environment": {**environment, "AWS_PROFILE": "work"}}):
        options = StoreOptions(**{"environment": environment, **given})  # type: ignore[arg-type]
        reader = store_for("s3://bucket/key", options).reader("s3://bucket/key")
        reader.open(10, timeout=5)
        reader.close()
        assert key_of(server.asked[-1]) == "FILE"
        assert "%2Feu-north-1%2F" in server.asked[-1].target


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_credentials_that_were_changed_meanwhile_are_looked_for_again(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    credentials = tmp_path / "credentials"
    credentials.write_text("[default]\naws_access_key_id = OLD\naws_secret_access_key = x\n")
    valid = ["OLD"]
    good = Honest(DATA)
    server = serve(
        lambda asked: (
            good(asked) if key_of(asked) == valid[0] else refusing("403 Forbidden", code, "gone")(asked)
        )
    )
    reader = reader_of(server, environment={"AWS_SHARED_CREDENTIALS_FILE": str(credentials)})
    opened = reader.open(10, timeout=5)
    valid[0] = "NEW"
    with pytest.raises(AccessDenied):  # they are seconds old: nobody asks again so soon
        read(reader, 0, 5, opened)
    monkeypatch.setattr(aws, "_RENEW_SECONDS", -1.0)
    with pytest.raises(AccessDenied, match=r"~/\.aws/credentials"):
        read(reader, 0, 5, opened)
    credentials.write_text("[default]\naws_access_key_id = NEW\naws_secret_access_key = y\n")
    sent = len(server.asked)
    assert read(reader, 0, 5, opened) == DATA[:5]
    assert [key_of(asked) for asked in server.asked[sent:]] == ["OLD", "NEW"]


def test_objects_share_a_session_and_connections(serve: Serve) -> None:
    server = serve(Honest(DATA))
    one, two = reader_of(server, "s3://bucket/1"), reader_of(server, "s3://bucket/2")
    other = reader_of(server, "s3://bucket/2", region="eu-west-1")
    for reader in (one, two, other):
        reader.open(10, timeout=5)
    assert one._session is two._session is not other._session  # type: ignore[attr-defined]
    assert [asked.connection for asked in server.asked] == [0, 0, 1]


# Answers that are not what was asked for, to each client


def error_of_read(reader: Reader, opened: Opened, offset: int = 0) -> BaseException:
    """What a range of five bytes ends with. Twice: obstore may hold a connection that is dead by now."""
    caught: BaseException | None = None
    for _ in range(2):
        with pytest.raises(LazymemError, match=r"^s3://bucket/key: ") as info:
            read(reader, offset, 5, opened)
        caught = info.value
        if not isinstance(caught, Transient):
            break
    assert caught is not None
    return caught


@pytest.mark.parametrize("client", ["http", "boto3", "obstore"])
def test_answers_are_checked_whatever_moves_the_bytes(serve: Serve, client: str) -> None:
    good = Honest(DATA, modified="Tue, 24 Nov 2026 02:42:21 GMT")
    server = serve(good)
    reader = reader_of(server, client=client)
    opened = reader.open(10, timeout=5)
    changed: dict[str, str | int | None] = {}

    def spoilt(asked: Asked) -> Iterator[bytes]:
        yield good(asked, **changed)
        raise Hangup

    def torn(asked: Asked) -> Iterator[bytes]:
        yield good(asked)[:-2]
        raise Hangup

    server.answering = spoilt
    changed = {"ETag": '"v2"'}
    assert isinstance(error_of_read(reader, opened), SnapshotChanged)
    changed = {"Content_Range": "bytes 0-4/10241"}
    assert isinstance(error_of_read(reader, opened), SnapshotChanged)
    for wrong in ({"Content_Range": "bytes 1-5/10240"}, {"Content_Range": None}, {"Content_Length": 9}):
        changed = dict(wrong)
        error_of_read(reader, opened)
    server.answering = lambda asked: answer("200 OK", DATA, ETag='"v1"', Last_Modified=good.modified)
    error_of_read(reader, opened, 1)
    server.answering = torn
    assert isinstance(error_of_read(reader, opened), Transient)
    server.answering = good
    with suppress(Transient):  # as above
        read(reader, 0, 5, opened)
    assert read(reader, 0, 5, opened) == DATA[:5]


@pytest.mark.parametrize("client", ["http", "boto3"])
def test_an_attempt_can_be_broken_off_in_the_body(serve: Serve, client: str) -> None:
    good = Honest(DATA)
    server = serve(good)
    reader = reader_of(server, client=client)
    opened = reader.open(10, timeout=5)
    waiting, leave = threading.Event(), threading.Event()

    def answering(asked: Asked) -> Iterator[bytes]:
        yield good(asked)[:-5000]
        waiting.set()
        leave.wait(30)

    server.answering = answering
    attempt, caught = Attempt(), []

    def work() -> None:
        try:
            reader.read_into(0, memoryview(bytearray(len(DATA))), opened, attempt, timeout=60)
        except Transient as error:
            caught.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert waiting.wait(10)
    while attempt._unblock is None:
        assert thread.is_alive()
    assert attempt.abort()
    thread.join(10)
    assert not thread.is_alive()
    assert caught == ["s3://bucket/key: the request was broken off"]
    leave.set()


# Regions


def test_a_bucket_in_another_region_is_followed_once(serve: Serve) -> None:
    good = Honest(DATA)

    def answering(asked: Asked) -> Any:
        if "%2Feu-west-3%2F" in asked.target:
            return good(asked)
        return refusing("301 Moved", "PermanentRedirect", "elsewhere", x_amz_bucket_region="eu-west-3")(asked)

    server = serve(answering)
    reader = reader_of(server)
    assert reader.open(10, timeout=5).tail == DATA[-10:]
    assert len(server.asked) == 2
    reader_of(server, "s3://bucket/other").open(10, timeout=5)  # the region is known by now
    assert len(server.asked) == 3


def test_the_region_may_stand_in_the_body(serve: Serve) -> None:
    good = Honest(DATA)
    wrong = refusing("400 Bad", "AuthorizationHeaderMalformed", "wrong", "<Region>eu-west-3</Region>")
    server = serve(lambda asked: good(asked) if "eu-west-3" in asked.target else wrong(asked))
    assert reader_of(server).open(10, timeout=5).size == len(DATA)


@pytest.mark.parametrize("region", ["eu-west-3", None, "no region! \x01"])
def test_a_region_that_does_not_help_is_an_error(serve: Serve, region: str | None) -> None:
    server = serve(refusing("301 Moved", "PermanentRedirect", "elsewhere", x_amz_bucket_region=region))
    with pytest.raises(
        ReadError, match=r"lies in (region eu-west-3|another region).*give storage option region"
    ):
        reader_of(server).open(10, timeout=5)
    assert len(server.asked) == (2 if region == "eu-west-3" else 1)


# What users read

LONG_AGO = "Tue, 24 Nov 2020 02:42:21 GMT"
REFUSALS: dict[str, tuple[Answering, type[LazymemError], str]] = {
    "NoSuchKey": (refusing("404 x", "NoSuchKey"), SnapshotNotFound, "bucket 'bucket' has no object 'key'"),
    "NoSuchBucket": (refusing("404 x", "NoSuchBucket"), SnapshotNotFound, "127.* has no bucket 'bucket'"),
    "AccessDenied": (
        refusing("403 x", "AccessDenied", "Access Denied"),
        AccessDenied,
        r"with the credentials from the environment .* need s3:GetObject",
    ),
    "InvalidAccessKeyId": (refusing("403 x", "InvalidAccessKeyId"), AccessDenied, "does not know the access"),
    "SignatureDoesNotMatch": (
        refusing("403 x", "SignatureDoesNotMatch"),
        AccessDenied,
        "secret key from the environment",
    ),
    "RequestTimeTooSkewed": (
        refusing("403 x", "RequestTimeTooSkewed", Date=LONG_AGO),
        AccessDenied,
        "set the clock",
    ),
    "clock": (
        refusing("403 x", "AccessDenied", "Request has expired", Date=LONG_AGO),
        AccessDenied,
        "set the clock",
    ),
    "ExpiredToken": (
        refusing("400 x", "ExpiredToken"),
        AccessDenied,
        "temporary credentials .* have expired",
    ),
    "InvalidToken": (refusing("400 x", "InvalidToken"), AccessDenied, "session token"),
    "InvalidObjectState": (refusing("403 x", "InvalidObjectState"), ReadError, "archived"),
    "PreconditionFailed": (refusing("412 x", "PreconditionFailed"), SnapshotChanged, "replaced"),
    "SlowDown": (refusing("503 x", "SlowDown", Retry_After="3"), Transient, "SlowDown"),
    "RequestTimeout": (refusing("400 x", "RequestTimeout", "slow"), Transient, r"RequestTimeout \(slow\)"),
    "InternalError": (refusing("500 x", "InternalError"), Transient, "500"),
    "no body": (refusing("502 Bad Gateway"), Transient, "502"),
    "something new": (refusing("400 x", "Brand<New"), ReadError, "answered 400"),
    "not S3": (refusing("405 x"), ReadError, "answered 405"),
    "with secrets": (
        refusing("400 x", "Odd", "see http://u:hushhush@h/?X-Amz-Signature=hushhush&amp;x"),
        ReadError,
        "Odd",
    ),
}


# The other clients tell less of an answer.
EXAMPLES = [("http", name) for name in REFUSALS] + [
    (client, name)
    for client in ("boto3", "obstore")
    for name in REFUSALS
    if name not in ("clock", "RequestTimeTooSkewed", "with secrets")
]


@pytest.mark.parametrize(("client", "name"), EXAMPLES)
def test_a_refusal_is_one_sentence_that_says_what_to_do(serve: Serve, client: str, name: str) -> None:
    answering, kind, words = REFUSALS[name]
    server = serve(answering)
    reader = reader_of(server, client=client)
    with pytest.raises(kind, match=words) as caught:
        reader.read_into(0, memoryview(bytearray(9)), OPENED, Attempt(), timeout=5)
    # Who drives the reader tries again. But credentials may be looked for anew, five seconds after they
    # were found.
    assert len(server.asked) <= (2 if name in RENEWABLE else 1)
    said = str(caught.value)
    assert said.startswith("s3://bucket/key: ")
    assert "\n" not in said
    assert "hushhush" not in said
    assert "AKID" not in said
    if name == "SlowDown" and client == "http":
        assert isinstance(caught.value, Transient)
        assert (caught.value.status, caught.value.retry_after) == (503, 3.0)


def test_the_endpoint_is_named_where_nobody_listens() -> None:
    for client in ("http", "boto3", "obstore"):
        with pytest.raises(Transient, match=r"^s3://bucket/key: .*(127\.0\.0\.1:1|refused)"):
            reader_of("http://127.0.0.1:1", client=client).open(10, timeout=5)


@pytest.mark.parametrize("client", ["http", "boto3", "obstore"])
def test_no_credentials_at_all(serve: Serve, client: str) -> None:
    server = serve(Honest(DATA))
    with pytest.raises(AccessDenied, match=r"no credentials were found .*anonymous=True"):
        reader_of(server, environment={}, client=client).open(10, timeout=5)
    assert not server.asked


def test_half_a_pair_of_credentials(serve: Serve) -> None:
    with pytest.raises(AccessDenied, match="credentials are incomplete"):
        reader_of(serve(Honest(DATA)), environment={"AWS_ACCESS_KEY_ID": "AKID"}).open(10, timeout=5)


def test_a_profile_that_does_not_exist(serve: Serve) -> None:
    with pytest.raises(OptionError, match="has no profile 'nobody'"):
        reader_of(serve(Honest(DATA)), profile="nobody").open(10, timeout=5)


def test_a_configuration_that_cannot_be_read(serve: Serve, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("[default\nsecret = hushhush")
    with pytest.raises(OptionError, match=r"configuration file .*config cannot be read") as caught:
        reader_of(serve(Honest(DATA)), environment={"AWS_CONFIG_FILE": str(config)}).open(10, timeout=5)
    assert "hushhush" not in str(caught.value)


def test_a_process_that_gives_no_credentials(serve: Serve, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("[default]\ncredential_process = false\n")
    with pytest.raises(AccessDenied, match="no credentials can be had"):
        reader_of(serve(Honest(DATA)), environment={"AWS_CONFIG_FILE": str(config)}).open(10, timeout=5)


@pytest.mark.parametrize("region", ["eu west", "a" * 70])
def test_a_region_that_can_be_none(serve: Serve, region: str) -> None:
    with pytest.raises(OptionError, match="botocore does not accept this"):
        reader_of(serve(Honest(DATA)), region=region).open(10, timeout=5)


def test_nothing_that_is_printed_has_secrets(serve: Serve) -> None:
    reader = reader_of(serve(Honest(DATA)), access_key_id="AKID", secret_access_key="hushhush")
    reader.open(10, timeout=5)
    shown = f"{reader!r} {reader._session!r} {reader._signed!r} {reader._session.place('u', 'b', 'k')!r}"  # type: ignore[attr-defined]
    assert "hushhush" not in shown
    assert "Signature" not in shown
