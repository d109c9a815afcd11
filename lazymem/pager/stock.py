# SPDX-License-Identifier: Apache-2.0
"""The snapshots that a pager has open: each once, in memory that its clients share."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from .._native import NativeError, NativeRegion
from .._native import pager as native
from ..catalog import Catalog
from ..errors import AccessDenied, OptionError, OutOfMemory, SnapshotChanged
from ..options import DEFAULT_CHUNK_SIZE, OpenOptions, StoreOptions
from ..region import open_stock
from ..snapshot import load
from ..store import locations
from ..store.base import Blob
from ..store.checks import condition_of
from ..store.local import LocalBlob
from .files import in_memory

_WAIT_MS: Final = 50
_URL_MOST: Final = 4096
_QUESTIONS_MOST: Final = 16  # of one snapshot, that are remembered


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a client asks for. identities: of the files that it read the index from, or empty. served:
    what another pager has served for that, by its digest, "" if it has none; None where a client asks."""

    location: str
    as_format: str | None = None
    chunk_size: int | None = None
    storage_options: Mapping[str, Any] | None = None
    identities: tuple[str, ...] = ()
    served: str | None = None

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> Wanted:
        """Raises `OptionError` for what cannot be one."""
        location, options = asked.get("url"), asked.get("storage_options")
        identities, form, chunk = asked.get("identities", []), asked.get("as_format"), asked.get("chunk_size")
        if not isinstance(location, str) or not location or "\0" in location:
            raise OptionError("the question names no url")
        if len(location) > _URL_MOST:  # beside it there would be no room for what is wrong with it
            raise OptionError(f"a url has at most {_URL_MOST} characters")
        if any("\ud800" <= char <= "\udfff" for char in location):
            raise OptionError("the url is not a path: it has half a character (a surrogate)")
        if options is not None and not isinstance(options, dict):
            raise OptionError("storage_options is no object")
        if not isinstance(identities, list) or not all(isinstance(one, str) for one in identities):
            raise OptionError("identities is no list of strings")
        if not isinstance(form, str | None) or not isinstance(chunk, int | None) or isinstance(chunk, bool):
            raise OptionError("as_format or chunk_size is of a wrong kind")
        if locations.scheme_of(location) is None and not os.path.isabs(locations.local_path(location)):
            raise OptionError(
                f"{location}: the pager has a working directory of its own; give an absolute path"
            )
        return cls(location, form, chunk, options, tuple(identities))

    @classmethod
    def told(cls, told: Mapping[str, Any]) -> Wanted:
        """What another pager was asked for, from what `asdict` gave there. Raises `TypeError`, `KeyError`."""
        return cls(**{**told, "identities": tuple(told["identities"])})


class Stock:
    """One open snapshot. users: connections that may still map it; counted by `Stocks`."""

    def __init__(self, wanted: Wanted, threads: int | None) -> None:
        options = OpenOptions(threads=threads)
        if wanted.chunk_size is not None:
            options = replace(options, chunk_size=wanted.chunk_size)
        store = StoreOptions.from_environment(wanted.storage_options)
        with ExitStack() as stack:
            self.url, self.catalog, self.blobs, self.digest = _load(wanted, options, store, stack)
            self.identities = tuple(blob.identity for blob in self.blobs)
            self._closing = stack.pop_all()
        self.users = 0
        self._questions = [replace(wanted, identities=self.identities, served=None)]
        self.wanted = replace(
            self._questions[0], served=self.digest or ""
        )  # another pager finds the same by it
        self.memory: NativeRegion | None = None
        self._word: int | None = None
        self._options = options

    def open(self) -> NativeRegion:
        """Its memory. Raises as `region.open_stock`."""
        if self.memory is None:
            self.memory = open_stock(self.url, self.catalog, self.blobs, self._options)
            told = {"serial": native.serial(self.memory), "wanted": asdict(self.wanted)}
            self._word = in_memory(json.dumps(told).encode())  # for another pager, should this one die
            native.bequeath(self._word)
        return self.memory

    def answers(self, wanted: Wanted) -> bool:
        """Whether the question was answered with it before. One that names no version never was."""
        return wanted in self._questions

    def note(self, wanted: Wanted) -> None:
        """The question was answered with it, too: it came with other options, or by another name."""
        asked = replace(wanted, identities=self.identities, served=None)
        self._questions = [*self._questions[-_QUESTIONS_MOST + 1 :], asked]

    def is_certain(self) -> bool:
        """Whether the versions that it was opened in tell what it is: to who names them it can be given
        without a look at what lies there by now.

        Such a client has read the index of these very versions. A local file stays open. Ranges of an
        object are asked for with its ETag (If-Match), so what was not read before it was replaced is refused.
        A date, or nothing, as some servers have, is not enough.
        """
        return all(
            isinstance(blob, LocalBlob) or "If-Match" in condition_of(blob.identity) for blob in self.blobs
        )

    @property
    def content_size(self) -> int:
        return self.catalog.layout([-1] * len(self.blobs)).content_size

    def prefetch(self, offset: int, length: int, *, wait: bool) -> None:
        """Raises `NativeError` with the chunk where one cannot be had."""
        memory = self.open()
        size = memory.chunk_size
        first, end = offset // size, min(-(-(offset + length) // size), memory.chunk_count)
        if first >= end:
            return
        memory.prefetch([(first, end - first)], urgent=wait)
        cursor, done = first, not wait
        while not done:
            done, cursor = memory.wait(first, end - first, cursor, _WAIT_MS)

    def prefetch_all(self, offset: int, length: int) -> tuple[int, str] | None:
        """Wait for all that can be had: None, or the code and the sentence of the first chunk that cannot."""
        failure = None
        end = offset + length
        while offset < end:
            try:
                self.prefetch(offset, end - offset, wait=True)
                break
            except NativeError as error:
                chunk_size = self.open().chunk_size
                failed = (error.chunk if error.chunk is not None else offset // chunk_size) * chunk_size
                failure = failure or (error.code, self.why(failed) or f"{self.url}: {error}")
                offset = failed + chunk_size
        return failure

    def why(self, offset: int) -> str:
        """The reason why the chunk at `offset` could not be had, or ""."""
        memory = self.open()
        chunk = offset // memory.chunk_size
        if chunk >= memory.chunk_count:
            return ""
        try:
            memory.wait(chunk, 1, chunk, 0)
        except NativeError as error:
            name = self.catalog.name_at(chunk * memory.chunk_size, (chunk + 1) * memory.chunk_size)
            where = f"chunk {chunk}" + (f" (array {name!r})" if name is not None else "")
            return f"{self.url}: {where} cannot be read: {error}"
        return ""

    def close(self) -> None:
        if self.memory is not None:
            self.memory.close()
        if self._word is not None:
            os.close(self._word)
        self._closing.close()


def _load(
    wanted: Wanted, options: OpenOptions, store: StoreOptions, stack: ExitStack
) -> tuple[str, Catalog, tuple[Blob, ...], str | None]:
    url, catalog, blobs, digest, _ = load(wanted.location, options, store, wanted.as_format, stack)
    return url, catalog, blobs, digest


class Stocks:
    """All of them. Threads may share it.

    limit: bytes that the memory of all together may come to, should every chunk be touched; None: no limit.
    """

    def __init__(self, limit: int | None = None, threads: int | None = None) -> None:
        self._limit = limit
        self._threads = threads
        self._lock = threading.Lock()
        self._open: list[Stock] = []

    def get(self, wanted: Wanted, *, any_chunks: bool = True) -> Stock:
        """A snapshot, opened now or before; counted as used until `leave`. Blocks: it may lie far away.

        any_chunks: whoever wants it may say of which size they are; each size takes memory of its own.
        Raises what `lazymem.open` raises, `SnapshotChanged` where it is not what the client read, and
        `OutOfMemory` beyond the limit.
        """
        known = self._known(wanted)
        if known is not None:
            return known
        fresh = Stock(wanted, self._threads)
        kept = False
        try:
            if (
                not any_chunks
                and fresh.digest is None
                and wanted.chunk_size not in (None, DEFAULT_CHUNK_SIZE)
            ):
                raise AccessDenied(
                    f"{fresh.url}: in chunks of which size it is read a pager decides by itself for other "
                    "users; leave chunk_size out",
                    url=fresh.url,
                )
            if (wanted.identities and wanted.identities != fresh.identities) or not _is_what_was_served(
                wanted, fresh
            ):
                raise SnapshotChanged(
                    f"{fresh.url}: is another for the pager than for you; was it replaced? Open it again",
                    url=fresh.url,
                )
            with self._lock:
                for stock in self._open:
                    if (stock.url, stock.identities) == (fresh.url, fresh.identities) and _same(stock, fresh):
                        stock.users += 1
                        stock.note(wanted)
                        return stock
                memory = fresh.open()
                taken = sum(one.memory.size for one in self._open if one.memory is not None)
                if self._limit is not None and taken + memory.size > self._limit:
                    raise OutOfMemory(
                        f"{fresh.url}: takes {memory.size} bytes, and the pager may have {self._limit}, of "
                        f"which {taken} are taken; raise its --memory"
                    )
                fresh.users = 1
                self._open.append(fresh)
                kept = True
                return fresh
        finally:
            if not kept:
                fresh.close()

    def _known(self, wanted: Wanted) -> Stock | None:
        """One that is that for sure, without a question to a store. Used, as by `get`."""
        with self._lock:
            found = next((one for one in self._open if one.answers(wanted) and one.is_certain()), None)
            if found is not None:
                found.users += 1
        return found

    def use(self, stock: Stock) -> None:
        """One more user, of one that has a user."""
        with self._lock:
            stock.users += 1

    def leave(self, stock: Stock) -> None:
        """A connection that used it has ended."""
        with self._lock:
            stock.users -= 1

    @contextmanager
    def held(self, serial: int) -> Iterator[Stock | None]:
        """The one with that number, which stays open for the block; None: it is closed."""
        with self._lock:
            found = next(
                (one for one in self._open if one.memory and native.serial(one.memory) == serial), None
            )
            if found is not None:
                found.users += 1
        try:
            yield found
        finally:
            if found is not None:
                self.leave(found)

    @contextmanager
    def all_held(self) -> Iterator[list[Stock]]:
        """Those with memory, which stay open for the block."""
        with self._lock:
            found = [one for one in self._open if one.memory is not None]
            for one in found:
                one.users += 1
        try:
            yield found
        finally:
            for one in found:
                self.leave(one)

    def sweep(self) -> None:
        """Close what nobody maps and nobody may."""
        with self._lock:
            for stock in [one for one in self._open if one.users == 0]:
                if stock.memory is None or native.users(stock.memory) == 0:
                    self._open.remove(stock)
                    stock.close()

    def by_serial(self) -> dict[int, Stock]:
        """The open ones by the core's number."""
        with self._lock:
            return {native.serial(one.memory): one for one in self._open if one.memory is not None}


def _is_what_was_served(wanted: Wanted, fresh: Stock) -> bool:
    """By another pager, whose clients have a part of it already. Without versions only a digest can tell."""
    return wanted.served is None or (
        wanted.served == (fresh.digest or "") and bool(wanted.served or all(wanted.identities))
    )


def _same(one: Stock, other: Stock) -> bool:
    """Whether both, of one place and with the same identities, lay the same bytes out in the same way."""
    # A snapshot and, read as "raw", its file may have one size. And a store that tells no versions does not
    # tell of a replacement: only checksums, for which a digest stands, then say that it is the same.
    if one.digest != other.digest or (one.digest is None and not all(one.identities)):
        return False
    fds = [-1] * len(one.blobs)
    mine, theirs = one.catalog.layout(fds), other.catalog.layout(fds)
    return (mine.content_size, mine.chunk_size) == (theirs.content_size, theirs.chunk_size)
