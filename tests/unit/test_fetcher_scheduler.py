# SPDX-License-Identifier: Apache-2.0
"""Order, retries, second attempts, ends: with a store of whose every move the test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lazymem import _native
from lazymem.cache import ChunkCache
from lazymem.errors import AccessDenied, OptionError, SnapshotChanged, SnapshotNotFound
from lazymem.fetcher import messages
from lazymem.fetcher.job import Job
from lazymem.fetcher.lane import Lane
from lazymem.fetcher.messages import BadMessage
from lazymem.fetcher.queues import Queues
from lazymem.options import StoreOptions
from lazymem.store.base import Transient

from .fetcher_tools import PATIENCE, InProcess, ObedientSource, pack_ask, pack_pieces, wait_until

CONTENT = bytes(value * 7 % 251 for value in range(100_000))
URL = "s3://bucket/key"


@pytest.fixture
def engine() -> InProcess:
    return InProcess()


def learn_to_be_quick(source: ObedientSource, size: int) -> None:
    """Have requests of that size late after the least there is."""
    for _ in range(25):
        source.lane.patience.note(size, 0.001)


# ---- one question ----


def test_range_is_put_in_its_place_and_nowhere_else(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    number = engine.ask(source, 300, 2000, place=4096)
    source.obedient.next_call().succeed(CONTENT)
    answer = engine.take(number)
    assert answer.done
    assert (answer.length, answer.requests, answer.received) == (2000, 1, 2000)
    assert engine.memory[4096:6096] == CONTENT[300:2300]
    assert not any(engine.memory[:4096])
    assert not any(engine.memory[6096:])


def test_open_tells_size_and_identity(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    number = engine.ask(source, 0, 4096, kind=messages.OPEN, place=100)
    source.obedient.next_call().succeed(CONTENT)
    answer = engine.take(number)
    assert json.loads(answer.text) == {"size": len(CONTENT), "identity": '"v1"', "client": "obedient"}
    assert (answer.length, answer.requests, answer.received) == (4096, 1, 4096)
    assert engine.memory[100:4196] == CONTENT[-4096:]


def test_open_of_a_small_object_brings_all_of_it(engine: InProcess) -> None:
    source = engine.source(b"small")
    number = engine.ask(source, 0, 4096, kind=messages.OPEN)
    source.obedient.next_call().succeed(b"small")
    assert engine.take(number).length == 5
    assert engine.memory[:6] == b"small\0"


def test_open_refuses_a_tail_that_does_not_fit_the_size(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    number = engine.ask(source, 0, 4096, kind=messages.OPEN)
    call = source.obedient.next_call()
    source.obedient.content = CONTENT[:4095]  # so that it says that size, and has one byte too many
    call.succeed(CONTENT)
    answer = engine.take(number)
    assert answer.code == _native.E_STORE
    assert "4095 bytes, and gave 4096" in answer.text
    assert not any(engine.memory)


def test_range_without_bytes_needs_no_request(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    answer = engine.take(engine.ask(source, 10, 0))
    assert answer.done
    assert answer.requests == 0


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"offset": 0, "length": 4096, "place": (1 << 20) - 4095}, BadMessage),
        ({"offset": 0, "length": 1 << 63, "place": 0}, BadMessage),
        ({"offset": 1 << 63, "length": 1, "place": 0}, BadMessage),
        ({"offset": len(CONTENT) - 9, "length": 10, "place": 0}, OptionError),
        ({"offset": 0, "length": 10, "place": 0, "payload": b"x"}, BadMessage),
        ({"offset": 10, "length": 10, "place": 0, "payload": pack_pieces((9, 5))}, BadMessage),
        ({"offset": 10, "length": 10, "place": 0, "payload": pack_pieces((10, 11))}, BadMessage),
        ({"offset": 10, "length": 10, "place": 0, "payload": pack_pieces((10, 4), (13, 2))}, BadMessage),
    ],
)
def test_senseless_question_is_refused(
    engine: InProcess, fields: dict[str, int], error: type[Exception]
) -> None:
    source = engine.source(CONTENT)
    with pytest.raises(error):
        engine.ask(source, **fields)  # type: ignore[arg-type]
    assert engine.scheduler.status()["jobs"] == 0


def test_question_asked_twice_is_answered_once(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    number = engine.ask(source, 0, 1000)
    engine.scheduler.add(messages.unpack(pack_ask(messages.RANGE, number, length=10, place=5000)), source)
    source.obedient.next_call().succeed(CONTENT)
    assert engine.take(number).length == 1000
    status = engine.scheduler.status()
    assert (status["jobs"], status["ranges"]) == (0, 1)


# ---- order ----


def test_demand_does_not_wait_behind_what_is_fetched_ahead(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    ahead = [engine.ask(source, 1000 * i, 1000) for i in range(8)]
    calls = [source.obedient.next_call() for _ in range(4)]
    assert engine.scheduler.status()["lanes"][0] == {
        "host": "s3://bucket",
        "limit": 4,
        "running": 4,
        "ahead": 4,
    }
    demand = engine.ask(source, 50_000, 1000, demand=True)
    call = source.obedient.next_call()
    assert call.offset == 50_000
    call.succeed(CONTENT)
    assert engine.take(demand).done
    for call in calls:
        call.succeed(CONTENT)
    for _ in ahead[4:]:
        source.obedient.next_call().succeed(CONTENT)
    assert all(engine.take(number).done for number in ahead)
    assert engine.memory[:8000] == CONTENT[:8000]


def test_many_demands_at_once_run_at_once(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    numbers = [engine.ask(source, 1000 * i, 1000, demand=True) for i in range(40)]
    calls = [source.obedient.next_call() for _ in range(40)]  # none of them waits for another to end
    for call in calls:
        call.succeed(CONTENT)
    assert all(engine.take(number).done for number in numbers)


def test_what_is_fetched_ahead_steps_back_for_demand(engine: InProcess) -> None:
    source = engine.source(CONTENT, concurrency=2)
    demands = [engine.ask(source, 1000 * i, 1000, demand=True) for i in range(2)]
    calls = [source.obedient.next_call() for _ in range(2)]
    ahead = engine.ask(source, 5000, 1000)
    assert engine.scheduler.status()["lanes"][0]["ahead"] == 1
    for call in calls:
        call.succeed(CONTENT)
    source.obedient.next_call().succeed(CONTENT)
    assert all(engine.take(number).done for number in (*demands, ahead))


def test_promoted_request_goes_at_once(engine: InProcess) -> None:
    source = engine.source(CONTENT, concurrency=1)
    ahead = [engine.ask(source, 1000 * i, 1000) for i in range(5)]
    assert source.obedient.next_call().offset == 0
    engine.scheduler.promote(ahead[3])
    call = source.obedient.next_call()
    assert call.offset == 3000
    call.succeed(CONTENT)
    assert engine.take(ahead[3]).done


def test_a_full_lane_does_not_hold_up_another(engine: InProcess) -> None:
    slow, quick = engine.source(CONTENT, concurrency=1), engine.source(CONTENT, "s3://other/key")
    for _ in range(3):
        engine.ask(slow, 0, 1000, place=0)
    number = engine.ask(quick, 0, 1000, place=5000)
    quick.obedient.next_call().succeed(CONTENT)
    assert engine.take(number).done


def test_workers_are_kept_and_few(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    for i in range(100):
        number = engine.ask(source, 100 * i, 100, demand=True)
        source.obedient.next_call().succeed(CONTENT)
        assert engine.take(number).done
    assert engine.scheduler.status()["threads"] <= 3


def test_order_of_the_queues() -> None:
    content, queues = bytes(1000), Queues()
    sources = [ObedientSource(content, Lane(url, StoreOptions()), url) for url in ("s3://a/k", "s3://b/k")]

    def make_job(source: ObedientSource, **fields: Any) -> Job:
        return Job(messages.unpack(pack_ask(messages.RANGE, **fields)), source, [], memoryview(b""))

    ahead = [make_job(sources[i]) for i in (0, 0, 1, 0)]
    demand = [make_job(sources[0], demand=True) for _ in range(2)]
    again = make_job(sources[1])
    calls: list[Callable[[], None]] = [lambda: None]
    queues.calls.extend(calls)
    for job in (*ahead, *demand):
        queues.put(job)
    queues.put(again, again=True)
    assert queues.has_something()
    # Demand; then lanes in turn, what is tried again first; then calls.
    order = [*demand, ahead[0], again, ahead[1], ahead[2], ahead[3], *calls]
    assert [queues.next() for _ in order] == order
    assert not queues.has_something()
    assert queues.next() is None


# ---- cancel ----


def test_cancelled_before_it_began_is_answered_without_a_request(engine: InProcess) -> None:
    source = engine.source(CONTENT, concurrency=1)
    first, second = (engine.ask(source, 1000 * i, 1000) for i in range(2))
    call = source.obedient.next_call()
    engine.scheduler.cancel(second)
    answer = engine.take(second)
    assert not answer.done
    assert answer.requests == 0
    call.succeed(CONTENT)
    assert engine.take(first).done
    assert not source.obedient.has_call()


def test_cancelled_while_it_runs_is_answered_when_its_memory_is_free(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    source.obedient.obeys = False
    number = engine.ask(source, 0, 1000)
    call = source.obedient.next_call()
    engine.scheduler.cancel(number)
    assert call.broken_off.wait(PATIENCE)
    assert engine.inbox.is_empty()
    call.succeed(CONTENT)  # it had all by then
    assert not engine.take(number).done


def test_cancelled_where_nothing_can_be_written_is_answered_at_once(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    source.obedient.binds = False  # it hangs in a name look-up, say
    number = engine.ask(source, 0, 1000)
    call = source.obedient.next_call()
    engine.scheduler.cancel(number)
    answer = engine.take(number)
    assert not answer.done
    assert answer.requests == 1
    assert engine.scheduler.status()["lost"] == 1
    call.fail(Transient("no such host"))
    engine.scheduler.cancel(number)  # means nothing any more
    again = engine.ask(source, 0, 1000)
    source.obedient.next_call().succeed(CONTENT)
    assert engine.take(again).done
    assert engine.inbox.is_empty()
    wait_until(lambda: engine.scheduler.status()["lost"] == 0)


# ---- failures ----


def test_passing_failures_are_tried_again(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    number = engine.ask(source, 0, 1000)
    for _ in range(3):
        source.obedient.next_call().fail(Transient("a reset"))
    source.obedient.next_call().succeed(CONTENT)
    answer = engine.take(number)
    assert answer.done
    assert answer.requests == 4
    assert engine.scheduler.status()["retries"] == 3
    assert engine.memory[:1000] == CONTENT[:1000]


def test_while_one_waits_to_be_tried_again_another_runs(engine: InProcess) -> None:
    source = engine.source(CONTENT, concurrency=1)
    first = engine.ask(source, 0, 1000, timeout=1000.0)
    source.obedient.next_call().fail(Transient("slow down", status=503, retry_after=900.0))
    second = engine.ask(source, 1000, 1000)
    source.obedient.next_call().succeed(CONTENT)
    assert engine.take(second).done
    engine.scheduler.cancel(first)
    assert not engine.take(first).done


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SnapshotNotFound("no such key", url=URL), _native.E_GONE),
        (AccessDenied("no credentials", url=URL), _native.E_DENIED),
        (SnapshotChanged("it was replaced", url=URL), _native.E_CHANGED),
        (OptionError("no such region"), _native.E_OPTION),
    ],
)
def test_failure_that_will_not_pass_ends_it(engine: InProcess, error: Exception, code: int) -> None:
    source = engine.source(CONTENT)
    number = engine.ask(source, 0, 1000)
    source.obedient.next_call().fail(error)
    answer = engine.take(number)
    assert (answer.code, answer.text, answer.requests) == (code, str(error), 1)


def test_unknown_failure_does_not_show_its_text(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    number = engine.ask(source, 0, 1000)
    source.obedient.next_call().fail(KeyError("a secret"))
    answer = engine.take(number)
    assert answer.code == _native.E_STORE
    assert answer.text.startswith(f"{URL}: ")
    assert "KeyError (fetcher_tools.py:" in answer.text
    assert "secret" not in answer.text


def test_text_is_cut_between_characters(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    number = engine.ask(source, 0, 1000)
    source.obedient.next_call().fail(AccessDenied("xx" + "€" * 3000 + "\udcff", url=URL))
    assert engine.take(number).text == "xx" + "€" * 1332


def test_out_of_time_it_says_what_the_last_attempt_said(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    number = engine.ask(source, 0, 1000, timeout=0.2)
    while engine.inbox.is_empty():
        with suppress(TimeoutError):
            call = source.obedient.next_call_within(0.01)
            call.fail(Transient(f"{URL}: the server answered 503", status=503))
    answer = engine.take(number)
    assert answer.code == _native.E_STORE
    assert answer.requests >= 2
    assert answer.text.startswith(f"{URL}: given up after {answer.requests} attempts in 0.")
    assert "the last one said: the server answered 503; " in answer.text
    assert answer.text.endswith("raise the storage option timeout")


def test_store_that_wants_to_be_left_alone_for_too_long_ends_it(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    number = engine.ask(source, 0, 1000, timeout=60.0)
    source.obedient.next_call().fail(Transient("slow down", status=503, retry_after=1e9))
    answer = engine.take(number)
    assert "1 attempt in 0." in answer.text
    assert "slow down" in answer.text


def test_hanging_attempt_is_broken_off_at_the_deadline(engine: InProcess) -> None:
    source = engine.source(CONTENT, hedge=False)
    number = engine.ask(source, 0, 1000, timeout=0.1)
    call = source.obedient.next_call()
    answer = engine.take(number)
    assert call.broken_off.is_set()
    assert "no answer came" in answer.text
    assert not engine.died.is_set()


def test_attempt_out_of_reach_is_left_to_itself_at_the_deadline(engine: InProcess) -> None:
    source = engine.source(CONTENT, hedge=False)
    source.obedient.binds = False
    number = engine.ask(source, 0, 1000, timeout=0.1)
    source.obedient.next_call()
    assert not engine.take(number).done
    assert not engine.died.is_set()


def test_open_out_of_reach_is_left_to_itself_at_the_deadline(engine: InProcess) -> None:
    source = engine.source(CONTENT, hedge=False)
    source.obedient.obeys = False
    number = engine.ask(source, 0, 1000, kind=messages.OPEN, timeout=0.1)
    call = source.obedient.next_call()
    assert not engine.take(number).done
    call.succeed(CONTENT)
    again = engine.ask(source, 0, 1000, kind=messages.OPEN)
    source.obedient.obeys = True
    source.obedient.next_call().succeed(CONTENT)
    assert engine.take(again).done


def test_attempt_that_does_not_stop_writing_ends_the_process_without_an_answer(engine: InProcess) -> None:
    source = engine.source(CONTENT, hedge=False, attempt_timeout=0.1)
    source.obedient.obeys = False
    engine.ask(source, 0, 1000, timeout=0.1)
    source.obedient.next_call()
    assert engine.died.wait(PATIENCE)
    assert engine.inbox.is_empty()


# ---- second attempts ----


def test_late_answer_is_asked_for_again_and_the_first_one_stops_writing(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    learn_to_be_quick(source, 1000)
    source.obedient.obeys = False
    number = engine.ask(source, 0, 1000, demand=True)
    first, second = source.obedient.next_call(), source.obedient.next_call()
    second.succeed(CONTENT)
    assert first.broken_off.wait(PATIENCE)
    assert engine.inbox.is_empty()  # the first might still write to the place
    first.succeed(bytes(len(CONTENT)))
    answer = engine.take(number)
    assert answer.done
    assert answer.requests == 2
    assert engine.memory[:1000] == CONTENT[:1000]
    assert engine.scheduler.status()["hedges_won"] == 1


def test_second_attempt_does_not_write_where_the_first_one_does(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    learn_to_be_quick(source, 1000)
    number = engine.ask(source, 0, 1000)
    first, second = source.obedient.next_call(), source.obedient.next_call()
    second.out[:] = b"?" * 1000
    first.succeed(CONTENT)
    assert engine.take(number).done
    assert second.broken_off.is_set()
    assert engine.memory[:1000] == CONTENT[:1000]
    assert engine.scheduler.status()["hedges"] == 1


def test_second_attempt_takes_over_from_a_first_one_that_failed(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    learn_to_be_quick(source, 1000)
    number = engine.ask(source, 0, 1000)
    first, second = source.obedient.next_call(), source.obedient.next_call()
    first.fail(Transient("a reset"))
    second.succeed(CONTENT)
    assert engine.take(number).done
    assert engine.memory[:1000] == CONTENT[:1000]


def test_both_attempts_failed_and_it_is_tried_again(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    learn_to_be_quick(source, 1000)
    number = engine.ask(source, 0, 1000)
    first, second = source.obedient.next_call(), source.obedient.next_call()
    first.fail(Transient("a reset"))
    second.fail(Transient("a reset"))
    source.obedient.next_call().succeed(CONTENT)
    answer = engine.take(number)
    assert answer.done
    assert answer.requests == 3


def test_second_attempt_that_finds_another_version_ends_it(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    learn_to_be_quick(source, 1000)
    number = engine.ask(source, 0, 1000)
    first, second = source.obedient.next_call(), source.obedient.next_call()
    second.fail(SnapshotChanged("it was replaced", url=URL))
    assert engine.take(number).code == _native.E_CHANGED
    assert first.broken_off.is_set()


def test_late_open_is_asked_for_again(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    learn_to_be_quick(source, 1000)
    number = engine.ask(source, 0, 1000, kind=messages.OPEN)
    source.obedient.next_call()
    source.obedient.next_call().succeed(CONTENT)
    answer = engine.take(number)
    assert answer.done
    assert answer.requests == 2
    assert engine.memory[:1000] == CONTENT[-1000:]


def test_second_attempts_are_limited(engine: InProcess) -> None:
    source = engine.source(CONTENT)
    learn_to_be_quick(source, 1000)  # which allows three: two to begin with, and the share of 25 requests
    numbers = [engine.ask(source, 1000 * i, 1000, demand=True) for i in range(10)]
    calls = [source.obedient.next_call() for _ in range(13)]
    for call in calls:
        call.succeed(CONTENT)
    assert all(engine.take(number).done for number in numbers)
    assert engine.scheduler.status()["hedges"] == 3
    assert not source.obedient.has_call()


# ---- the cache ----


def cached_source(engine: InProcess, directory: Path, **options: object) -> ObedientSource:
    return engine.source(CONTENT, cache=str(directory), **options)


def fetch(engine: InProcess, source: ObedientSource, *pieces: tuple[int, int], **fields: bool) -> int:
    """Ask for a range of these pieces; how many requests that took."""
    begin, end = pieces[0][0], pieces[-1][0] + pieces[-1][1]
    engine.memory[:] = bytes(len(engine.memory))
    number = engine.ask(source, begin, end - begin, payload=pack_pieces(*pieces), **fields)
    requests = 0
    while engine.inbox.is_empty():
        with suppress(TimeoutError):
            source.obedient.next_call_within(0.01).succeed(CONTENT)
            requests += 1
    answer = engine.take(number)
    assert answer.done
    assert answer.requests == requests
    for offset, length in pieces:
        assert engine.memory[offset : offset + length] == CONTENT[offset : offset + length]
    return requests


@pytest.mark.parametrize("demand", [False, True])
def test_what_is_in_the_cache_is_not_asked_for(engine: InProcess, tmp_path: Path, demand: bool) -> None:
    source = cached_source(engine, tmp_path)
    assert fetch(engine, source, (100, 50), (150, 70), demand=demand) == 1
    engine.scheduler.finish(PATIENCE)
    assert fetch(engine, source, (100, 50), (150, 70), demand=demand) == 0
    assert fetch(engine, source, (150, 70)) == 0
    # Another process that knows only what SOURCE says.
    assert fetch(InProcess(), cached_source(engine, tmp_path), (100, 50)) == 0
    status = engine.scheduler.status()
    assert (status["cache_hits"], status["cache_misses"]) == (3, 2)
    assert (status["requests"], status["received"]) == (1, 120)


def test_only_what_the_cache_lacks_is_asked_for(engine: InProcess, tmp_path: Path) -> None:
    source = cached_source(engine, tmp_path, coalesce_gap=100)
    assert fetch(engine, source, (1000, 100)) == 1
    assert fetch(engine, source, (2000, 500)) == 1
    # The first hole is bridged, the second is not.
    number = engine.ask(
        source, 900, 1700, payload=pack_pieces((900, 100), (1000, 100), (1100, 900), (2000, 500), (2500, 100))
    )
    ranges = []
    for _ in range(2):
        call = source.obedient.next_call()
        ranges.append((call.offset, len(call.out)))
        call.succeed(CONTENT)
    assert ranges == [(900, 1100), (2500, 100)]
    answer = engine.take(number)
    assert (answer.requests, answer.received, answer.length) == (2, 1200, 1700)
    assert engine.memory[900:2600] == CONTENT[900:2600]


def test_wrong_bytes_are_fetched_anew_and_replaced(engine: InProcess, tmp_path: Path) -> None:
    source = cached_source(engine, tmp_path)
    cache, key = source.cache_and_key(source.opened) or pytest.fail("there is a cache")
    cache.write(key, 100, b"x" * 50)
    assert fetch(engine, source, (100, 50), refetch=True) == 1
    assert fetch(engine, source, (100, 50)) == 0  # checks the bytes as well


def test_wrong_bytes_are_gone_though_others_do_not_come(engine: InProcess, tmp_path: Path) -> None:
    source = cached_source(engine, tmp_path)
    cache, key = source.cache_and_key(source.opened) or pytest.fail("there is a cache")
    cache.write(key, 100, b"x" * 50)
    number = engine.ask(source, 100, 50, payload=pack_pieces((100, 50)), refetch=True)
    source.obedient.next_call().fail(AccessDenied("no", url=URL))
    assert not engine.take(number).done
    assert fetch(engine, source, (100, 50)) == 1


def test_cache_that_cannot_be_used_is_no_reason_to_fail(engine: InProcess, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    source = cached_source(engine, tmp_path / "file" / "directory")
    assert fetch(engine, source, (100, 50)) == 1
    assert fetch(engine, source, (100, 50), demand=True) == 1


def test_who_waits_does_not_wait_for_the_disk(
    engine: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, proceed = threading.Event(), threading.Event()
    write = ChunkCache.write

    def slow_write(self: ChunkCache, key: str, offset: int, data: bytes) -> None:
        assert proceed.wait(PATIENCE)
        write(self, key, offset, data)
        written.set()

    monkeypatch.setattr(ChunkCache, "write", slow_write)
    source = cached_source(engine, tmp_path)
    number = engine.ask(source, 0, 1000, demand=True, payload=pack_pieces((0, 1000)))
    source.obedient.next_call().succeed(CONTENT)
    assert engine.take(number).done
    engine.memory[:1000] = b"x" * 1000  # the place is another's by now
    proceed.set()
    assert written.wait(PATIENCE)
    engine.scheduler.finish(PATIENCE)
    assert fetch(engine, source, (0, 1000)) == 0


def test_lane_name_has_no_secrets() -> None:
    lane = Lane("https://user:word@host/path?X-Amz-Signature=abc", StoreOptions())
    assert lane.name == "https://host"
