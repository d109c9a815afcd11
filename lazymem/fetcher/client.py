# SPDX-License-Identifier: Apache-2.0
"""The application's side of the fetcher: remote objects as blobs.

The conversation itself is the core's (`_native/fetch.c`); nothing here, nor anywhere in the application,
imports a client of an object store.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from typing import Any, Final

from .. import _native
from .._native import NativeError
from ..errors import (
    OF_CODE,
    AccessDenied,
    LazymemError,
    OptionError,
    ReadError,
    SnapshotChanged,
    SnapshotNotFound,
)
from ..options import KIB, MIB, StoreOptions, process_environment
from ..store import locations
from .command import command

#: What comes with size and identity in the first request: a snapshot's index, where it is not too large.
TAIL: Final = 64 * KIB
#: One question's bytes at most; longer reads are several.
_PIECE: Final = 8 * MIB
#: How long one call into the core may wait: the time until Ctrl-C is noticed.
_WAIT_MS: Final = 50


def store_error(url: str, code: int, said: str) -> LazymemError:
    """The exception for a code of the fetcher's and the sentence that came with it."""
    kind = OF_CODE.get(_native.CODES.get(code, ""), ReadError)
    if issubclass(kind, OptionError):
        return kind(said)
    if issubclass(kind, (SnapshotNotFound, AccessDenied, SnapshotChanged)):
        return kind(said, url=url)
    return ReadError(said if said.startswith(url) else f"{url}: {said}", url=url)


def fetcher_pid() -> int:
    """The process id of this process's fetcher; 0 if none runs now."""
    return _native.fetcher_pid()


def fetcher_status() -> dict[str, Any]:
    """Counters of the running fetcher (requests, retries, hedges, cache hits, ...); starts one if need be."""
    _native.fetch_command(command(), process_environment())
    _, text = _ask("the fetcher", "STATUS", 0, 0, bytearray(), 10.0)
    status: dict[str, Any] = json.loads(text)
    return {**status, "starts": _native.fetcher_starts()}


def _ask(
    url: str, kind: str, source: int, offset: int, out: Any, timeout: float,
    waiting: Callable[[], object] = int,
) -> tuple[int, str]:  # fmt: skip
    """One question to the fetcher; blocks with the GIL released. Raises what became of it.

    waiting: called now and then meanwhile; what it raises ends the wait.
    """
    while True:
        try:
            number = _native.fetch_ask(_native.ASK_KINDS[kind], source, offset, len(out), int(timeout * 1000))
        except NativeError as error:
            if error.code != _native.E_FULL:
                raise ReadError(f"{url}: the fetcher cannot be asked: {error}", url=url) from error
            time.sleep(_WAIT_MS / 1000)
            continue
        try:
            while not _native.fetch_wait(number, _WAIT_MS):
                waiting()
            return _native.fetch_take(number, out)
        except NativeError as error:
            if error.code != -errno.ESRCH:  # else: a fork came between, and the question stayed behind
                raise store_error(url, error.code, str(error)) from None
        finally:
            _native.fetch_drop(number)


_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_caches_seen: Final[set[str]] = set()


def _look_at_cache(options: StoreOptions) -> None:
    """Have the warning about an unfit directory logged here, once: in the fetcher nobody would see it."""
    if options.cache is not None and options.cache not in _caches_seen:
        _caches_seen.add(options.cache)
        from ..cache import open_cache  # without a cache nobody needs it

        open_cache(options)


class RemoteBlob:
    """An object of a store, opened for reading; implements `store.base.Blob`. Threads may share it.

    Opening sends one request, which brings size, identity and the last 64 KiB.
    source: its number in the core, for regions.
    """

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._source = -1  # so that __del__ works if open fails
        self._url = locations.display(url)
        self.options = options
        self._changed = False
        for place in (options.endpoint_url, *map(options.environment.get, _ENDPOINTS), url):
            if place is not None and (place is url or locations.scheme_of(url) == "s3"):
                locations.warn_if_plain(place)
        _look_at_cache(options)
        _native.fetch_command(command(), process_environment())
        self._location = url
        try:
            self._source = _native.source_open(self._describe(None, None))
        except NativeError as error:
            raise ReadError(f"{self._url}: cannot be opened: {error}", url=self._url) from error
        tail = bytearray(TAIL)
        try:
            length, text = _ask(self._url, "OPEN", self._source, 0, tail, options.timeout)
            self._size, self._identity, self.client = _read_opened(self._url, text, length)
            _native.source_update(self._source, self._describe(self._size, self._identity))
        except BaseException:
            self.close()
            raise
        self._tail = bytes(memoryview(tail)[:length])

    def _describe(self, size: int | None, identity: str | None) -> bytes:
        return json.dumps(
            {"url": self._location, "options": self.options.to_json(), "size": size, "identity": identity},
            default=dict,  # mappings that are no dicts
        ).encode()

    @property
    def url(self) -> str:
        return self._url

    @property
    def size(self) -> int:
        return self._size

    @property
    def identity(self) -> str:
        return self._identity

    @property
    def source(self) -> int:
        """The number under which the core knows it."""
        if self._source < 0:
            raise ReadError(f"{self._url}: is closed; open it again", url=self._url)
        return self._source

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; blocks, with the GIL released.

        Raises `ReadError`, `SnapshotChanged`, `SnapshotNotFound`, `AccessDenied`.
        """
        self._check(offset, length)
        at = offset - (self._size - len(self._tail))
        if at >= 0:
            return self._tail[at : at + length]
        out = bytearray(length)
        self.read_into(offset, memoryview(out))
        return bytes(out)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset > self._size - length:
            raise ReadError(
                f"{self._url}: bytes {offset} to {offset + length} were asked for, but the object has "
                f"{self._size}; it is cut short or damaged",
                url=self._url,
            )

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `offset`, as `read` does."""
        self._check(offset, len(out))
        at = offset - (self._size - len(self._tail))
        if at >= 0:
            out[:] = self._tail[at : at + len(out)]
            return
        for begin in range(0, len(out), _PIECE):
            piece = out[begin : begin + _PIECE]
            try:
                _ask(
                    self._url, "RANGE", self.source, offset + begin, piece, self.options.timeout,
                    waiting=lambda: self.source,  # which raises once another thread has closed it
                )  # fmt: skip
            except SnapshotChanged:
                self._changed = True
                raise

    def has_changed(self) -> bool:
        return self._changed

    def fileno(self) -> int | None:
        return None

    def close(self) -> None:
        source, self._source = self._source, -1
        if source >= 0:
            _native.source_close(source)

    def __enter__(self) -> RemoteBlob:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RemoteBlob({self._url!r})"


def _read_opened(url: str, text: str, tail: int) -> tuple[int, str, str]:
    """Size, identity and client from the fetcher's JSON."""
    told = json.loads(text)
    size, identity, client = told["size"], told["identity"], told["client"]
    if not isinstance(size, int) or size < 0 or tail != min(size, TAIL) or not isinstance(identity, str):
        raise ReadError(f"{url}: the store says that it has {size!r} bytes, but {tail} came", url=url)
    return size, identity, str(client)
