# SPDX-License-Identifier: Apache-2.0
"""Source numbers and what they stand for: an object, its version, how to reach it, its name in the cache."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from ..errors import LazymemError, OptionError
from ..options import StoreOptions
from ..store import locations
from ..store.base import Opened, Reader
from .lane import Lane, key_of

if TYPE_CHECKING:
    from ..cache import ChunkCache

#: An ETag has a few dozen characters. More than these would not fit in an answer.
IDENTITY_MAX: Final = 1024
#: Lanes kept without a source: closing and opening a snapshot again finds its connections.
_SPARE_LANES: Final = 8

# What decides where an s3:// URL leads, beside the options.
_PLACES: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_CONFIG_FILE")


class Source:
    """One object. opened: its version, None until a first request told it."""

    def __init__(self, url: str, lane: Lane, opened: Opened | None) -> None:
        self.url = url
        self.lane = lane
        self.opened = opened
        self.shown = locations.display(url) if locations.scheme_of(url) in ("http", "https") else url
        self._lock = threading.Lock()
        self._reader: Reader | None = None
        self._closed = False

    def reader(self) -> Reader:
        """What reads it, made when it is first needed; may take long. Raises `LazymemError`."""
        with self._lock:
            if self._reader is None:
                self._reader = self.lane.reader(self.url)
                if self._closed:
                    self._reader.close()
            return self._reader

    def cache_and_key(self, opened: Opened | None) -> tuple[ChunkCache, str] | None:
        """The cache, and the name of that version of the object in it; None without a cache."""
        cache = self.lane.cache
        if cache is None or opened is None:
            return None
        name = cache_name(self.url, self.lane.options, opened.identity)
        return cache, cache.object_key(name, opened.identity, opened.size)

    def close(self) -> None:
        """Give connections back; may take a while. Idempotent."""
        with self._lock:
            self._closed = True
            if self._reader is not None:
                with suppress(Exception):  # nobody is there to be told
                    self._reader.close()


def cache_name(url: str, options: StoreOptions, identity: str) -> str:
    """What names the object among all stores: the URL, and what else decides where it leads.

    The same bucket and key on two endpoints are two objects. A presigned URL is another one each time
    it is signed, so where there is an ETag, which tells contents apart, its query does not count.
    """
    if locations.scheme_of(url) in ("http", "https"):
        signed = locations.has_secrets(url) and not identity.startswith("last-modified:")
        return locations.display(url) if signed else url
    places = [options.endpoint_url, options.profile, *map(options.environment.get, _PLACES)]
    return json.dumps([url, *places])


class Sources:
    """All sources by number. Only the main thread calls it."""

    def __init__(self) -> None:
        self._sources: dict[int, Source | OptionError] = {}
        self._lanes: dict[str, Lane] = {}

    def tell(self, number: int, payload: bytes) -> Source | None:
        """What LM_ASK_SOURCE says. Returns the source that the number stood for and does no more."""
        try:
            url, options, opened = _read(payload)
        except OptionError as error:
            before = self._sources.get(number)
            self._sources[number] = error
            return self._leave(before)
        key = key_of(url, options)
        before = self._sources.get(number)
        if isinstance(before, Source) and before.url == url and self._lanes.get(key) is before.lane:
            before.opened = opened or before.opened  # the same object; its reader stays
            return None
        lane = self._lanes.pop(key, None) or Lane(url, options)
        self._lanes[key] = lane  # the last used one last
        lane.sources += 1
        self._sources[number] = Source(url, lane, opened)
        return self._leave(before)

    def get(self, number: int) -> Source:
        """Raises `OptionError` if it means nothing, or nothing sensible."""
        source = self._sources.get(number)
        if source is None:
            raise OptionError(f"the fetcher was asked for source {number}, of which it was told nothing")
        if isinstance(source, OptionError):
            raise source
        return source

    def forget(self, number: int) -> Source | None:
        """The source that the number stood for, to be closed."""
        return self._leave(self._sources.pop(number, None))

    def lanes(self) -> list[Lane]:
        return list(self._lanes.values())

    def __len__(self) -> int:
        return len(self._sources)

    def _leave(self, source: Source | OptionError | None) -> Source | None:
        if not isinstance(source, Source):
            return None
        source.lane.sources -= 1
        unused = [key for key, lane in self._lanes.items() if lane.sources == 0]
        for key in unused[: max(0, len(unused) - _SPARE_LANES)]:
            del self._lanes[key]
        return source


def _read(payload: bytes) -> tuple[str, StoreOptions, Opened | None]:
    """URL, options and version from the JSON. Raises `OptionError`, without any of the secrets in it."""
    try:
        told: dict[str, Any] = json.loads(payload)
        url, size, identity = told["url"], told["size"], told["identity"]
        options = StoreOptions(**told["options"])
    except LazymemError as error:
        raise OptionError(str(error)) from None
    except (ValueError, TypeError, LookupError, AttributeError):
        raise OptionError("the fetcher was told of a source in words that it does not understand") from None
    if not isinstance(url, str):
        raise OptionError("the fetcher was told of a source whose URL is no text")
    if size is None or identity is None:
        return url, options, None
    if not isinstance(size, int) or size < 0 or not isinstance(identity, str):
        raise OptionError(f"the fetcher was told that a source has {size!r} bytes")
    return url, options, Opened(size, identity, b"")
