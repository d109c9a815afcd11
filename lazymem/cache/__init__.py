# SPDX-License-Identifier: Apache-2.0
"""A cache on disk for stored chunks, shared by all processes of a user. Off unless asked for.

It can only ever save requests: what it does not have, cannot read, or finds damaged is fetched again, and
what it cannot write is not kept. There is no daemon; any process may be killed at any moment.
"""

from __future__ import annotations

import logging

from ..errors import OptionError
from ..options import StoreOptions
from .chunks import CacheCounters, CacheInfo, ChunkCache, PruneReport

__all__ = ["CacheCounters", "CacheInfo", "ChunkCache", "PruneReport", "open_cache"]


def open_cache(options: StoreOptions) -> ChunkCache | None:
    """The cache that `options` ask for; None if they ask for none, or, after a warning, if it is unfit."""
    if options.cache is None or options.cache_size == 0:
        return None
    try:
        return ChunkCache(options.cache, options.cache_size)
    except OptionError as error:
        logging.getLogger(__name__).warning("%s; going on without a cache", error)
        return None
