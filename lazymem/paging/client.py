# SPDX-License-Identifier: Apache-2.0
"""lazymem's own client of the pager: memory of this process that another one serves.

What the protocol asks of a client is done here once, at open; from then on the memory needs neither Python
nor this connection (_native/attachment.h).
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any, Final

from .._native import E_LOST, NativeError, NativeRegion
from .._native import pager as native
from ..catalog import Layout
from ..errors import (
    BackendUnavailable,
    LazymemError,
    OptionError,
    OutOfMemory,
    PagerUnavailable,
    ReadError,
    SnapshotChanged,
)
from ..fetcher.client import store_error
from ..options import MIB, OpenOptions, pager_timeout
from . import wire
from .wire import Answer, Ask

#: How long an answer may take: the pager may have to ask a store.
_PATIENCE: Final = 120.0
#: Bytes touched by one call into the core: the time until Ctrl-C is noticed.
_PIECE: Final = 16 * MIB
#: How long it may take to reach the pager: one that is being replaced is away for a moment.
_MOMENT: Final = 2.0


def connect(path: str, patience: float = _MOMENT) -> socket.socket:
    """A connection to the pager at `path`. Raises `PagerUnavailable`."""
    deadline = time.monotonic() + patience
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.settimeout(_PATIENCE)
            connection.connect(path)
            return connection
        except BlockingIOError as error:
            connection.close()
            if time.monotonic() > deadline:
                raise PagerUnavailable(
                    f"{path}: too many others wait for the pager to take them in; try again later"
                ) from error
            time.sleep(0.02)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            connection.close()
            if time.monotonic() > deadline:
                raise PagerUnavailable(
                    f"{path}: no pager listens there ({error.strerror}); start one: `lazymem pager serve "
                    f"--socket {path}`"
                ) from error
            time.sleep(0.02)
        except OSError as error:
            connection.close()
            at_control = f"; where machines are restored, ask at {path}.control"
            hint = at_control if error.errno == errno.EPROTOTYPE else ""
            raise PagerUnavailable(
                f"{path}: cannot be connected to: {error.strerror or error}{hint}"
            ) from error


def ask(
    connection: socket.socket, path: str, question: Ask, descriptor: int | None = None
) -> tuple[Answer, int | None]:
    """One question, and its answer with the descriptor that came along. Raises `PagerUnavailable`."""
    try:
        with suppress(BrokenPipeError, ConnectionResetError):  # it may have said why before it went
            wire.send(connection, question.pack(), descriptor)
        packet, received = wire.receive(connection)
        if not packet:
            raise PagerUnavailable(f"{path}: the pager ended while it was asked; is it still running?")
        return wire.unpack_answer(packet), received
    except wire.BadPacket as error:
        raise PagerUnavailable(
            f"{path}: what listens there does not speak as a pager does: {error}"
        ) from None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # of this process
            raise
        raise PagerUnavailable(f"{path}: the pager does not answer: {error.strerror or error}") from error


def status(path: str) -> dict[str, Any]:
    """What the pager at `path` says of itself (`lazymem.pager.status`). Raises `PagerUnavailable`."""
    with closing(connect(path, 0.0)) as connection:
        answer, memory = ask(connection, path, Ask(wire.STATUS, id=1))
    if answer.code < 0 or memory is None:
        raise PagerUnavailable(f"{path}: {answer.text or 'its status came without its memory'}")
    with os.fdopen(memory, "rb") as file:
        return wire.json_of(file.read())


class Client:
    """Opens one snapshot by a pager. wanted: the payload of OPEN."""

    def __init__(self, path: str, url: str, wanted: Mapping[str, Any], options: OpenOptions) -> None:
        self.path = os.path.abspath(path)
        self.url = url
        self._options = options
        self._timeout = pager_timeout()
        self.hello = Ask(wire.HELLO, id=1, flags=native.WANT_DEVICE)
        self.open = Ask(wire.OPEN, id=2, payload=json.dumps(wanted).encode())
        if len(self.open.pack()) > native.MESSAGE_MAX:
            raise OptionError(
                f"{url}: a pager cannot be asked for so many files, of which each has a version, or by such "
                "storage_options; leave pager= out"
            )

    def attach(self, layout: Layout) -> NativeRegion:
        """The memory. Raises `PagerUnavailable`, `BackendUnavailable`, `ReadError` where there are no more
        descriptors, and what the pager finds wrong."""
        connection, device, opened, memfd = self._begin(_MOMENT)
        try:
            if opened.content != layout.content_size or memfd is None:
                raise SnapshotChanged(
                    f"{self.url}: is another for the pager than for you; was it replaced? Open it again",
                    url=self.url,
                )
            return self._map(connection, device, opened, memfd)
        finally:
            connection.close()
            for fd in (device, memfd):
                if fd is not None:
                    os.close(fd)

    def _begin(self, patience: float) -> tuple[socket.socket, int | None, Answer, int | None]:
        with self._descriptors():
            connection = connect(self.path, patience)
        device: int | None = None
        try:
            with self._descriptors():
                hello, device = ask(connection, self.path, self.hello)
                self.raise_if_failed(hello)
                self._follows_fork = bool(hello.flags & native.FOLLOWS_FORK)
                opened, memfd = ask(connection, self.path, self.open)
            if opened.code < 0 and memfd is not None:
                os.close(memfd)
            self.raise_if_failed(opened)
            return connection, device, opened, memfd
        except BaseException:
            connection.close()
            if device is not None:
                os.close(device)
            raise

    @contextmanager
    def _descriptors(self) -> Iterator[None]:
        """What this process is short of, and not the pager's fault, as an exception of ours."""
        try:
            yield
        except (OSError, NativeError) as error:
            number = -error.code if isinstance(error, NativeError) else error.errno
            if isinstance(error, LazymemError) or number not in (errno.EMFILE, errno.ENFILE):
                raise
            raise ReadError(f"{self.url}: cannot be opened ({os.strerror(number)})", url=self.url) from error

    def ask_more(self, patience: float) -> socket.socket:
        """A connection of its own, for questions of the snapshot that is open. Raises as `attach`."""
        connection, device, _, memfd = self._begin(patience)
        for fd in (device, memfd):
            if fd is not None:
                os.close(fd)
        return connection

    def raise_if_failed(self, answer: Answer) -> None:
        if answer.code == 0:
            return
        if answer.code in (-errno.EACCES, -errno.EPROTO, -errno.EUSERS):
            raise PagerUnavailable(f"{self.path}: {answer.text}")
        if answer.code == -errno.ENOMEM:
            raise OutOfMemory(f"{self.path}: {answer.text}")
        raise store_error(self.url, answer.code, answer.text)

    def _map(self, connection: socket.socket, device: int | None, opened: Answer, memfd: int) -> NativeRegion:
        size = opened.length
        dropped = self._options.fork == "drop" or not self._follows_fork
        try:
            handle = native.open_paged(memfd, size, writable=self._options.mode == "c", dropped=dropped)
        except NativeError as error:
            raise PagerUnavailable(
                f"{self.url}: {size} bytes of the pager's cannot be mapped: {error}"
            ) from error
        region = PagedRegion(handle, self)
        try:
            with (
                self._descriptors(),
                native.userfaultfd(-1 if device is None else device) as (uffd, user_only),
            ):
                mapping = Ask(wire.MAP, id=3, address=region.address, length=size, flags=native.SHARED)
                mapped, extra = ask(connection, self.path, mapping, uffd)
                if extra is not None:
                    os.close(extra)
                self.raise_if_failed(mapped)
                region.user_only = user_only
                region.attachment = native.Attachment(
                    self.path, self.url, connection.fileno(), uffd,
                    (self.hello.pack(), self.open.pack(), mapping.pack()), region.address, size,
                    self._timeout,
                )  # fmt: skip
            # Who never closes it unmaps it, too, when the interpreter ends.
            region.leaving = weakref.finalize(region, region.attachment.leave)
            native.admit(region)
        except NativeError as error:
            region.close()
            raise BackendUnavailable(
                f"{self.url}: memory for a pager to serve is not to be had here: {error}; `lazymem doctor` "
                "says more"
            ) from error
        except BaseException:
            region.close()
            raise
        return region


class PagedRegion(NativeRegion):
    """A region whose pages come from a pager. Its chunks, as far as anybody here sees them, are of 2 MiB."""

    attachment: native.Attachment | None = None
    leaving: weakref.finalize[Any, Any] | None = None

    def __init__(self, handle: Any, client: Client) -> None:
        super().__init__(handle)
        self._client = client
        self._asked: tuple[tuple[int, int], socket.socket] | None = None

    def prefetch(self, spans: Sequence[tuple[int, int]], *, urgent: bool) -> int:
        """Have the pager bring them. What is waited for is asked for by `wait`."""
        if not urgent and spans:
            with closing(self._client.ask_more(_MOMENT)) as connection:
                for first, count in spans:
                    ask(connection, self._client.path, self._question(first, count, 0))
        return len(spans)

    def _question(self, first: int, count: int, flags: int) -> Ask:
        begin = first * self.chunk_size
        length = min(count * self.chunk_size, self.size - begin)
        return Ask(wire.PREFETCH, id=4, offset=begin, length=length, flags=flags)

    def wait(self, first: int, count: int, cursor: int, timeout_ms: int) -> tuple[bool, int]:
        """As of any region: what is there already costs a question."""
        if count == 0:
            return True, first
        if self._asked is None or self._asked[0] != (first, count):
            self._forget()
            connection = self._client.ask_more(self._client._timeout)
            self._asked = (first, count), connection
            wire.send(connection, self._question(first, count, native.WAIT).pack())
        connection = self._asked[1]
        connection.settimeout(max(timeout_ms, 1) / 1000)
        try:
            packet, extra = wire.receive(connection)
        except (TimeoutError, BlockingIOError):
            return False, cursor
        except OSError:
            packet, extra = b"", None
        if extra is not None:
            os.close(extra)
        self._forget()
        if not packet:
            return False, cursor  # the pager has died; the next one is asked
        answer = wire.unpack_answer(packet)
        if answer.code < 0:
            raise NativeError(answer.code, answer.content // self.chunk_size, answer.text)
        if self.user_only:  # the kernel's own touches would be refused
            if self._is_lost():  # and ours would end the process
                raise NativeError(E_LOST)
            begin, end = first * self.chunk_size, min((first + count) * self.chunk_size, self.size)
            for at in range(begin, end, _PIECE):
                self.touch(at, min(_PIECE, end - at))
        else:
            try:
                super().wait(first, count, first, 1 << 30)
            except NativeError:
                if self._is_lost():
                    raise NativeError(E_LOST) from None
                raise
        return True, first + count

    def _is_lost(self) -> bool:
        """Whether no pager came in time, once: then another one does not help."""
        return self.attachment is not None and self.attachment.lost

    def _forget(self) -> None:
        if self._asked is not None:
            self._asked[1].close()
            self._asked = None

    def __del__(self) -> None:
        """Nobody has it any more, or the interpreter ends: then the core's own destructors unmap it.

        That waits until somebody has read the event, for as long as another pager is looked for.
        """
        if self.attachment is not None:
            self.attachment.leave()

    def close(self) -> None:
        """Unmap, and end the thread that keeps it."""
        self._forget()
        if self.leaving is not None:
            self.leaving()
        super().close()
        if self.attachment is not None:
            self.attachment.close()
            self.attachment = None
