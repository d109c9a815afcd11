# SPDX-License-Identifier: Apache-2.0
"""What the tests of the fetcher share: an engine's side of the protocol, and readers that obey a test."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import queue
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lazymem import _native
from lazymem.fetcher import messages
from lazymem.fetcher.command import command
from lazymem.fetcher.lane import Lane
from lazymem.fetcher.scheduler import Scheduler
from lazymem.fetcher.sources import Source
from lazymem.options import StoreOptions
from lazymem.store.base import Attempt, Opened, Transient

#: For what has to happen soon. Nothing waits that long unless the test fails.
PATIENCE = 30.0


@dataclass(frozen=True)
class Answer:
    id: int
    done: bool
    code: int
    length: int
    received: int
    requests: int
    text: str


def read_answer(packet: bytes) -> Answer:
    raw = _native.ANSWER.unpack(packet)
    text = packet[_native.ANSWER.size :]
    assert raw.payload_length == len(text)
    done = {_native.ANSWER_DONE: True, _native.ANSWER_FAILED: False}[raw.kind]
    return Answer(raw.id, done, raw.code, raw.length, raw.received, raw.requests, text.decode())


def pack_ask(kind: int, number: int = 0, *, source: int = 0, offset: int = 0, length: int = 0,
             place: int = 0, timeout: float = PATIENCE, demand: bool = False, refetch: bool = False,
             payload: bytes = b"") -> bytes:  # fmt: skip
    flags = demand * _native.ASK_DEMAND | refetch * _native.ASK_REFETCH
    head = _native.ASK.pack(kind=kind, id=number, source=source, offset=offset, length=length, place=place,
                            timeout_ms=int(timeout * 1000), flags=flags,
                            payload_length=len(payload))  # fmt: skip
    return head + payload


def pack_pieces(*pieces: tuple[int, int]) -> bytes:
    return b"".join(_native.PIECE.pack(offset=offset, length=length) for offset, length in pieces)


class Inbox:
    """Answers by question, in whatever order they come."""

    def __init__(self) -> None:
        self._answers: dict[int, deque[Answer]] = {}
        self._arrived = threading.Condition()

    def put(self, packet: bytes) -> None:
        answer = read_answer(packet)
        with self._arrived:
            self._answers.setdefault(answer.id, deque()).append(answer)
            self._arrived.notify_all()

    def take(self, number: int, patience: float = PATIENCE) -> Answer:
        with self._arrived:
            assert self._arrived.wait_for(lambda: self._answers.get(number), patience), "no answer"
            return self._answers[number].popleft()

    def is_empty(self) -> bool:
        with self._arrived:
            return not any(self._answers.values())


def wait_until(condition: Callable[[], bool]) -> None:
    """For what no event tells of."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


# ---- a scheduler in this process, and a store of whose every move the test decides ----


class Call:
    """One attempt that has reached the store. The test lets it end; until then it hangs."""

    def __init__(self, offset: int, out: memoryview, attempt: Attempt) -> None:
        self.offset = offset
        self.out = out
        self.attempt = attempt
        self._end: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.broken_off = threading.Event()

    def succeed(self, content: bytes) -> None:
        """Bring the part of `content` that was asked for."""
        self._end.put(lambda: self._write(content))

    def _write(self, content: bytes) -> None:
        self.out[:] = content[self.offset : self.offset + len(self.out)]
        self.attempt.received += len(self.out)

    def fail(self, error: BaseException) -> None:
        self._end.put(lambda: _raise(error))

    def run(self) -> None:
        self._end.get()()

    def break_off(self) -> None:
        self.broken_off.set()


def _raise(error: BaseException) -> None:
    raise error


class ObedientReader:
    """A store's reader whose attempts hang until the test ends them.

    binds: whether attempts can be broken off. obeys: whether they end when they are.
    """

    client = "obedient"

    def __init__(self, url: str, content: bytes) -> None:
        self.url = url
        self.content = content
        self.binds = True
        self.obeys = True
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()

    def next_call(self) -> Call:
        """The next attempt that reaches the store."""
        return self._calls.get(timeout=PATIENCE)

    def next_call_within(self, seconds: float) -> Call:
        """Raises TimeoutError."""
        try:
            return self._calls.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None

    def has_call(self) -> bool:
        return not self._calls.empty()

    def open(self, tail: int, *, timeout: float, attempt: Attempt | None = None) -> Opened:
        assert attempt is not None
        out = bytearray(min(tail, len(self.content)))
        self._run(Call(len(self.content) - len(out), memoryview(out), attempt))
        return Opened(len(self.content), '"v1"', bytes(out))

    def read_into(
        self, offset: int, out: memoryview, opened: Opened, attempt: Attempt, *, timeout: float
    ) -> None:
        self._run(Call(offset, out, attempt))

    def _run(self, call: Call) -> None:
        call.attempt.requests += 1

        def unblock() -> None:
            call.break_off()
            if self.obeys:
                call.fail(Transient("broken off"))

        self._calls.put(call)
        if self.binds:
            call.attempt.bind(unblock)
        try:
            call.run()
        finally:
            call.attempt.bind(None)

    def close(self) -> None:
        pass


class ObedientSource(Source):
    """A source that is read by an `ObedientReader`."""

    def __init__(self, content: bytes, lane: Lane, url: str = "s3://bucket/key") -> None:
        super().__init__(url, lane, Opened(len(content), '"v1"', b""))
        self.obedient = ObedientReader(url, content)

    def reader(self) -> ObedientReader:
        return self.obedient


class InProcess:
    """A scheduler, its memory, and the answers it gave."""

    def __init__(self, size: int = 1 << 20) -> None:
        self.memory = bytearray(size)
        self.inbox = Inbox()
        self.died = threading.Event()
        self.scheduler = Scheduler(memoryview(self.memory), self.inbox.put, die=self.died.set)
        self.scheduler.start()
        self._next = 0

    def source(self, content: bytes, url: str = "s3://bucket/key", **options: Any) -> ObedientSource:
        return ObedientSource(content, Lane(url, StoreOptions(**options)), url)

    def ask(self, source: Source, offset: int, length: int, *, place: int | None = None,
            kind: int = messages.RANGE, **fields: Any) -> int:  # fmt: skip
        """A question's number. place: as in the object, unless it is given."""
        self._next += 1
        packet = pack_ask(kind, self._next, offset=offset, length=length,
                          place=offset if place is None else place, **fields)  # fmt: skip
        self.scheduler.add(messages.unpack(packet), source)
        return self._next

    def take(self, number: int) -> Answer:
        return self.inbox.take(number)


# ---- the real process ----


@dataclass
class FetcherProcess:
    """The fetcher as the engine starts it, and the engine's side of the conversation. A context manager."""

    size: int = 32 << 20
    environment: Mapping[str, str] | None = None
    inbox: Inbox = field(default_factory=Inbox)

    def __enter__(self) -> FetcherProcess:
        fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        os.truncate(fd, self.size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.memory = mmap.mmap(fd, self.size)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection = ours
        self._errors, output = os.pipe()
        # Out of the way of the numbers that they are to have there.
        high = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 100) for one in (theirs.fileno(), fd, output)]
        argv = command()
        self.pid = os.posix_spawn(
            argv[0], argv, dict(os.environ if self.environment is None else self.environment),
            file_actions=[(os.POSIX_SPAWN_DUP2, high[2], 1), (os.POSIX_SPAWN_DUP2, high[2], 2),
                          (os.POSIX_SPAWN_DUP2, high[0], 3), (os.POSIX_SPAWN_DUP2, high[1], 4)],
            setsid=True,
        )  # fmt: skip
        theirs.close()
        for one in (fd, output, *high):
            os.close(one)
        self._next = 0
        self._status: int | None = None
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        return self

    def _listen(self) -> None:
        while packet := self.connection.recv(1 << 17):
            self.inbox.put(packet)

    def tell(
        self, number: int, url: str, options: StoreOptions, opened: dict[str, Any] | None = None
    ) -> None:
        """LM_ASK_SOURCE. opened: what an OPEN's answer said."""
        told = {"url": url, "options": options.to_json(), "size": None, "identity": None, **(opened or {})}
        told.pop("client", None)
        payload = json.dumps(told).encode()
        self.send(pack_ask(messages.SOURCE, source=number, payload=payload))

    def ask(self, kind: int, **fields: Any) -> int:
        self._next += 1
        self.send(pack_ask(kind, self._next, **fields))
        return self._next

    def send(self, packet: bytes) -> None:
        self.connection.send(packet)

    def take(self, number: int, patience: float = PATIENCE) -> Answer:
        return self.inbox.take(number, patience)

    def open(self, number: int, url: str, options: StoreOptions, tail: int = 4096) -> dict[str, Any]:
        """SOURCE, OPEN and, with what was learned, SOURCE again."""
        self.tell(number, url, options)
        answer = self.take(self.ask(messages.OPEN, source=number, length=tail, timeout=PATIENCE))
        assert answer.done, answer.text
        opened: dict[str, Any] = json.loads(answer.text)
        self.tell(number, url, options, opened)
        return opened

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.take(self.ask(messages.STATUS)).text)
        return status

    def end(self) -> int:
        """Close the socket; its exit code, a signal's number negated."""
        self.connection.shutdown(socket.SHUT_RDWR)
        return self.wait()

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        if self._status is None:
            handle = os.pidfd_open(self.pid)
            try:
                if not select.select([handle], [], [], PATIENCE)[0]:
                    os.kill(self.pid, signal.SIGKILL)
                self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            finally:
                os.close(handle)
        return self._status

    def output(self) -> bytes:
        """All that it printed; it must have ended."""
        parts = []
        while part := os.read(self._errors, 1 << 16):
            parts.append(part)
        return b"".join(parts)

    def __exit__(self, *exc: object) -> None:
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        self._listener.join()
        self.connection.close()
        os.close(self._errors)
