# SPDX-License-Identifier: Apache-2.0
"""The real process, started as the engine starts it, between the engine's side of the socket and a real
S3 server; in between, where the test wants one, a network that misbehaves."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazymem import _native
from lazymem.fetcher import messages
from lazymem.options import StoreOptions

from ..servers.proxy import Fault
from .fetcher_tools import FetcherProcess, pack_ask, pack_pieces, wait_until

if TYPE_CHECKING:
    from ..servers.proxy import HostileProxy
    from ..servers.s3 import Bucket

DATA = random.Random(5).randbytes(3_000_000)


def options(**given: object) -> StoreOptions:
    """As the application would send them: its environment, and what it gave."""
    return StoreOptions.from_environment(given)


@pytest.fixture
def fetcher() -> Iterator[FetcherProcess]:
    with FetcherProcess() as process:
        yield process
        # What a session must leave behind, whatever it was about.
        if process._status is None:
            assert process.end() == 0
        assert process.output() == b""


@pytest.fixture
def url(s3: Bucket) -> str:
    s3.put("data", DATA)
    return s3.url("data")


@pytest.fixture
def hostile(s3: Bucket, proxy: HostileProxy) -> HostileProxy:
    s3.put("data", DATA)
    s3.through(proxy)
    return proxy


def fetch(fetcher: FetcherProcess, offset: int, length: int, **fields: object) -> int:
    """Have source 1's bytes fetched to the place of the same number, and check them; requests."""
    number = fetcher.ask(messages.RANGE, source=1, offset=offset, length=length, place=offset, **fields)
    answer = fetcher.take(number)
    assert answer.done, answer.text
    assert answer.length == length
    assert fetcher.memory[offset : offset + length] == DATA[offset : offset + length]
    return answer.requests


# ---- life ----


def test_status_is_answered(fetcher: FetcherProcess) -> None:
    status = fetcher.status()
    assert status["pid"] == fetcher.pid
    assert status["jobs"] == 0


def test_it_ends_with_the_socket_though_requests_hang(
    fetcher: FetcherProcess, s3: Bucket, hostile: HostileProxy
) -> None:
    fetcher.open(1, s3.url("data"), options())
    hostile.add(Fault(silence=True))
    for i in range(8):
        fetcher.ask(messages.RANGE, source=1, offset=i, length=100, place=1000 * i, demand=True)
    wait_until(lambda: len(hostile.requests()) >= 9)
    assert fetcher.status()["jobs"] == 8
    assert fetcher.end() == 0


def test_interrupt_at_the_terminal_is_not_its_business(fetcher: FetcherProcess) -> None:
    fetcher.status()
    os.kill(fetcher.pid, signal.SIGINT)
    assert fetcher.status()["jobs"] == 0


def test_it_can_be_terminated(fetcher: FetcherProcess) -> None:
    fetcher.status()
    os.kill(fetcher.pid, signal.SIGTERM)
    assert fetcher.wait() == -signal.SIGTERM


def test_idle_it_does_not_run(fetcher: FetcherProcess, url: str) -> None:
    fetcher.open(1, url, options())
    fetch(fetcher, 0, 1000)
    status = Path(f"/proc/{fetcher.pid}/status")

    def switches() -> int:
        tasks = Path(f"/proc/{fetcher.pid}/task").glob("*/status")
        return sum(
            int(task.read_text().partition("\nvoluntary_ctxt_switches:")[2].split()[0]) for task in tasks
        )

    assert status.exists()
    # The clock still has the deadline of the last request to wait for, once.
    before = switches()
    time.sleep(1.5)  # there is no event to wait for: nothing is to happen
    assert switches() - before <= 3


def test_it_survives_nonsense(fetcher: FetcherProcess, url: str) -> None:
    generator = random.Random(1)
    ask = pack_ask(messages.RANGE, 7, length=10)
    for packet in (
        b"x",
        ask[:-1],
        ask + b"x",
        b"\xff" * 65536,
        *(generator.randbytes(56) for _ in range(50)),
    ):
        fetcher.send(packet)
    for kind in range(20):
        fetcher.send(pack_ask(kind, 1 << 60, source=9, length=1 << 50, payload=b"{"))
    fetcher.send(pack_ask(messages.SOURCE, source=1, payload=b'{"url": 3, "options": {}}'))
    answer = fetcher.take(fetcher.ask(messages.OPEN, source=1, length=10))
    assert answer.code == _native.E_OPTION
    for fields in ({"place": fetcher.size}, {"place": 1 << 63}, {"offset": 1 << 63}, {"length": 1 << 40}):
        fetcher.open(1, url, options())
        wrong = {"source": 1, "offset": 0, "length": 100, "place": 0, **fields}
        assert fetcher.take(fetcher.ask(messages.RANGE, **wrong)).code == _native.E_OPTION
    assert fetch(fetcher, 0, 1000) == 1


def test_source_that_was_not_told_is_refused(fetcher: FetcherProcess) -> None:
    answer = fetcher.take(fetcher.ask(messages.RANGE, source=3, length=10))
    assert answer.code == _native.E_OPTION
    assert "source 3" in answer.text


# ---- reading ----


def test_open_and_read(fetcher: FetcherProcess, s3: Bucket, hostile: HostileProxy) -> None:
    opened = fetcher.open(1, s3.url("data"), options(), tail=5000)
    assert opened["size"] == len(DATA)
    assert opened["identity"] == s3.client.head_object(Bucket=s3.bucket, Key="data")["ETag"]
    assert fetcher.memory[:5000] == DATA[-5000:]
    assert len(hostile.log) == 1
    requests = fetch(fetcher, 100, 2_000_000) + fetch(fetcher, 0, 1) + fetch(fetcher, len(DATA) - 1, 1)
    assert requests == 3
    assert [request.range for request in hostile.log[1:]] == [
        "bytes=100-2000099",
        "bytes=0-0",
        f"bytes={len(DATA) - 1}-{len(DATA) - 1}",
    ]
    assert all(request.if_match == opened["identity"] for request in hostile.log[1:])


def test_new_process_needs_no_request_to_know_a_source(
    fetcher: FetcherProcess, s3: Bucket, hostile: HostileProxy
) -> None:
    opened = fetcher.open(1, s3.url("data"), options())
    os.kill(fetcher.pid, signal.SIGKILL)
    assert fetcher.wait() == -signal.SIGKILL
    with FetcherProcess() as another:
        another.tell(1, s3.url("data"), options(), opened)
        assert fetch(another, 10, 100_000) == 1
        assert another.end() == 0
    assert len(hostile.log) == 2


def test_many_ranges_at_once(fetcher: FetcherProcess, url: str) -> None:
    fetcher.open(1, url, options())
    size = 10_000
    numbers = {
        fetcher.ask(messages.RANGE, source=1, offset=at, length=size, place=at, demand=at % 3 == 0): at
        for at in range(0, len(DATA), size)
    }
    for number in numbers:
        assert fetcher.take(number).done
    assert fetcher.memory[: len(DATA)] == DATA
    status = fetcher.status()
    assert status["ranges"] == len(numbers) <= status["requests"] - 1  # a late answer is asked for twice
    assert status["received"] == len(DATA) + 4096
    assert status["threads"] <= 96


def test_options_come_from_the_question_not_from_the_process(s3: Bucket, url: str) -> None:
    given = options()
    bare = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with FetcherProcess(environment=bare) as fetcher:
        fetcher.open(1, url, given)
        assert fetch(fetcher, 0, 1000) == 1
        assert fetcher.end() == 0


def test_forgotten_source_is_forgotten(fetcher: FetcherProcess, url: str) -> None:
    fetcher.open(1, url, options())
    fetch(fetcher, 0, 1000)
    fetcher.send(pack_ask(messages.FORGET, source=1))
    assert fetcher.take(fetcher.ask(messages.RANGE, source=1, length=10)).code == _native.E_OPTION
    assert fetcher.status()["sources"] == 0
    fetcher.open(1, url, options())
    assert fetch(fetcher, 0, 1000) == 1


# ---- what the store says ----


def test_no_such_key(fetcher: FetcherProcess, s3: Bucket) -> None:
    fetcher.tell(1, s3.url("nothing"), options())
    answer = fetcher.take(fetcher.ask(messages.OPEN, source=1, length=100))
    assert answer.code == _native.E_GONE
    assert s3.url("nothing") in answer.text
    assert answer.requests == 1


def test_wrong_secret(fetcher: FetcherProcess, s3: Bucket, url: str) -> None:
    secret = "not/the+secret"
    fetcher.tell(1, url, options(key=s3.credentials.access_key, secret=secret))
    answer = fetcher.take(fetcher.ask(messages.OPEN, source=1, length=100))
    assert answer.code == _native.E_DENIED
    assert secret not in answer.text
    assert url in answer.text


def test_replaced_object(fetcher: FetcherProcess, s3: Bucket, url: str) -> None:
    fetcher.open(1, url, options())
    s3.put("data", DATA[::-1])
    answer = fetcher.take(fetcher.ask(messages.RANGE, source=1, offset=0, length=1000, place=0))
    assert answer.code == _native.E_CHANGED
    assert url in answer.text


def test_deleted_object(fetcher: FetcherProcess, s3: Bucket, url: str) -> None:
    fetcher.open(1, url, options())
    s3.delete("data")
    answer = fetcher.take(fetcher.ask(messages.RANGE, source=1, offset=0, length=1000, place=0))
    assert answer.code in (_native.E_GONE, _native.E_CHANGED)


def test_secrets_stay_out_of_sight(fetcher: FetcherProcess, s3: Bucket, url: str) -> None:
    fetcher.open(1, url, options(key=s3.credentials.access_key, secret=s3.credentials.secret_key))
    fetch(fetcher, 0, 1000)
    argv = Path(f"/proc/{fetcher.pid}/cmdline").read_bytes()
    assert s3.credentials.secret_key.encode() not in argv
    assert s3.credentials.secret_key not in str(fetcher.status())


# ---- a hostile network ----


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(status=503, code="SlowDown"), id="503"),
        pytest.param(Fault(status=500), id="500"),
        pytest.param(Fault(status=429, code="TooManyRequests", retry_after=0), id="429"),
        pytest.param(Fault(reset=0), id="reset before the body"),
        pytest.param(Fault(reset=500_000), id="reset in the body"),
        pytest.param(Fault(truncate=500_000), id="short body"),
        pytest.param(Fault(stall=500_000), id="stall"),
        pytest.param(Fault(silence=True), id="silence"),
        pytest.param(Fault(garbage=b"\x00\x01not http\r\n\r\n"), id="garbage"),
    ],
)
def test_what_passes_is_tried_again(
    fetcher: FetcherProcess, s3: Bucket, hostile: HostileProxy, fault: Fault
) -> None:
    fetcher.open(1, s3.url("data"), options(attempt_timeout=0.5, hedge=False))
    hostile.add(fault, times=2)
    assert fetch(fetcher, 1000, 1_000_000, demand=True) == 3
    assert len(hostile.log) == 4
    assert fetcher.status()["retries"] >= 1  # a kept connection that died is replaced without one


def test_opening_is_tried_again_too(fetcher: FetcherProcess, s3: Bucket, hostile: HostileProxy) -> None:
    hostile.add(Fault(status=503, code="SlowDown"), times=3)
    fetcher.open(1, s3.url("data"), options())
    assert len(hostile.log) == 4


def test_endpoint_that_is_down_and_comes_back(
    fetcher: FetcherProcess, s3: Bucket, hostile: HostileProxy
) -> None:
    fetcher.open(1, s3.url("data"), options())
    hostile.down()
    number = fetcher.ask(messages.RANGE, source=1, offset=0, length=1000, place=0, demand=True)
    wait_until(lambda: fetcher.status()["retries"] >= 3)
    hostile.up()
    answer = fetcher.take(number)
    assert answer.done, answer.text
    assert fetcher.memory[:1000] == DATA[:1000]
    # Connections that were refused brought no request; one may have died with the connection it was kept on.
    assert answer.requests <= 2


def test_deadline_holds_and_nothing_is_written_after_the_answer(
    fetcher: FetcherProcess, s3: Bucket, hostile: HostileProxy
) -> None:
    fetcher.open(1, s3.url("data"), options(hedge=False))
    hostile.add(Fault(rate=3e6))
    numbers = [
        fetcher.ask(messages.RANGE, source=1, offset=0, length=1000 * i, place=1_000_000 * i, timeout=0.1)
        for i in range(2, 5)
    ]
    hostile.heal()
    hostile.add(Fault(stall=1000))
    numbers.append(
        fetcher.ask(messages.RANGE, source=1, offset=0, length=30_000, place=6_000_000, timeout=0.1)
    )
    answer = fetcher.take(numbers[-1])
    assert answer.code == _native.E_STORE
    assert "given up after 1 attempt in 0." in answer.text
    fetcher.memory[6_000_000:6_030_000] = b"x" * 30_000  # another's, by now
    for number in numbers[:-1]:
        fetcher.take(number)
    hostile.heal()
    assert fetch(fetcher, 0, 1_000_000) == 1
    assert fetcher.memory[6_000_000:6_030_000] == b"x" * 30_000


def test_cancelled_request_is_broken_off(fetcher: FetcherProcess, s3: Bucket, hostile: HostileProxy) -> None:
    fetcher.open(1, s3.url("data"), options())
    hostile.add(Fault(stall=1000), times=1)
    number = fetcher.ask(messages.RANGE, source=1, offset=0, length=1_000_000, place=0)
    wait_until(lambda: hostile.log[-1].body_bytes == 1000)
    fetcher.send(pack_ask(messages.CANCEL, number))
    answer = fetcher.take(number)
    assert not answer.done
    assert (answer.requests, answer.received) == (1, 1000)
    assert fetch(fetcher, 0, 1_000_000) == 1


def test_stalled_answer_is_overtaken(fetcher: FetcherProcess, s3: Bucket, hostile: HostileProxy) -> None:
    fetcher.open(1, s3.url("data"), options(attempt_timeout=60.0))
    for i in range(10):
        fetch(fetcher, 100_000 * i, 100_000)  # so that it knows what is usual
    hostile.add(Fault(stall=50_000), times=1)
    assert fetch(fetcher, 1_000_000, 100_000, demand=True) == 2
    status = fetcher.status()
    assert (status["hedges"], status["hedges_won"], status["retries"]) == (1, 1, 0)
    wait_until(lambda: hostile.connections <= 2)  # the stalled one was broken off


def test_while_all_hangs_it_is_there_to_be_asked(
    fetcher: FetcherProcess, s3: Bucket, hostile: HostileProxy
) -> None:
    fetcher.open(1, s3.url("data"), options(hedge=False))
    hostile.add(Fault(silence=True))
    numbers = [
        fetcher.ask(messages.RANGE, source=1, offset=i, length=10, place=100 * i, demand=i % 2 == 0)
        for i in range(60)
    ]
    wait_until(lambda: fetcher.status()["running"] >= 30)
    for number in numbers:
        fetcher.send(pack_ask(messages.CANCEL, number))
    assert not any(fetcher.take(number).done for number in numbers)
    status = fetcher.status()
    assert (status["jobs"], status["running"]) == (0, 0)
    hostile.heal()
    assert fetch(fetcher, 0, 1000) == 1


def test_requests_are_counted_as_the_server_counts_them(
    fetcher: FetcherProcess, s3: Bucket, hostile: HostileProxy
) -> None:
    fetcher.open(1, s3.url("data"), options(attempt_timeout=1.0))
    hostile.add(Fault(status=503), probability=0.2, seed=1)
    hostile.add(Fault(reset=10_000), probability=0.2, seed=2)
    hostile.add(Fault(truncate=20_000), probability=0.2, seed=3)
    asked = 1
    for at in range(0, len(DATA), 100_000):
        asked += fetch(fetcher, at, 100_000, demand=at % 200_000 == 0)
    assert asked == len(hostile.log) == fetcher.status()["requests"]
    assert asked > 40


def test_all_at_once(fetcher: FetcherProcess, s3: Bucket, hostile: HostileProxy) -> None:
    """Every kind of trouble, promotions and cancellations, and places that are used again at once."""
    size = 60_000
    fetcher.open(1, s3.url("data"), options(attempt_timeout=0.3))
    generator = random.Random(7)
    for fault in (Fault(status=503), Fault(reset=5000), Fault(truncate=5000), Fault(stall=5000)):
        hostile.add(fault, probability=0.03, seed=generator.randrange(1000))
    hostile.add(Fault(jitter=0.05))
    free = [size * i for i in range(24)]
    under_way: dict[int, tuple[int, int]] = {}
    cancelled = set()

    def settle() -> None:
        number, (place, offset) = next(iter(under_way.items()))
        del under_way[number]
        answer = fetcher.take(number)
        assert answer.done or number in cancelled, answer.text
        if answer.done:
            assert fetcher.memory[place : place + size] == DATA[offset : offset + size]
        fetcher.memory[place : place + size] = bytes(size)
        free.append(place)

    for _ in range(400):
        if not free:
            settle()
        place, offset = free.pop(), generator.randrange(len(DATA) - size)
        number = fetcher.ask(messages.RANGE, source=1, offset=offset, length=size, place=place,
                             demand=generator.random() < 0.3)  # fmt: skip
        under_way[number] = place, offset
        if generator.random() < 0.1:
            fetcher.send(pack_ask(messages.PROMOTE, generator.choice(list(under_way))))
        if generator.random() < 0.1:
            unwanted = generator.choice(list(under_way))
            cancelled.add(unwanted)
            fetcher.send(pack_ask(messages.CANCEL, unwanted))
    while under_way:
        settle()
    wait_until(lambda: fetcher.status()["lost"] == 0)
    status = fetcher.status()
    assert (status["jobs"], status["running"], status["failed"] > 0) == (0, 0, True)
    # One that was broken off before its first byte went out counts here, and not there.
    assert 0 <= status["requests"] - len(hostile.log) <= len(cancelled) + status["hedges"]


# ---- the cache ----


@pytest.mark.parametrize("pieces", [[(0, 16 << 20)], [(at, 1 << 20) for at in range(0, 16 << 20, 1 << 20)]])
def test_warm_cache_needs_no_request_though_the_process_ended_at_once(
    s3: Bucket, proxy: HostileProxy, tmp_path: Path, pieces: list[tuple[int, int]]
) -> None:
    large = DATA * 6
    s3.put("large", large)
    s3.through(proxy)
    given = options(cache=str(tmp_path))
    opened: dict[str, object] = {}
    for process in range(2):
        proxy.log.clear()
        with FetcherProcess() as fetcher:
            if process == 0:
                opened = fetcher.open(1, s3.url("large"), given)
            else:
                fetcher.tell(1, s3.url("large"), given, opened)
            numbers = [
                fetcher.ask(messages.RANGE, source=1, offset=at, length=size, place=at, demand=True,
                            payload=pack_pieces((at, size)))
                for at, size in pieces
            ]  # fmt: skip
            answers = [fetcher.take(number) for number in numbers]
            assert fetcher.end() == 0
            assert all(answer.done for answer in answers)
            assert fetcher.memory[: 16 << 20] == large[: 16 << 20]
        assert len(proxy.log) == (len(pieces) + 1 if process == 0 else 0)
