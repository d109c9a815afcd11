# SPDX-License-Identifier: Apache-2.0
"""Google's and Azure's stores through obstore, against a server that answers as theirs do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from lazymem.errors import (
    AccessDenied,
    BuildError,
    LazymemError,
    OptionError,
    ReadError,
    SnapshotChanged,
    SnapshotNotFound,
)
from lazymem.options import StoreOptions
from lazymem.store.base import Attempt, Opened, Reader, Store, Transient
from lazymem.store.remote import store_for

from .raw_server import Answering, Asked, Hangup, Honest, RawServer, answer, read

pytest.importorskip("obstore")

DATA = bytes(range(256)) * 40
DATE = "Tue, 24 Nov 2026 02:42:21 GMT"
OPENED = Opened(len(DATA), '"v1"', b"")
Serve = Callable[[Answering], RawServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that end with the test."""
    with ExitStack() as stack:
        yield lambda answering: stack.enter_context(RawServer(answering))


def store_at(server: RawServer, url: str, **options: Any) -> Store:
    environment = {"AZURE_STORAGE_ACCOUNT_NAME": "account"}
    given = StoreOptions(endpoint_url=server.endpoint, anonymous=True, environment=environment, **options)
    return store_for(url, given)


def reader_at(server: RawServer, url: str = "gs://bucket/a b/k", **options: Any) -> Reader:
    return store_at(server, url, **options).reader(url)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("gs://bucket/a b/k", "/bucket/a%20b%2Fk"),
        ("gcs://bucket/k", "/bucket/k"),
        ("az://box/a b/k", "/box/a%20b/k"),
        ("azure://box/k", "/box/k"),
        ("abfs://box/k", "/box/k"),
        ("abfss://box@account.dfs.core.windows.net/k", "/box/k"),
    ],
)
def test_open_and_ranges(serve: Serve, url: str, path: str) -> None:
    server = serve(Honest(DATA, modified=DATE))
    reader = reader_at(server, url)
    attempt = Attempt()
    opened = reader.open(100, timeout=5, attempt=attempt)
    assert opened == Opened(len(DATA), '"v1"', DATA[-100:])
    assert attempt.requests == len(server.asked) == (1 if url.startswith("g") else 2)
    assert read(reader, 5, 1000, opened) == DATA[5:1005]
    assert server.asked[-1].target == path
    assert server.asked[-1].headers["if-match"] == '"v1"'
    assert reader.client == "obstore"


@pytest.mark.parametrize("url", ["gs://bucket/k", "az://box/k"])
def test_an_empty_object_and_a_replaced_one(serve: Serve, url: str) -> None:
    honest = Honest(b"", modified=DATE)
    reader = reader_at(serve(honest), url)
    assert reader.open(10, timeout=5) == Opened(0, '"v1"', b"")
    honest.data = DATA
    opened = reader.open(10, timeout=5)
    honest.data, honest.etag = DATA[::-1], '"v2"'
    with pytest.raises(SnapshotChanged):
        read(reader, 0, 10, opened)


def test_a_server_that_ignores_the_condition_is_noticed(serve: Serve) -> None:
    honest = Honest(DATA, etag='"v2"', modified=DATE)
    forgetful = serve(lambda asked: honest(Asked("GET", "/", {"range": asked.headers["range"]})))
    with pytest.raises(SnapshotChanged, match=r'it is "v2" now'):
        read(reader_at(forgetful), 0, 10, OPENED)


def test_less_than_was_asked_for_is_no_answer(serve: Serve) -> None:
    honest = Honest(DATA, modified=DATE)
    short = serve(lambda asked: honest(asked, Content_Range="bytes 0-4/10240", Content_Length=5)[:-5])
    with pytest.raises((ReadError, Transient), match=r"got 0\.\.5|sent 0 to 5"):
        read(reader_at(short), 0, 10, OPENED)


def test_a_body_that_breaks_off_may_be_asked_for_again(serve: Serve) -> None:
    honest = Honest(DATA, modified=DATE)

    def torn(asked: Asked) -> Iterator[bytes]:
        yield honest(asked)[:-100]
        raise Hangup

    with pytest.raises(Transient):
        read(reader_at(serve(torn)), 0, 1000, OPENED)


@pytest.mark.parametrize("url", ["gs://bucket/k", "az://box/k"])
@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        ("404 Not Found", SnapshotNotFound, "k"),
        ("403 Forbidden", AccessDenied, "access is denied"),
        ("401 Unauthorized", AccessDenied, "access is denied"),
        ("503 Busy", Transient, "503"),
        ("429 Many", Transient, "429"),
        ("400 Bad", ReadError, "400"),
    ],
)
def test_refusals(serve: Serve, url: str, status: str, kind: type[LazymemError], words: str) -> None:
    server = serve(lambda asked: answer(status, b"" if asked.method == "HEAD" else b"<Error/>"))
    with pytest.raises(kind, match=words) as caught:
        reader_at(server, url).open(10, timeout=5)
    assert str(caught.value).startswith(f"{url}: ")
    assert "\n" not in str(caught.value)
    assert len(server.asked) == 1


def test_an_aborted_attempt_leaves_its_buffer_alone(serve: Serve) -> None:
    attempt = Attempt()
    honest = Honest(DATA, modified=DATE)

    def answering(asked: Asked) -> bytes:
        assert not attempt.abort()  # it cannot be broken off, so the buffer is free at once
        return honest(asked)

    out = bytearray(100)
    with pytest.raises(Transient, match="broken off"):
        reader_at(serve(answering)).read_into(0, memoryview(out), OPENED, attempt, timeout=5)
    assert not any(out)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("gs://", "names no bucket"),
        ("gs://bucket", "no object in it"),
        ("gs://bucket/", "no object in it"),
        ("az://box/a//b", "obstore cannot name"),
        ("gs://bucket/a/../b", "obstore cannot name"),
        ("gs://bucket/a/", "obstore cannot name"),
    ],
)
def test_a_url_that_cannot_be_one_is_refused(serve: Serve, url: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        reader_at(serve(Honest(DATA)), url)


def test_credentials_of_nonsense_are_refused_without_being_shown() -> None:
    environment = {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_STORAGE_ACCOUNT_KEY": "hush hush"}
    with pytest.raises(OptionError, match="obstore does not accept this") as caught:
        store_for("az://box/k", StoreOptions(environment=environment)).reader("az://box/k")
    assert "hush" not in str(caught.value)


def test_writing_is_refused_with_a_way_out(serve: Serve) -> None:
    server = serve(Honest(DATA))
    with pytest.raises(BuildError, match=r"storage\.googleapis\.com"):
        store_at(server, "gs://bucket/k").writer("gs://bucket/k")
    with pytest.raises(BuildError, match="Azure's tools"):
        store_at(server, "az://box/k").writer("az://box/k")


def test_a_list_has_the_names_in_order_and_no_deeper_ones(serve: Serve) -> None:
    def item(name: str) -> str:
        modified = "<LastModified>2026-11-24T02:42:21Z</LastModified>"
        return f"<Contents><Key>f/{name}</Key>{modified}<Size>1</Size></Contents>"

    body = (
        "<ListBucketResult>"
        + item("b")
        + item("a c")
        + "<CommonPrefixes><Prefix>f/sub/</Prefix></CommonPrefixes>"
        "</ListBucketResult>"
    )
    server = serve(lambda asked: answer("200 OK", body.encode()))
    store = store_at(server, "gs://bucket/f/")
    assert list(store.list("gs://bucket/f/")) == ["a c", "b", "sub/"]
    assert "delimiter=%2F" in server.asked[0].target
    server.answering = lambda asked: answer("200 OK", b"<ListBucketResult></ListBucketResult>")
    with pytest.raises(SnapshotNotFound, match="nothing lies under"):
        store.list("gs://bucket/g/")
    server.answering = lambda asked: answer("403 Forbidden")
    with pytest.raises(AccessDenied):
        store.list("gs://bucket/g/")


def test_where_obstore_is_not_installed_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "from lazymem.options import StoreOptions; from lazymem.store.remote import store_for\n"
        "for url, client in (('gs://b/k', 'auto'), ('s3://b/k', 'obstore')):\n"
        "    try: store_for(url, StoreOptions(client=client)).reader(url)\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.count("OptionError") == done.stdout.count("pip install 'lazymem[obstore]'") == 2, done
