# SPDX-License-Identifier: Apache-2.0
"""http(s) URLs: what is sent where, what is believed, and servers that are broken or mean harm."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from lazymem.errors import AccessDenied, BuildError, OptionError, ReadError, SnapshotChanged, SnapshotNotFound
from lazymem.options import StoreOptions
from lazymem.store.base import Attempt, Reader, Store, Transient
from lazymem.store.remote import store_for

from .raw_server import Answering, Asked, Hangup, Honest, RawServer, answer, read

DATA = bytes(range(256)) * 40
Serve = Callable[[Answering], RawServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that end with the test."""
    with ExitStack() as stack:
        yield lambda answering: stack.enter_context(RawServer(answering))


_readers: list[Reader] = []


@pytest.fixture(autouse=True)
def _close_readers() -> Iterator[None]:
    yield
    while _readers:
        _readers.pop().close()


def reader_of(server: RawServer, path: str = "/x.bin", **options: Any) -> Reader:
    """A reader that is closed with the test."""
    url = path if "://" in path else server.endpoint + path
    _readers.append(store_for(url, StoreOptions(**options)).reader(url))
    return _readers[-1]


def test_open_takes_one_request_and_gives_size_identity_and_tail(serve: Serve) -> None:
    server = serve(Honest(DATA))
    reader = reader_of(server)
    assert not server.asked  # nothing is sent before
    opened = reader.open(100, timeout=5)
    assert (opened.size, opened.identity, opened.tail) == (len(DATA), '"v1"', DATA[-100:])
    assert [(asked.method, asked.headers["range"]) for asked in server.asked] == [("GET", "bytes=-100")]
    assert server.asked[0].headers["accept-encoding"] == "identity"
    assert reader.client == "http.client"


@pytest.mark.parametrize("tail", [0, 1, len(DATA), len(DATA) + 1, 1 << 20])
def test_open_gives_as_many_last_bytes_as_there_are(serve: Serve, tail: int) -> None:
    opened = reader_of(serve(Honest(DATA))).open(tail, timeout=5)
    assert opened.tail == DATA[max(0, len(DATA) - tail) :]
    assert opened.size == len(DATA)


def test_ranges_carry_the_identity_and_use_one_connection(serve: Serve) -> None:
    server = serve(Honest(DATA))
    reader = reader_of(server)
    opened = reader.open(10, timeout=5)
    attempt = Attempt()
    out = bytearray(1000)
    reader.read_into(7, memoryview(out), opened, attempt, timeout=5)
    assert out == DATA[7:1007]
    assert (attempt.requests, attempt.received) == (1, 1000)
    assert read(reader, len(DATA) - 1, 1, opened) == DATA[-1:]
    assert read(reader, 3, 0, opened) == b""
    assert [asked.headers.get("if-match") for asked in server.asked] == [None, '"v1"', '"v1"']
    assert server.asked[1].headers["range"] == "bytes=7-1006"
    assert {asked.connection for asked in server.asked} == {0}


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (len(DATA), 1), (len(DATA) - 1, 2), (1 << 70, 1)])
def test_a_range_outside_the_object_is_refused_unasked(serve: Serve, offset: int, length: int) -> None:
    server = serve(Honest(DATA))
    reader = reader_of(server)
    opened = reader.open(10, timeout=5)
    with pytest.raises(ReadError, match="the object has 10240"):
        read(reader, offset, length, opened)
    assert len(server.asked) == 1


# Identity


def test_without_an_etag_the_date_tells_versions_apart(serve: Serve) -> None:
    date = "Tue, 24 Nov 2026 02:42:21 GMT"
    honest = Honest(DATA, etag=None, modified=date)
    server = serve(honest)
    reader = reader_of(server)
    opened = reader.open(10, timeout=5)
    assert opened.identity == f"last-modified:{date}"
    assert read(reader, 0, 5, opened) == DATA[:5]
    assert server.asked[-1].headers["if-unmodified-since"] == date
    honest.modified = "Tue, 24 Nov 2026 02:42:22 GMT"
    with pytest.raises(SnapshotChanged, match="Last-Modified is Tue"):
        read(reader, 0, 5, opened)


def test_a_weak_etag_is_compared_but_not_sent(serve: Serve) -> None:
    honest = Honest(DATA, etag='W/"a"')
    server = serve(honest)
    reader = reader_of(server)
    opened = reader.open(10, timeout=5)
    assert opened.identity == 'W/"a"'
    assert read(reader, 0, 5, opened) == DATA[:5]
    assert "if-match" not in server.asked[-1].headers
    honest.etag = 'W/"b"'
    with pytest.raises(SnapshotChanged):
        read(reader, 0, 5, opened)


def test_with_nothing_to_tell_versions_apart_the_size_must_stay(serve: Serve) -> None:
    honest = Honest(DATA, etag=None)
    reader = reader_of(serve(honest))
    opened = reader.open(10, timeout=5)
    assert opened.identity == ""
    assert read(reader, 0, 5, opened) == DATA[:5]
    honest.data = DATA + b"more"
    with pytest.raises(SnapshotChanged, match="had 10240 bytes and has 10244"):
        read(reader, 0, 5, opened)


@pytest.mark.parametrize("etag", ["\x80" * 9, '"' + "x" * 1100 + '"', '"a b"', ""])
def test_an_etag_that_cannot_be_sent_back_is_none(serve: Serve, etag: str) -> None:
    assert reader_of(serve(Honest(DATA, etag=etag))).open(10, timeout=5).identity == ""


@pytest.mark.parametrize("checks", [True, False], ids=["server checks If-Match", "server ignores If-Match"])
def test_a_replaced_object_is_noticed(serve: Serve, checks: bool) -> None:
    honest = Honest(DATA)

    def forgetful(asked: Asked) -> bytes:
        return honest(asked if checks else Asked("GET", "/", {"range": asked.headers["range"]}))

    reader = reader_of(serve(forgetful))
    opened = reader.open(10, timeout=5)
    honest.data, honest.etag = DATA[::-1], '"v2"'
    with pytest.raises(SnapshotChanged, match="was replaced while it was open"):
        read(reader, 0, 5, opened)


def test_an_answer_without_the_etag_it_had_is_not_believed(serve: Serve) -> None:
    honest = Honest(DATA)
    reader = reader_of(
        serve(lambda asked: honest(asked, ETag=None) if asked.range[0] >= 0 else honest(asked))
    )
    opened = reader.open(10, timeout=5)
    with pytest.raises(ReadError, match="without the ETag"):
        read(reader, 0, 5, opened)


def test_a_deleted_object_is_named(serve: Serve) -> None:
    honest: Any = Honest(DATA)
    server = serve(honest)
    reader = reader_of(server)
    opened = reader.open(10, timeout=5)
    server.answering = lambda asked: answer("404 Not Found")
    with pytest.raises(
        SnapshotNotFound, match=r"/x\.bin: 127.* has nothing under this URL \(404 Not Found\)"
    ):
        read(reader, 0, 5, opened)


# Empty objects, and servers without ranges from the end, or without ranges


@pytest.mark.parametrize("tells", [True, False])
def test_an_empty_object_is_no_error(serve: Serve, tells: bool) -> None:
    honest = Honest(b"")
    server = serve(
        lambda asked: (
            honest(asked) if tells or asked.method == "HEAD" else answer("416 Range Not Satisfiable")
        )
    )
    opened = reader_of(server).open(10, timeout=5)
    assert (opened.size, opened.tail) == (0, b"")
    assert [asked.method for asked in server.asked] == (["GET"] if tells else ["GET", "HEAD"])


def test_a_small_object_may_come_whole(serve: Serve) -> None:
    server = serve(lambda asked: answer("200 OK", DATA, ETag='"v1"'))
    reader = reader_of(server)
    opened = reader.open(len(DATA), timeout=5)
    assert (opened.size, opened.tail) == (len(DATA), DATA)
    assert len(server.asked) == 1
    assert read(reader, 0, len(DATA), opened) == DATA  # all of it was asked for
    with pytest.raises(ReadError, match="with the whole object"):
        read(reader, 1, 5, opened)


def test_a_server_that_knows_no_ranges_from_the_end_is_asked_for_the_size(serve: Serve) -> None:
    honest = Honest(DATA)

    def answering(asked: Asked) -> bytes:
        suffix = asked.method == "GET" and asked.range[0] < 0
        return answer("200 OK", DATA, ETag='"v1"') if suffix else honest(asked)

    server = serve(answering)
    opened = reader_of(server).open(100, timeout=5)
    assert (opened.size, opened.identity, opened.tail) == (len(DATA), '"v1"', DATA[-100:])
    assert [asked.method for asked in server.asked] == ["GET", "HEAD", "GET"]


def test_a_server_that_ignores_ranges_is_named(serve: Serve) -> None:
    big = b"x" * 1_000_000
    server = serve(
        lambda asked: answer("200 OK", big if asked.method == "GET" else b"", Content_Length=len(big))
    )
    with pytest.raises(ReadError, match="answers a request for a range with the whole object"):
        reader_of(server).open(100, timeout=5)


def test_an_endless_body_is_not_read(serve: Serve) -> None:
    def endless(asked: Asked) -> Iterable[bytes]:
        yield answer("200 OK", Content_Length=None)
        if asked.method == "GET":
            while True:
                yield b"x" * 65536

    with pytest.raises(ReadError, match="does not tell its size"):
        reader_of(serve(endless)).open(100, timeout=5)


# Broken and hostile answers


def with_headers(**changed: str | int | None) -> Callable[[Honest, Asked], bytes]:
    return lambda good, asked: good(asked, **changed)


def chunked(body: bytes) -> Callable[[Honest, Asked], bytes]:
    return lambda good, asked: (
        good(asked, Content_Length=None, Transfer_Encoding="chunked").removesuffix(DATA[:5]) + body
    )


def saying(answer: bytes) -> Callable[[Honest, Asked], bytes]:
    return lambda good, asked: answer


def twice(good: Honest, asked: Asked) -> bytes:
    return good(asked).replace(b"\r\nETag", b"\r\nContent-Range: bytes 0-4/9\r\nETag")


# What comes in answer to the first five bytes, what is raised, and what it says.
BROKEN: dict[str, tuple[Callable[[Honest, Asked], bytes], type[Exception], str]] = {
    "another range": (with_headers(Content_Range="bytes 1-5/10240"), ReadError, "server sent 1 to 6"),
    "less": (with_headers(Content_Range="bytes 0-3/10240"), ReadError, "server sent 0 to 4"),
    "no range": (with_headers(Content_Range=None), ReadError, "but not which"),
    "a range of nonsense": (with_headers(Content_Range="bytes 5-1/99"), ReadError, "but not which"),
    "a huge size": (with_headers(Content_Range="bytes 0-4/" + "9" * 20), ReadError, "but not which"),
    "an unknown size": (with_headers(Content_Range="bytes 0-4/*"), ReadError, "but not which"),
    "another size": (with_headers(Content_Range="bytes 0-4/9"), SnapshotChanged, "has 9 now"),
    "several ranges": (
        with_headers(Content_Range=None, Content_Type="multipart/byteranges; boundary=x"),
        ReadError,
        "but not which",
    ),
    "two sizes": (twice, ReadError, "two different values of content-range"),
    "a longer body": (with_headers(Content_Length=6), ReadError, "announced 6 bytes"),
    "a shorter body": (with_headers(Content_Length=4), ReadError, "announced 4 bytes"),
    "a length of nonsense": (with_headers(Content_Length="5, 5"), ReadError, "announced 5, 5"),
    "a negative length": (with_headers(Content_Length=-5), ReadError, "announced -5"),
    "more chunks": (chunked(b"5\r\n01234\r\n1\r\nx\r\n0\r\n\r\n"), ReadError, "sent more than the 5"),
    "a chunk of nonsense": (chunked(b"zz\r\n"), Transient, "not HTTP|ended too early"),
    "a huge chunk": (chunked(b"ffffffffffffffffff\r\n" + b"x" * 99), ReadError, "sent more than the 5"),
    "gzip": (with_headers(Content_Encoding="gzip"), ReadError, r"sends it encoded \(gzip\)"),
    "no HTTP": (saying(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), Transient, "not HTTP"),
    "a status of nonsense": (saying(b"HTTP/1.1 9x OK\r\n\r\n"), Transient, "not HTTP"),
    "a long line": (saying(b"HTTP/1.1 206 " + b"x" * 100_000), Transient, "not HTTP"),
    "many headers": (saying(b"HTTP/1.1 206 OK\r\n" + b"X-Y: z\r\n" * 5000), Transient, "not HTTP"),
    "a teapot": (saying(answer("418 I'm a teapot")), ReadError, "answered 418 I'm a teapot"),
    "escapes and secrets": (
        saying(answer("418 \x1b[31mno X-Amz-Signature=abcd")),
        ReadError,
        r"answered 418 \[31mno X-Amz-Signature=\.\.\.",
    ),
    "no right": (saying(answer("403 Forbidden")), AccessDenied, "refuses"),
    "no name": (saying(answer("401 Unauthorized")), AccessDenied, "wants to know who asks"),
    "busy": (saying(answer("503 Slow Down", Retry_After=7)), Transient, "503 Slow Down"),
    "too many": (saying(answer("429 Too Many Requests")), Transient, "429"),
    "not here": (saying(answer("505 HTTP Version Not Supported")), ReadError, "505"),
    "shorter now": (saying(answer("416 Range Not Satisfiable")), SnapshotChanged, "shorter"),
    "redirected to nowhere": (saying(answer("302 Found")), ReadError, "no http"),
    "redirected to a file": (saying(answer("302 Found", Location="file:///etc/x")), ReadError, "no http"),
    "redirected to nonsense": (saying(answer("302 Found", Location="http://[x")), ReadError, "no http"),
    "redirected in a circle": (saying(answer("302 Found", Location="/x.bin")), ReadError, "more than 5"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_is_an_error_that_says_so(serve: Serve, name: str) -> None:
    respond, kind, words = BROKEN[name]
    good = Honest(DATA)
    server = serve(good)
    reader = reader_of(server)
    opened = reader.open(10, timeout=5)
    server.answering = lambda asked: respond(good, asked)
    with pytest.raises(kind, match=words) as caught:
        read(reader, 0, 5, opened)
    assert str(caught.value).startswith(f"{server.endpoint}/x.bin: ")
    if name == "busy":
        assert isinstance(caught.value, Transient)
        assert (caught.value.status, caught.value.retry_after) == (503, 7.0)
    server.answering = good  # and it is over when the server mends its ways
    assert read(reader, 0, 5, opened) == DATA[:5]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda good, asked: good(asked, Content_Range="bytes 0-9/10240"),
        lambda good, asked: good(asked, Content_Range="bytes 10230-10238/10239"),
        lambda good, asked: good(asked, Content_Range=None),
        lambda good, asked: good(asked, Content_Length=9),
    ],
)
def test_a_wrong_tail_is_not_believed(serve: Serve, spoil: Callable[[Honest, Asked], bytes]) -> None:
    good = Honest(DATA)
    with pytest.raises(ReadError, match=r"the server (sent a range of|announced)"):
        reader_of(serve(lambda asked: spoil(good, asked))).open(10, timeout=5)


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("after", [0, 3])
def test_a_body_that_ends_early_may_be_asked_for_again(serve: Serve, after: int, reset: bool) -> None:
    good = Honest(DATA)
    server = serve(good)
    reader = reader_of(server)
    opened = reader.open(10, timeout=5)

    def torn(asked: Asked) -> Iterable[bytes]:
        yield good(asked)[: -len(DATA) + after]
        raise Hangup(reset)

    server.answering = torn
    with pytest.raises(Transient, match=r"ended after|broke"):
        read(reader, 0, len(DATA), opened)
    server.answering = good
    assert read(reader, 0, len(DATA), opened) == DATA


def test_a_body_without_a_length_is_read_to_its_end(serve: Serve) -> None:
    good = Honest(DATA)
    server = serve(good)
    reader = reader_of(server)
    opened = reader.open(10, timeout=5)

    def closing(asked: Asked) -> Iterable[bytes]:
        yield good(asked, Content_Length=None, Connection="close")
        raise Hangup

    server.answering = closing
    assert read(reader, 5, 90, opened) == DATA[5:95]


# Redirects, and what is sent to whom


def test_redirects_are_followed_with_the_range_and_without_the_secrets(serve: Serve) -> None:
    good = Honest(DATA)
    other = serve(good)
    first = serve(lambda asked: answer("302 Found", b"go", Location=f"{other.endpoint}/real?sig=hidden"))
    url = first.endpoint.replace("//", "//me:pass@") + "/x.bin"
    reader = reader_of(first, url, headers={"X-Api-Key": "hush"})
    opened = reader.open(10, timeout=5)
    assert opened.tail == DATA[-10:]
    basic = "Basic " + base64.b64encode(b"me:pass").decode()
    assert (first.asked[0].headers["authorization"], first.asked[0].headers["x-api-key"]) == (basic, "hush")
    assert other.asked[0].target == "/real?sig=hidden"
    assert other.asked[0].headers["range"] == "bytes=-10"
    assert not {"authorization", "x-api-key"} & other.asked[0].headers.keys()
    assert read(reader, 0, 5, opened) == DATA[:5]
    assert len(first.asked) == 1  # where it leads is known by now
    assert "pass" not in repr(reader) + reader.url


def test_a_redirect_within_the_host_keeps_the_headers(serve: Serve) -> None:
    good = Honest(DATA)
    server = serve(lambda asked: good(asked) if asked.target == "/b" else answer("307 x", Location="b"))
    reader_of(server, "/a", headers={"Authorization": "Bearer t"}).open(10, timeout=5)
    assert [asked.headers["authorization"] for asked in server.asked] == ["Bearer t"] * 2


def test_an_expired_redirect_is_asked_for_again(serve: Serve) -> None:
    good = Honest(DATA)
    valid = ["/one"]
    other = serve(lambda asked: good(asked) if asked.target == valid[0] else answer("403 Expired"))
    first = serve(lambda asked: answer("302 Found", Location=other.endpoint + valid[0]))
    reader = reader_of(first)
    opened = reader.open(10, timeout=5)
    valid[0] = "/two"
    assert read(reader, 0, 5, opened) == DATA[:5]
    assert [asked.target for asked in other.asked] == ["/one", "/one", "/two"]


def test_headers_of_the_caller_are_sent(serve: Serve) -> None:
    server = serve(Honest(DATA))
    reader_of(server, headers={"X-Api-Key": "k"}).open(10, timeout=5)
    assert server.asked[0].headers["x-api-key"] == "k"


@pytest.mark.parametrize(
    "headers", [{"X-Y": "secret\r\nX-Z: 1"}, {"X Y": "secret"}, {"Range": "secret"}, {"X-Y": "s\xe9cret"}]
)
def test_headers_that_cannot_be_sent_are_refused_without_their_value(headers: dict[str, str]) -> None:
    with pytest.raises(OptionError, match=r"^headers: ") as caught:
        store_for("https://host/x", StoreOptions(headers=headers)).reader("https://host/x")
    assert "cret" not in str(caught.value)


def test_odd_characters_of_a_url_are_sent_quoted(serve: Serve) -> None:
    server = serve(Honest(DATA))
    reader_of(server, "/a b/%20é?x=1 2#fragment").open(10, timeout=5)
    assert server.asked[0].target == "/a%20b/%20%C3%A9?x=1%202"


@pytest.mark.parametrize(
    "url", ["http://", "http:///x", "http://host:port/x", "http://[::1/x", "https://host:99999/"]
)
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(OptionError, match="is not a URL"):
        store_for(url, StoreOptions()).reader(url)


def test_a_query_is_sent_but_not_shown(serve: Serve) -> None:
    server = serve(lambda asked: answer("404 Not Found"))
    reader = reader_of(server, "/x?X-Amz-Signature=topsecret")
    with pytest.raises(SnapshotNotFound) as caught:
        reader.open(10, timeout=5)
    assert server.asked[0].target == "/x?X-Amz-Signature=topsecret"
    assert "topsecret" not in f"{caught.value}{caught.value.url}{reader!r}{reader.url}"


def test_http_is_read_only_and_lists_nothing() -> None:
    store: Store = store_for("https://host/x", StoreOptions())
    with pytest.raises(BuildError, match="https:// is read-only"):
        store.writer("https://me:secret@host/x")
    with pytest.raises(OptionError, match="cannot list a folder"):
        store.list("https://host/x/")
