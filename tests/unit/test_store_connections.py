# SPDX-License-Identifier: Apache-2.0
"""Connections: kept, found dead, broken off wherever they wait; and nobody gets another's answer."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from lazymem.errors import OptionError, ReadError, SnapshotChanged
from lazymem.options import StoreOptions
from lazymem.store import dial
from lazymem.store.base import Attempt, Opened, Transient
from lazymem.store.connections import _Connection
from lazymem.store.origin import split_url
from lazymem.store.proxies import Proxy, proxy_for
from lazymem.store.remote import store_for

from .raw_server import Answering, Asked, Hangup, Honest, RawServer, answer, read

DATA = bytes(range(256)) * 400
OPENED = Opened(len(DATA), '"v1"', b"")
Serve = Callable[[Answering], RawServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that end with the test."""
    with ExitStack() as stack:
        yield lambda answering: stack.enter_context(RawServer(answering))


_readers: list[Any] = []


@pytest.fixture(autouse=True)
def _close_readers() -> Iterator[None]:
    yield
    while _readers:
        _readers.pop().close()


def reader_at(url: str, **options: Any) -> Any:
    """A reader that is closed with the test."""
    _readers.append(store_for(url, StoreOptions(**options)).reader(url))
    return _readers[-1]


def idle(reader: Any) -> int:
    return sum(len(kept) for kept in reader._connections._kept.values())


# Kept connections


def test_a_connection_that_the_server_closed_is_replaced_silently(serve: Serve) -> None:
    server = serve(Honest(DATA))
    reader = reader_at(server.endpoint)
    reader.open(10, timeout=5)
    server.hang_up()
    assert read(reader, 0, 9, OPENED) == DATA[:9]
    assert [asked.connection for asked in server.asked] == [0, 1]


@pytest.mark.parametrize("reset", [True, False])
def test_a_connection_that_dies_as_it_is_used_again_is_replaced_once(serve: Serve, reset: bool) -> None:
    good = Honest(DATA)

    def answering(asked: Asked) -> bytes:
        if asked.connection == 0 and len(server.asked) > 1:
            raise Hangup(reset)
        return good(asked)

    server = serve(answering)
    reader = reader_at(server.endpoint)
    reader.open(10, timeout=5)
    attempt = Attempt()
    out = bytearray(9)
    reader.read_into(0, memoryview(out), OPENED, attempt, timeout=5)
    assert out == DATA[:9]
    assert attempt.requests == 2


def test_a_new_connection_that_dies_is_not_tried_again(serve: Serve) -> None:
    def answering(asked: Asked) -> bytes:
        raise Hangup

    server = serve(answering)
    with pytest.raises(Transient, match="broke"):
        reader_at(server.endpoint).open(10, timeout=5)
    assert len(server.asked) == 1


def test_what_a_server_says_unasked_is_nobody_s_answer(serve: Serve) -> None:
    good = Honest(DATA)
    answered, said = threading.Event(), threading.Event()

    def answering(asked: Asked) -> Iterable[bytes]:
        yield good(asked)
        if asked.connection == 0 and not said.is_set():
            answered.wait(10)
            yield answer("206 Partial Content", b"wrong", ETag='"v1"', Content_Range="bytes 0-4/102400")
            said.set()

    server = serve(answering)
    reader = reader_at(server.endpoint)
    reader.open(10, timeout=5)
    answered.set()
    assert said.wait(10)
    assert read(reader, 0, 5, OPENED) == DATA[:5]


def test_an_answer_that_was_left_is_not_the_next_one_s(serve: Serve) -> None:
    good = Honest(DATA)
    left = threading.Event()

    def answering(asked: Asked) -> Iterable[bytes]:
        whole = good(asked)
        if asked.connection == 0:  # the body comes when nobody waits for it any more
            yield whole[:-90_000].replace(b"/102400", b"/102399")
            left.wait(10)
            yield whole[-90_000:]
        else:
            yield whole

    server = serve(answering)
    reader = reader_at(server.endpoint)
    with pytest.raises(SnapshotChanged):
        read(reader, 0, 90_000, OPENED)
    assert read(reader, 1, 90_000, OPENED) == DATA[1:90_001]
    assert [asked.connection for asked in server.asked] == [0, 1]
    left.set()


def test_connections_are_given_back_and_closed_with_the_last_reader(serve: Serve) -> None:
    server = serve(Honest(DATA))
    first, second = reader_at(server.endpoint), reader_at(server.endpoint)
    first.open(10, timeout=5)
    second.open(10, timeout=5)
    assert {asked.connection for asked in server.asked} == {0}
    first.close()
    first.close()
    assert idle(second) == 1
    second.close()
    assert idle(second) == 0


def test_threads_get_their_own_answers(serve: Serve) -> None:
    reader = reader_at(serve(Honest(DATA)).endpoint)
    failures: queue.SimpleQueue[str] = queue.SimpleQueue()

    def work(seed: int) -> None:
        for i in range(60):
            offset = (seed * 7919 + i * 104729) % (len(DATA) - 5000)
            if read(reader, offset, 5000, OPENED) != DATA[offset : offset + 5000]:
                failures.put(f"{seed} {i}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures.empty()


# Breaking off, and time-outs


class Running:
    """An attempt on a thread."""

    def __init__(self, reader: Any, length: int = 1000, timeout: float = 60.0) -> None:
        self.attempt = Attempt()
        self.error: BaseException | None = None
        self._reader, self._timeout = reader, timeout
        self.out = bytearray(length)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._reader.read_into(0, memoryview(self.out), OPENED, self.attempt, timeout=self._timeout)
        except BaseException as error:
            self.error = error

    def wait_bound(self) -> None:
        while self.attempt._unblock is None:
            assert self._thread.is_alive(), self.error

    def ended(self) -> BaseException | None:
        """What it raised; it has to end soon, though its time-out is a minute."""
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.error


def assert_broken_off(running: Running) -> None:
    assert running.attempt.abort()
    error = running.ended()
    assert isinstance(error, Transient)
    assert "broken off" in str(error)
    assert running.attempt._unblock is None


@pytest.fixture
def deaf() -> Iterator[int]:
    """A port whose connections are neither accepted nor refused: its queue is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_abort_while_connecting(deaf: int) -> None:
    running = Running(reader_at(f"http://127.0.0.1:{deaf}/"))
    running.wait_bound()
    assert_broken_off(running)


def test_time_out_while_connecting(deaf: int) -> None:
    with pytest.raises(Transient, match=r"nothing came from 127\.0\.0\.1:\d+ for 0\.2 s"):
        reader_at(f"http://127.0.0.1:{deaf}/").open(10, timeout=0.2)


@pytest.fixture
def hanging_resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    release = threading.Event()
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *rest: Any, **more: Any) -> Any:
        if host == "hanging.test" and not more.get("flags"):
            release.wait()
            raise socket.gaierror(socket.EAI_AGAIN, "no")
        return real(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    release.set()


@pytest.mark.usefixtures("hanging_resolver")
def test_abort_while_the_name_is_looked_up() -> None:
    running = Running(reader_at("http://hanging.test/"))
    running.wait_bound()
    assert_broken_off(running)


@pytest.mark.usefixtures("hanging_resolver")
def test_time_out_while_the_name_is_looked_up() -> None:
    with pytest.raises(Transient, match=r"nothing came from hanging\.test"):
        reader_at("http://hanging.test/").open(10, timeout=0.2)


def test_abort_in_the_handshake() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = Running(reader_at(f"https://127.0.0.1:{listener.getsockname()[1]}/"))
        sock, _ = listener.accept()
        with sock:
            assert sock.recv(1)  # the handshake has begun
            assert_broken_off(running)


@pytest.mark.parametrize("sent", [0, 500], ids=["before the head", "in the body"])
def test_abort_while_waiting_for_bytes(serve: Serve, sent: int) -> None:
    waiting, leave = threading.Event(), threading.Event()
    good = Honest(DATA)

    def answering(asked: Asked) -> Iterable[bytes]:
        if sent:
            yield good(asked)[:-sent]
        waiting.set()
        leave.wait(30)

    running = Running(reader_at(serve(answering).endpoint))
    assert waiting.wait(10)
    assert_broken_off(running)
    leave.set()
    if sent == 0:
        assert not any(running.out)


def test_an_attempt_that_was_aborted_before_sends_nothing_more(serve: Serve) -> None:
    server = serve(Honest(DATA))
    reader = reader_at(server.endpoint)
    for kept in (0, 1):  # without, and with a connection to use
        attempt = Attempt()
        assert not attempt.abort()
        out = bytearray(100)
        with pytest.raises(Transient, match="broken off"):
            reader.read_into(0, memoryview(out), OPENED, attempt, timeout=5)
        assert not any(out)
        assert len(server.asked) == kept
        reader.open(10, timeout=5)


@pytest.mark.parametrize("sent", [0, 500])
def test_time_out_counts_from_the_last_byte(serve: Serve, sent: int) -> None:
    leave = threading.Event()
    good = Honest(DATA)

    def answering(asked: Asked) -> Iterable[bytes]:
        if sent:
            yield good(asked)[:-sent]
        leave.wait(30)

    with pytest.raises(Transient, match=r"nothing came from 127\.0\.0\.1:\d+ for 0\.2 s"):
        read(reader_at(serve(answering).endpoint), 0, 1000, OPENED, timeout=0.2)
    leave.set()


def test_a_slow_body_is_no_time_out(serve: Serve) -> None:
    good = Honest(DATA)
    pause = threading.Event()

    def answering(asked: Asked) -> Iterable[bytes]:
        whole = good(asked)
        for begin in range(0, len(whole), 200):
            yield whole[begin : begin + 200]
            pause.wait(0.05)

    assert read(reader_at(serve(answering).endpoint), 0, 2000, OPENED, timeout=0.5) == DATA[:2000]


# Who cannot be reached


def test_a_port_where_nobody_listens_may_come_back() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(Transient, match=f"127.0.0.1:{port} refuses connections"):
        reader_at(f"http://127.0.0.1:{port}/").open(10, timeout=5)


def test_a_host_without_an_address_may_come_back() -> None:
    with pytest.raises(Transient, match=r"the host no-such-host\.invalid cannot be found"):
        reader_at("http://no-such-host.invalid/x").open(10, timeout=20)


@pytest.mark.parametrize("host", ["a" * 80, "a..b", "\u3002"])
def test_a_host_that_can_be_none_is_refused(host: str) -> None:
    with pytest.raises(OptionError, match="not the name of a host"):
        reader_at(f"http://{host}/x").open(10, timeout=5)


def test_the_next_address_is_tried(monkeypatch: pytest.MonkeyPatch, serve: Serve, deaf: int) -> None:
    server = serve(Honest(DATA))
    kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    found = [(*kind, ("127.0.0.1", deaf)), (*kind, ("127.0.0.1", server.port))]
    monkeypatch.setattr(dial, "_look_up", lambda *given: found)
    assert reader_at("http://two-addresses.test/x").open(10, timeout=3).tail == DATA[-10:]
    assert server.asked[0].headers["host"] == "two-addresses.test"


def test_a_server_that_speaks_no_tls_is_named() -> None:
    def serve_one(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock:
            sock.recv(100_000)
            sock.sendall(answer("400 Bad Request"))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_one, args=(listener,))
        thread.start()
        with pytest.raises(ReadError, match="does not speak TLS"):
            reader_at(f"https://127.0.0.1:{listener.getsockname()[1]}").open(10, timeout=5)
        thread.join()


@pytest.mark.parametrize("bundle", ["/nowhere/ca.pem", __file__])
def test_certificates_that_cannot_be_read_are_named(serve: Serve, bundle: str) -> None:
    url = serve(Honest(DATA)).endpoint.replace("http:", "https:")
    with pytest.raises(OptionError, match="cannot be read") as caught:
        reader_at(url, ca_bundle=bundle).open(10, timeout=5)
    assert bundle in str(caught.value)


# Proxies


@pytest.mark.parametrize(
    ("environment", "proxied"),
    [
        ({}, None),
        ({"https_proxy": "http://p:1"}, "p:1"),
        ({"HTTPS_PROXY": "http://p:1"}, "p:1"),
        ({"HTTPS_PROXY": "p:1"}, "p:1"),
        ({"HTTPS_PROXY": "http://p"}, "p:80"),
        ({"HTTPS_PROXY": "http://P:1", "https_proxy": "http://low:2"}, "low:2"),
        ({"HTTP_PROXY": "http://p:1"}, None),
        ({"ALL_PROXY": "http://p:1"}, "p:1"),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "*"}, None),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "other, data.example.org"}, None),
        ({"HTTPS_PROXY": "http://p:1", "no_proxy": ".example.org"}, None),
        ({"HTTPS_PROXY": "http://p:1", "no_proxy": "EXAMPLE.org:443"}, None),
        ({"HTTPS_PROXY": "http://p:1", "no_proxy": "example.org:80"}, "p:1"),
        ({"HTTPS_PROXY": "http://p:1", "no_proxy": "ample.org"}, "p:1"),
        ({"HTTPS_PROXY": "http://p:1", "no_proxy": ",10.0.0.0/8,"}, "p:1"),
    ],
)
def test_proxy_by_environment(environment: dict[str, str], proxied: str | None) -> None:
    found = proxy_for("https", "data.example.org", 443, environment)
    assert (None if found is None else f"{found.host}:{found.port}") == proxied


@pytest.mark.parametrize("entry", ["10.0.0.0/8", "10.1.2.3", "10.1.2.3:80", "10.1.2.0/30"])
def test_proxy_is_passed_by_for_addresses_and_networks(entry: str) -> None:
    environment = {"http_proxy": "http://p:1", "no_proxy": entry}
    assert proxy_for("http", "10.1.2.3", 80, environment) is None
    assert proxy_for("http", "11.1.2.3", 80, environment) == Proxy("p", 1)


@pytest.mark.parametrize(
    "url", ["socks5://me:secret@p:1", "https://me:secret@p:1", "http://me:secret@p:x", "http://"]
)
def test_a_proxy_that_cannot_be_used_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(OptionError, match="HTTPS_PROXY names a proxy") as caught:
        proxy_for("https", "host", 443, {"HTTPS_PROXY": url})
    assert "secret" not in str(caught.value)


def test_a_request_goes_through_the_proxy(serve: Serve) -> None:
    proxy = serve(Honest(DATA))
    environment = {"HTTP_PROXY": proxy.endpoint.replace("//", "//me:secret@")}
    reader = reader_at("http://data.test:81/x?y", environment=environment)
    opened = reader.open(10, timeout=5)
    assert read(reader, 0, 5, opened) == DATA[:5]
    asked = proxy.asked[0]
    assert (asked.target, asked.headers["host"]) == ("http://data.test:81/x?y", "data.test:81")
    assert asked.headers["proxy-authorization"] == "Basic bWU6c2VjcmV0"
    assert "secret" not in repr(proxy_for("http", "data.test", 81, environment))


@pytest.mark.parametrize(("status", "kind"), [("407 Who?", ReadError), ("503 Busy", Transient)])
def test_a_proxy_that_refuses_a_tunnel_is_named(serve: Serve, status: str, kind: type[Exception]) -> None:
    proxy = serve(lambda asked: answer(status, Connection="close"))
    environment = {"HTTPS_PROXY": proxy.endpoint.replace("//", "//me:secret@")}
    with pytest.raises(kind, match=status.split()[0]) as caught:
        reader_at("https://data.test/x", environment=environment).open(10, timeout=5)
    assert (proxy.asked[0].method, proxy.asked[0].target) == ("CONNECT", "data.test:443")
    assert "secret" not in str(caught.value)


def test_a_tunnel_is_dug_with_the_password_and_the_rest_stays_inside(serve: Serve) -> None:
    def answering(asked: Asked) -> Iterable[bytes]:
        yield b"HTTP/1.1 200 OK\r\n\r\n"
        raise Hangup

    proxy = serve(answering)
    environment = {"HTTPS_PROXY": proxy.endpoint.replace("//", "//me:secret@")}
    with pytest.raises(Transient):
        reader_at("https://data.test/x", headers={"X-Y": "hush"}, environment=environment).open(10, timeout=5)
    assert proxy.asked[0].headers["proxy-authorization"] == "Basic bWU6c2VjcmV0"
    assert "x-y" not in proxy.asked[0].headers


@pytest.mark.parametrize("url", ["https://data.test/x", "http://data.test/x"])
def test_host_names_no_port_that_goes_without_saying(url: str) -> None:
    connection = _Connection(split_url(url)[0], None)  # signatures cover the Host header
    assert connection.default_port == connection.port
