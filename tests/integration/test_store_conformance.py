# SPDX-License-Identifier: Apache-2.0
"""One suite that every store passes: local files, S3 by each client, web servers."""

from __future__ import annotations

import os
import selectors
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import pytest

from lazymem.errors import AccessDenied, BuildError, OptionError, ReadError, SnapshotChanged, SnapshotNotFound
from lazymem.options import StoreOptions
from lazymem.store.base import Attempt, Reader, Store
from lazymem.store.remote import store_for

from ..unit.raw_server import Honest, RawServer, answer, read

if TYPE_CHECKING:
    from pathlib import Path

    from ..servers.nginx import Nginx
    from ..servers.proxy import HostileProxy
    from ..servers.s3 import Bucket

DATA = bytes(i * 7 % 251 for i in range(300_000))
MIB = 1 << 20


class Place(Protocol):
    """A store under test, and its back door. objects: the names of all that are there.

    names: the same, and nothing is left of what never became one.
    """

    client: str

    def url(self, name: str) -> str: ...
    def options(self) -> StoreOptions: ...
    def put(self, name: str, data: bytes) -> None: ...
    def get(self, name: str) -> bytes: ...
    def delete(self, name: str) -> None: ...
    def objects(self) -> set[str]: ...
    def names(self) -> set[str]: ...


class LocalPlace:
    client = "local"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def url(self, name: str) -> str:
        return str(self._folder / name)

    def options(self) -> StoreOptions:
        return StoreOptions()

    def put(self, name: str, data: bytes) -> None:
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = self._folder / "new"
        new.write_bytes(data)
        new.rename(path)

    def get(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def delete(self, name: str) -> None:
        (self._folder / name).unlink()

    def objects(self) -> set[str]:
        return {str(path.relative_to(self._folder)) for path in self._folder.rglob("*") if path.is_file()}

    names = objects


class S3Place:
    def __init__(self, s3: Bucket, client: str) -> None:
        self._s3 = s3
        self._choice = client
        self.client = {"auto": "http.client"}.get(client, client)

    def url(self, name: str) -> str:
        return self._s3.url(name)

    def options(self) -> StoreOptions:
        return StoreOptions.from_environment({"client": self._choice})

    def put(self, name: str, data: bytes) -> None:
        self._s3.put(name, data)

    def get(self, name: str) -> bytes:
        return self._s3.get(name)

    def delete(self, name: str) -> None:
        self._s3.delete(name)

    def objects(self) -> set[str]:
        return set(self._s3.keys())

    def names(self) -> set[str]:
        assert not self._s3.uploads()
        return self.objects()


class PublicPlace(S3Place):
    """Objects of S3 that everybody may read, by plain URL."""

    def __init__(self, s3: Bucket) -> None:
        super().__init__(s3, "auto")
        # Every object of the bucket, also what is put later.
        policy = (
            '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": "*", '
            f'"Action": ["s3:GetObject", "s3:ListBucket"], "Resource": ["arn:aws:s3:::{s3.bucket}/*", '
            f'"arn:aws:s3:::{s3.bucket}"]}}]}}'
        )
        s3.client.put_bucket_policy(Bucket=s3.bucket, Policy=policy)

    def url(self, name: str) -> str:
        return f"{self._s3.endpoint}/{self._s3.bucket}/{quote(name)}"


class NginxPlace:
    client = "http.client"

    def __init__(self, nginx: Nginx, folder: str, base: str) -> None:
        self._nginx = nginx
        self._folder = folder
        self._base = base
        self._seconds = 1_700_000_000

    def url(self, name: str) -> str:
        return f"{self._base}/{self._folder}/{quote(name)}"

    def options(self) -> StoreOptions:
        return StoreOptions.from_environment({"ca_bundle": str(self._nginx.certificate)})

    def put(self, name: str, data: bytes) -> None:
        self._nginx.put(f"{self._folder}/{name}", data)
        # nginx's ETag is made of size and seconds: what is replaced within one looks the same to it.
        self._seconds += 1
        os.utime(self._nginx.root / self._folder / name, (self._seconds, self._seconds))

    def get(self, name: str) -> bytes:
        return (self._nginx.root / self._folder / name).read_bytes()

    def delete(self, name: str) -> None:
        (self._nginx.root / self._folder / name).unlink()

    def objects(self) -> set[str]:
        return {path.name for path in (self._nginx.root / self._folder).iterdir()}

    names = objects


PLACES = ("local", "s3", "s3-boto3", "s3-obstore", "http-radosgw", "http-nginx", "https-nginx")


def make_place(kind: str, request: pytest.FixtureRequest) -> Place:
    folder: Path = request.getfixturevalue("tmp_path")
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    if kind == "local":
        return LocalPlace(folder)
    if "nginx" in kind:
        nginx: Nginx = request.getfixturevalue("nginx")
        base = nginx.tls_endpoint if kind.startswith("https") else nginx.endpoint
        return NginxPlace(nginx, folder.name, base)
    s3: Bucket = request.getfixturevalue("s3")
    return PublicPlace(s3) if kind == "http-radosgw" else S3Place(s3, kind.partition("-")[2] or "auto")


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Place:
    return make_place(request.param, request)


@pytest.fixture(params=["local", "s3"])
def writing(request: pytest.FixtureRequest) -> Place:
    """A store that writes; S3 does so in one way, whoever reads."""
    return make_place(request.param, request)


def store_of(place: Place) -> Store:
    return store_for(place.url("x"), place.options())


@pytest.fixture
def reader_of(place: Place) -> Iterator[Callable[[str], Reader]]:
    """Readers of objects by name, closed with the test."""
    readers: list[Reader] = []

    def make(name: str) -> Reader:
        readers.append(store_of(place).reader(place.url(name)))
        return readers[-1]

    yield make
    for reader in readers:
        reader.close()
        reader.close()


ReaderOf = Callable[[str], Reader]


# Reading


def test_open_tells_size_identity_and_tail(place: Place, reader_of: ReaderOf) -> None:
    place.put("a", DATA)
    reader = reader_of("a")
    attempt = Attempt()
    opened = reader.open(1000, timeout=10, attempt=attempt)
    assert (opened.size, opened.tail) == (len(DATA), DATA[-1000:])
    assert opened.identity
    assert opened == reader.open(1000, timeout=10)
    if place.client != "local":
        assert (attempt.requests, attempt.received) == (1, 1000)
    assert reader.client == place.client
    assert reader.url == place.url("a")


@pytest.mark.parametrize("tail", [0, 1, 65536, 300_000, 400_000])
def test_the_tail_is_what_there_is_of_it(place: Place, reader_of: ReaderOf, tail: int) -> None:
    place.put("a", DATA)
    assert reader_of("a").open(tail, timeout=10).tail == DATA[max(0, len(DATA) - tail) :]


def test_an_empty_object_has_no_bytes(place: Place, reader_of: ReaderOf) -> None:
    place.put("empty", b"")
    reader = reader_of("empty")
    opened = reader.open(100, timeout=10)
    assert (opened.size, opened.tail) == (0, b"")
    assert read(reader, 0, 0, opened) == b""
    with pytest.raises(ReadError):
        read(reader, 0, 1, opened)


def test_ranges_are_the_bytes_that_were_asked_for(place: Place, reader_of: ReaderOf) -> None:
    place.put("a", DATA)
    reader = reader_of("a")
    opened = reader.open(10, timeout=10)
    for offset, length in ((0, 1), (0, len(DATA)), (1, 8191), (8191, 8193), (len(DATA) - 1, 1), (5, 0)):
        assert read(reader, offset, length, opened) == DATA[offset : offset + length]


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (299_999, 2), (300_000, 1), (1 << 65, 1)])
def test_a_range_outside_is_an_error(place: Place, reader_of: ReaderOf, offset: int, length: int) -> None:
    place.put("a", DATA)
    reader = reader_of("a")
    opened = reader.open(10, timeout=10)
    with pytest.raises(ReadError, match="the object has 300000"):
        read(reader, offset, length, opened)


def test_threads_share_a_reader(place: Place, reader_of: ReaderOf) -> None:
    place.put("a", DATA)
    reader = reader_of("a")
    opened = reader.open(10, timeout=10)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(12):
            offset = (seed * 7919 + i * 104_729) % (len(DATA) - 20_000)
            if read(reader, offset, 20_000, opened, timeout=30) != DATA[offset : offset + 20_000]:
                wrong.append(offset)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_there_is_not_found(place: Place, reader_of: ReaderOf) -> None:
    with pytest.raises(SnapshotNotFound) as caught:
        reader_of("missing").open(10, timeout=10)
    assert str(caught.value).startswith(place.url("missing"))
    assert caught.value.url == place.url("missing")


def test_another_version_is_never_read(place: Place, reader_of: ReaderOf) -> None:
    place.put("a", DATA)
    reader = reader_of("a")
    opened = reader.open(10, timeout=10)
    assert read(reader, 0, 10, opened) == DATA[:10]
    place.put("a", DATA[::-1])
    with pytest.raises(SnapshotChanged):
        read(reader, 0, 10, opened)
    again = reader_of("a")
    opened = again.open(10, timeout=10)
    assert opened.tail == DATA[:10][::-1]
    place.put("a", DATA[:100])
    with pytest.raises(SnapshotChanged):
        read(again, 200, 10, opened)


def test_a_deleted_object_is_not_found(place: Place, reader_of: ReaderOf) -> None:
    place.put("a", DATA)
    reader = reader_of("a")
    opened = reader.open(10, timeout=10)
    place.delete("a")
    with pytest.raises(SnapshotNotFound):
        read(reader, 0, 10, opened)


@pytest.mark.parametrize(
    "name",
    ["a b", "a%20b", "a+b", "é", "a?b=c", "a#b", "a&b;c", "sub/folder/x.lzm", "~", "a'b\"c", "a\\b", "%"],
)
def test_names_are_taken_as_they_stand(place: Place, reader_of: ReaderOf, name: str) -> None:
    place.put(name, name.encode())
    assert reader_of(name).open(100, timeout=10).tail == name.encode()


def test_an_aborted_attempt_ends_and_its_buffer_is_left_alone(place: Place, reader_of: ReaderOf) -> None:
    place.put("a", DATA)
    reader = reader_of("a")
    opened = reader.open(10, timeout=10)
    attempt = Attempt()
    assert not attempt.abort()
    out = bytearray(1000)
    with pytest.raises(Exception, match="broken off"):
        reader.read_into(0, memoryview(out), opened, attempt, timeout=10)
    assert not any(out)
    assert read(reader, 0, 1000, opened) == DATA[:1000]


# Writing


@pytest.mark.parametrize("url", ["http://me:secret@host/x", "https://host/x", "gs://bucket/x", "az://box/x"])
def test_some_stores_are_for_reading(url: str) -> None:
    with pytest.raises(BuildError, match="is read-only") as caught:
        store_for(url, StoreOptions()).writer(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 100_000, 8 * MIB - 1, 8 * MIB, 8 * MIB + 1, 21 * MIB + 5])
def test_what_was_written_appears_when_it_is_whole(writing: Place, size: int) -> None:
    data = (DATA * (size // len(DATA) + 1))[:size]
    with store_of(writing).writer(writing.url("new")) as target:
        for begin in range(0, size, 3 * MIB + 7):
            assert target.file.write(data[begin : begin + 3 * MIB + 7])
        assert target.file.tell() == size
        target.file.flush()
        assert "new" not in writing.objects()
    assert writing.names() == {"new"}
    assert writing.get("new") == data


@pytest.mark.parametrize("size", [0, 1000, 9 * MIB, 30 * MIB])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_leaves_nothing(writing: Place, kind: type[BaseException], size: int) -> None:
    def work() -> None:
        with store_of(writing).writer(writing.url("new")) as target:
            target.file.write(bytes(size))
            raise kind

    with pytest.raises(kind):
        work()
    assert writing.names() == set()


def test_what_stood_there_stays_until_the_end(writing: Place) -> None:
    writing.put("a", b"before")
    with store_of(writing).writer(writing.url("a")) as target:
        target.file.write(bytes(9 * MIB))
        assert writing.get("a") == b"before"
    assert writing.get("a") == bytes(9 * MIB)


@pytest.mark.parametrize("size", [10, 9 * MIB])
def test_what_exists_is_not_overwritten_unless_that_is_said(writing: Place, size: int) -> None:
    writing.put("a", b"before")

    def work(meanwhile: bool) -> None:
        with store_of(writing).writer(writing.url("a"), overwrite=False) as target:
            target.file.write(bytes(size))
            if meanwhile:
                writing.put("a", b"meanwhile")

    with pytest.raises(BuildError, match=r"/a: exists already"):
        work(False)
    assert writing.get("a") == b"before"
    writing.delete("a")
    with pytest.raises(BuildError, match=r"/a: exists already"):
        work(True)
    assert writing.get("a") == b"meanwhile"
    assert writing.names() == {"a"}
    writing.delete("a")
    work(False)
    assert writing.get("a") == bytes(size)


# Listing


def test_a_list_has_the_names_in_order_and_no_deeper_ones(writing: Place) -> None:
    for name in ("f/b", "f/a c", "f/Z", "f/sub/x", "f/sub/y/z", "f/é", "g", "f.x/y"):
        writing.put(name, b"x")
    expected = ["Z", "a c", "b", "sub/", "é"]
    assert list(store_of(writing).list(writing.url("f/"))) == expected
    assert list(store_of(writing).list(writing.url("f"))) == expected
    assert list(store_of(writing).list(writing.url("f/sub/"))) == ["x", "y/"]
    with pytest.raises(SnapshotNotFound):
        list(store_of(writing).list(writing.url("nowhere/")))


# S3 alone


def test_a_long_list_comes_in_pages(s3: Bucket) -> None:
    names = [f"{i:04}" for i in range(1003)]
    for name in names:
        s3.put(f"many/{name}", b"")
    assert list(store_for(s3.url("x"), StoreOptions.from_environment()).list(s3.url("many/"))) == names


def test_a_bucket_may_be_listed_whole_and_empty(s3: Bucket) -> None:
    store = store_for(s3.url("x"), StoreOptions.from_environment())
    assert list(store.list(f"s3://{s3.bucket}")) == []
    s3.put("a/b", b"x")
    assert list(store.list(f"s3://{s3.bucket}/")) == ["a/"]
    with pytest.raises(SnapshotNotFound, match="has no bucket 'nobody-has-this'"):
        store.list("s3://nobody-has-this/x/")


@pytest.mark.parametrize("client", ["auto", "boto3", "obstore"])
def test_open_is_one_request_and_each_range_another(s3: Bucket, proxy: HostileProxy, client: str) -> None:
    s3.put("a", DATA)
    s3.through(proxy)
    reader = store_for(s3.url("a"), StoreOptions.from_environment({"client": client})).reader(s3.url("a"))
    assert not proxy.log
    opened = reader.open(65536, timeout=10)
    assert len(proxy.log) == 1
    for i in range(5):
        assert read(reader, i * 1000, 1000, opened) == DATA[i * 1000 : i * 1000 + 1000]
    assert len(proxy.log) == 6
    assert all(request.status == 206 for request in proxy.log)
    assert all(request.headers["if-match"] == opened.identity for request in proxy.log[1:])
    reader.close()


def test_keys_that_obstore_cannot_name_are_refused_by_it_and_by_no_other(s3: Bucket) -> None:
    for key in ("a//b", "/a", "a/", "a/../b"):
        s3.put(key, key.encode())
        for client in ("http", "boto3", "obstore"):
            store = store_for(s3.url("x"), StoreOptions.from_environment({"client": client}))
            if client == "obstore":
                with pytest.raises(OptionError, match="obstore cannot name"):
                    store.reader(s3.url(key))
            else:
                reader = store.reader(s3.url(key))
                assert reader.open(10, timeout=10).tail == key.encode()
                reader.close()


@pytest.mark.parametrize("client", ["auto", "boto3", "obstore"])
@pytest.mark.parametrize("what", ["key", "secret"])
def test_wrong_credentials_are_told_apart(s3: Bucket, client: str, what: str) -> None:
    given = {
        "access_key_id": "NOBODY" if what == "key" else s3.credentials.access_key,
        "secret_access_key": "wrong-and-secret",
        "client": client,
    }
    s3.put("a", b"x")
    reader = store_for(s3.url("a"), StoreOptions.from_environment(given)).reader(s3.url("a"))
    words = "does not know the access key" if what == "key" else "the secret key from storage_options"
    with pytest.raises(AccessDenied, match=words) as caught:
        reader.open(10, timeout=10)
    assert "wrong-and-secret" not in str(caught.value)
    reader.close()


# TLS


@pytest.mark.parametrize(
    ("given", "environment", "trusted"),
    [
        ({}, {}, False),
        ({"ca_bundle": "{certificate}"}, {}, True),
        ({"ca_bundle": False}, {}, True),
        ({}, {"SSL_CERT_FILE": "{certificate}"}, True),
        ({}, {"REQUESTS_CA_BUNDLE": "{certificate}"}, True),
        ({"ca_bundle": "{other}"}, {"SSL_CERT_FILE": "{certificate}"}, False),
    ],
)
def test_whom_tls_trusts(
    nginx: Nginx, given: dict[str, Any], environment: dict[str, str], trusted: bool
) -> None:
    other = ssl.get_default_verify_paths().cafile or str(nginx.certificate)
    if other == str(nginx.certificate) and "{other}" in given.values():
        pytest.skip("this machine has no other certificates")

    def filled(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: text.format(certificate=nginx.certificate, other=other) if isinstance(text, str) else text
            for name, text in values.items()
        }

    nginx.put("tls", DATA)
    url = f"{nginx.tls_endpoint}/tls"
    reader = store_for(url, StoreOptions(**filled(given), environment=filled(environment))).reader(url)
    if trusted:
        assert reader.open(10, timeout=10).tail == DATA[-10:]
    else:
        with pytest.raises(ReadError, match=r"certificate of localhost:\d+ is not to be trusted .*ca_bundle"):
            reader.open(10, timeout=10)
    reader.close()


@pytest.fixture
def authority(nginx: Nginx, tmp_path: Path) -> Path:
    """An authority's certificate; beside it `leaf.pem`, which it has signed for 127.0.0.1, and `key.pem`.

    obstore trusts no certificate that is its own authority, as nginx's is. (That one brought openssl.)
    """
    (tmp_path / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -days 9 -subj /CN=authority -keyout ca.key -out ca.pem",
        "req -newkey rsa:2048 -nodes -subj /CN=leaf -keyout key.pem -out leaf.csr",
        "x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile names -out leaf.pem",
    ):
        subprocess.run(["openssl", *command.split()], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path / "ca.pem"


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")  # as the options want it
@pytest.mark.parametrize("client", ["auto", "boto3", "obstore"])
def test_every_client_of_s3_trusts_whom_the_options_name(authority: Path, client: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.with_name("leaf.pem"), authority.with_name("key.pem"))
    with RawServer(Honest(DATA, modified="Tue, 24 Nov 2026 02:42:21 GMT"), context) as server:
        base = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_ENDPOINT_URL": server.endpoint}
        certificate = str(authority)
        for environment, given in (
            ({"AWS_CA_BUNDLE": certificate}, {}),
            ({"SSL_CERT_FILE": certificate}, {}),
            ({}, {"ca_bundle": certificate}),
            ({}, {"ca_bundle": False}),
            ({}, {}),
        ):
            options = StoreOptions(client=client, environment={**base, **environment}, **given)  # type: ignore[arg-type]
            reader = store_for("s3://bucket/key", options).reader("s3://bucket/key")
            if environment or given:
                assert reader.open(100, timeout=10).tail == DATA[-100:]
            else:
                with pytest.raises(ReadError, match="trust"):
                    reader.open(100, timeout=10)
            reader.close()


def test_a_certificate_of_another_host_is_not_trusted(nginx: Nginx) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(nginx.certificate, nginx.certificate.with_name("key.pem"))
    options = StoreOptions(ca_bundle=str(nginx.certificate))
    for host, trusted in (("127.0.0.1", True), ("127.0.0.2", False)):
        with RawServer(Honest(DATA), context, host) as server:
            reader = store_for(server.endpoint, options).reader(server.endpoint)
            if trusted:
                assert reader.open(10, timeout=10).tail == DATA[-10:]
            else:
                with pytest.raises(ReadError, match=r"not to be trusted .*127\.0\.0\.2"):
                    reader.open(10, timeout=10)
                assert not server.asked
            reader.close()


def test_a_redirect_from_https_to_http_is_not_followed(nginx: Nginx) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(nginx.certificate, nginx.certificate.with_name("key.pem"))
    with RawServer(Honest(DATA)) as plain:
        redirecting = RawServer(lambda asked: answer("302 Found", Location=f"{plain.endpoint}/x"), context)
        with redirecting as server:
            options = StoreOptions(ca_bundle=str(nginx.certificate))
            reader = store_for(server.endpoint, options).reader(server.endpoint)
            with pytest.raises(ReadError, match="redirects from https:// to http://"):
                reader.open(10, timeout=10)
            reader.close()
        assert not plain.asked


class Tunnel:
    """A proxy that connects one client to whom it names, and remembers the request's head."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://me:pass@127.0.0.1:{self._listener.getsockname()[1]}"
        self.head = b""
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        with client, client.makefile("rb", buffering=0) as lines:
            while not self.head.endswith(b"\r\n\r\n"):
                self.head += lines.readline()
            host, _, port = self.head.split()[1].decode().rpartition(":")
            with socket.create_connection((host, int(port))) as server:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                with selectors.DefaultSelector() as ready:
                    ready.register(client, selectors.EVENT_READ, server)
                    ready.register(server, selectors.EVENT_READ, client)
                    while True:
                        for key, _ in ready.select():
                            piece = key.fileobj.recv(65536)  # type: ignore[union-attr]
                            if not piece:
                                return
                            key.data.sendall(piece)

    def close(self) -> None:
        self._thread.join()
        self._listener.close()


def test_tls_through_a_proxy(nginx: Nginx) -> None:
    nginx.put("tunnelled", DATA)
    url = f"{nginx.tls_endpoint}/tunnelled"
    proxy = Tunnel()
    options = StoreOptions(ca_bundle=str(nginx.certificate), environment={"HTTPS_PROXY": proxy.endpoint})
    reader = store_for(url, options).reader(url)
    opened = reader.open(100, timeout=10)
    assert read(reader, 3, 200_000, opened) == DATA[3:200_003]
    reader.close()
    proxy.close()
    assert proxy.head.startswith(f"CONNECT localhost:{nginx.tls_port} HTTP/1.1\r\n".encode())
    assert b"Proxy-Authorization: Basic bWU6cGFzcw==\r\n" in proxy.head
