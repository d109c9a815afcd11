# SPDX-License-Identifier: Apache-2.0
"""Which store a URL leads to. Clients are loaded by the stores, where a URL first needs them."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from ..errors import OptionError
from ..options import StoreOptions
from . import locations
from .base import Store


def _local(options: StoreOptions) -> Store:
    from .local_store import LocalStore

    return LocalStore()


def _http(options: StoreOptions) -> Store:
    from .http import HttpStore

    return HttpStore(options)


def _s3(options: StoreOptions) -> Store:
    from .s3 import S3Store

    return S3Store(options)


def _objects(options: StoreOptions) -> Store:
    from .objects import ObjectStore

    return ObjectStore(options)


_STORES: Final[dict[str, Callable[[StoreOptions], Store]]] = {
    "file": _local,
    "http": _http,
    "https": _http,
    "s3": _s3,
    **dict.fromkeys(("gs", "gcs", "az", "azure", "adl", "abfs", "abfss"), _objects),
}
_STORES_MOST: Final = 32
_stores: OrderedDict[str, Store] = OrderedDict()
_lock = threading.Lock()


def store_for(url: str, options: StoreOptions) -> Store:
    """The process's one store for the URL's scheme and these options. Sends nothing.

    Raises `OptionError` for a scheme that there is no store for, or whose client is not installed.
    """
    scheme = locations.scheme_of(url) or "file"
    make = _STORES.get(scheme)
    if make is None:
        raise OptionError(f"{scheme}:// is not supported; there are paths, {', '.join(_STORES)}")
    key = json.dumps([make.__name__, options.to_json()], default=dict, sort_keys=True)
    with _lock:
        store = _stores.pop(key, None) or make(options)
        _stores[key] = store  # the last used one last
        if len(_stores) > _STORES_MOST:
            _stores.popitem(last=False)
        return store


def _forget_stores() -> None:
    """In a child of fork: the connections are the parent's, and the lock's holder may not exist."""
    global _stores, _lock
    _stores, _lock = OrderedDict(), threading.Lock()


os.register_at_fork(after_in_child=_forget_stores)
