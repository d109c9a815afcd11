# SPDX-License-Identifier: Apache-2.0
"""The contract of a store: bytes by URL and range. Knows nothing of chunks.

Two views of an opened object. A `Blob` is what the rest of lazymem reads: blocking, retried, in one
piece. A `Reader` is what the fetcher drives: one method call is one attempt, one request to the server;
who retries, hedges, caches and gives up is the fetcher's business, not the store's.

Either way size and identity are taken once, at open, and every read is of that version or raises
`SnapshotChanged`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, Protocol, runtime_checkable

from ..errors import LazymemError


@runtime_checkable
class Blob(Protocol):
    """One immutable object, opened for reading ranges. Threads may share it."""

    @property
    def url(self) -> str:
        """Where it lies, as the user would write it; free of secrets."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def identity(self) -> str:
        """Differs when the content was replaced: device, inode, size and time; or an ETag."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`. Blocks. Raises `ReadError` if they are not there."""

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `offset`, as `read` does; an error may leave it half written."""

    def has_changed(self) -> bool:
        """Whether the object is known to be another version by now than the one that was opened.

        Raises `ReadError` where that cannot be told, because this process has closed the descriptor.
        """

    def fileno(self) -> int | None:
        """A descriptor that pread(2) works on, or None. The blob keeps owning it."""

    def close(self) -> None:
        """Idempotent."""


class Entries(NamedTuple):
    """What lies directly in a folder, sorted.

    names: of files, and of sub-folders, which end in "/". others: of what is neither or cannot be told:
    links that lead nowhere, in circles or to a folder, pipes.
    """

    names: list[str]
    others: list[str]


class Opener(Protocol):
    """Turns a location (path or URL) into blobs; made by `lazymem.opener`, handed down to the readers."""

    def open(self, location: str) -> Blob:
        """Raises `SnapshotNotFound`, `AccessDenied`, `ReadError`, `OptionError`."""

    def is_folder(self, location: str) -> bool:
        """Whether it is a folder: a directory, or a URL that ends in "/"."""

    def entries(self, folder: str) -> Entries:
        """What lies directly in `folder`. Raises `OptionError` where the store cannot list."""

    def leads_out(self, location: str, folder: str) -> bool:
        """Whether the file `location` is a link to one that is no part of `folder`, below which it lies."""

    def join(self, folder: str, name: str) -> str:
        """The location of `name` in `folder`."""

    def parent(self, location: str) -> str:
        """The folder that holds `location`."""


class Transient(LazymemError):
    """One attempt failed in a way that may pass: 5xx, 429, a reset, a time-out, a short body.

    Never reaches a user: who drives a Reader retries, and makes a `ReadError` of the last one.
    status: the HTTP status if there was one. retry_after: seconds the server asked for.
    """

    _keywords = ("status", "retry_after")

    def __init__(self, message: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class Attempt:
    """A handle on one running attempt, by which another thread can break it off.

    A reader binds a function that unblocks it (shuts its socket down, say) while it waits; `abort` calls
    it. An aborted attempt raises `Transient` and has stopped writing into its buffer when it does. While
    nothing is bound, nothing is written: an attempt that was aborted before it had bound anything (it
    hangs in a name look-up, say) is broken off by its next `bind`, and its buffer may be used at once.

    requests, received: what the reader sent and got for it so far; it counts. Requests that a connection
    which had died meanwhile swallowed count, bytes are those of bodies.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unblock: Callable[[], None] | None = None
        self.aborted = False
        self.requests = 0
        self.received = 0

    def bind(self, unblock: Callable[[], None] | None) -> None:
        """Set, or with None take away, what `abort` calls; calls it at once if it is too late."""
        with self._lock:
            self._unblock = unblock
            if self.aborted and unblock is not None:
                unblock()

    def abort(self) -> bool:
        """Break the attempt off; False if it had nothing bound. Idempotent, from any thread."""
        with self._lock:
            self.aborted = True
            if self._unblock is None:
                return False
            self._unblock()
            return True


@dataclass(frozen=True, slots=True)
class Opened:
    """What the first request for an object told: its size in bytes, its identity, its last bytes."""

    size: int
    identity: str
    tail: bytes


class Reader(Protocol):
    """One object, as the fetcher reads it. Each call of `open` or `read_into` is one attempt.

    Threads may share it. Raises `Transient` for what may pass; `SnapshotNotFound`, `AccessDenied`,
    `SnapshotChanged`, `ReadError`, `OptionError` for what will not, each one sentence, free of secrets,
    that names the URL, what the store said, and what to do.
    """

    @property
    def url(self) -> str:
        """As the user would write it; free of secrets."""

    @property
    def client(self) -> str:
        """Which library moves the bytes: "http.client", "boto3", "obstore"."""

    def open(self, tail: int, *, timeout: float, attempt: Attempt | None = None) -> Opened:
        """One request: size, identity and the last `tail` bytes (all of a smaller object).

        A second one for an empty object, and where the server knows no ranges that count from the end.
        timeout: seconds without any progress after which the attempt fails.
        """

    def read_into(
        self, offset: int, out: memoryview, opened: Opened, attempt: Attempt, *, timeout: float
    ) -> None:
        """Fill `out` with the object's bytes from `offset`, of the version that `opened` describes.

        Writes to `out` only, and no longer once it has returned or raised. `out` may be left half
        written by an error.
        """

    def close(self) -> None:
        """Give connections back. Idempotent."""


class Store(Protocol):
    """All objects that one scheme and one set of options reach."""

    def reader(self, url: str) -> Reader:
        """Nothing is sent yet. Raises `OptionError` for a URL that cannot be one of this store."""

    def writer(self, url: str, *, overwrite: bool = True) -> AbstractContextManager[Writer]:
        """An object being written; it appears, whole, when the block ends without an exception.

        Otherwise nothing appears and no parts are left. overwrite=False: refuse if it exists, also if it
        came to exist meanwhile. Raises `BuildError`, `AccessDenied`, `OptionError`.
        """

    def list(self, url: str) -> Iterator[str]:
        """Names directly under the folder `url`, sorted; sub-folders end in "/"."""


class Writer(Protocol):
    """What a writer's block gives: `file` takes the bytes in order, in bounded memory."""

    @property
    def file(self) -> BinaryIO: ...
