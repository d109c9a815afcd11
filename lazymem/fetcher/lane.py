# SPDX-License-Identifier: Apache-2.0
"""One store and host: what its requests share. Its client, queue, limit, and how long its answers take.

Sources with the same scheme, host (or bucket) and options share a lane, so that the shards of one model
share connections, and fill one limit together.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from typing import TYPE_CHECKING

from ..options import StoreOptions
from ..store import locations
from ..store.base import Reader, Store
from .concurrency import Concurrency
from .patience import Patience

if TYPE_CHECKING:
    from ..cache import ChunkCache
    from .job import Job


class Lane:
    """All but `reader` and `cache` is under the scheduler's lock.

    ahead: jobs that nobody waits for yet, in their order. running: jobs at work, whoever waits for them.
    """

    def __init__(self, url: str, options: StoreOptions) -> None:
        self.name = host_of(url)
        self.options = options
        self.concurrency = Concurrency(options.concurrency)
        self.patience = Patience()
        self.ahead: deque[Job] = deque()
        self.running = 0
        self.sources = 0  # that use it
        self._lock = threading.Lock()
        self._store: Store | None = None
        self._cache: ChunkCache | None = None
        self._cache_is_open = options.cache is None

    def reader(self, url: str) -> Reader:
        """Another reader of the lane's store. The first may take long: it loads the store's client."""
        with self._lock:
            if self._store is None:
                from ..store.remote import store_for  # not before a request is to be sent

                self._store = store_for(url, self.options)
            return self._store.reader(url)

    @property
    def cache(self) -> ChunkCache | None:
        """The disk cache that the options ask for."""
        with self._lock:
            if not self._cache_is_open:
                from ..cache import open_cache  # 5 ms

                self._cache_is_open = True  # if it is unfit it stays without
                self._cache = open_cache(self.options)
            return self._cache


def host_of(url: str) -> str:
    """Scheme and host, or bucket; free of secrets."""
    scheme, _, rest = locations.display(url).partition("://")
    return f"{scheme.lower()}://{rest.partition('/')[0]}"


def key_of(url: str, options: StoreOptions) -> str:
    """What the sources of one lane have in common. Holds secrets: never to be shown."""
    return host_of(url) + "\n" + json.dumps(options.to_json(), sort_keys=True, default=dict)
