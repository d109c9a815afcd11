# SPDX-License-Identifier: Apache-2.0
"""Paths and URLs as text: which is which, and how names and folders combine. Touches nothing."""

from __future__ import annotations

import logging
import os
import re
from typing import Final
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from ..errors import OptionError

logger = logging.getLogger("lazymem")

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def scheme_of(location: str) -> str | None:
    """The scheme of a URL in lower case; None for a path. file:// URLs are paths (see `local_path`)."""
    match = _SCHEME.match(location)
    return None if match is None or match[1].lower() == "file" else match[1].lower()


def local_path(location: str) -> str:
    """The path of a location without a (remote) scheme; file:///a%20b becomes /a b."""
    match = _SCHEME.match(location)
    if match is None:
        return location
    parts = urlsplit(location)
    if parts.netloc not in ("", "localhost"):
        raise OptionError(f"{location}: names a host, and a file URL has none; write file:///path")
    return unquote(parts.path)


def display(location: str) -> str:
    """A URL without what may be secret: user and password, and query (a signature, perhaps)."""
    if scheme_of(location) is None:
        return location
    parts = urlsplit(_split_query(location)[0])
    user, _, host = parts.netloc.rpartition("@")
    if parts.scheme in ("abfs", "abfss") and ":" not in user:
        host = parts.netloc  # container@account
    return urlunsplit((parts.scheme, host, parts.path, parts.query, parts.fragment))


_OBJECT_STORES: Final = ("s3", "gs", "gcs", "az", "azure", "adl", "abfs", "abfss")
_LOOPBACK: Final = ("localhost", "::1", "ip6-localhost")
_warned: Final[set[str]] = set()


def warn_if_plain(url: str) -> None:
    """Log a warning, once a host, if `url` sends bytes and credentials unencrypted over a network."""
    parts = urlsplit(url)
    host = (parts.hostname or "") if parts.scheme == "http" else ""
    if not host or host in _LOOPBACK or host.startswith("127.") or host in _warned:
        return
    _warned.add(host)
    logger.warning("%s: http:// is not encrypted: whoever is on the way can read and change the bytes", host)


_SECRET_WORDS: Final = ("sig", "token", "credential", "secret", "password", "key", "auth")


def has_secrets(location: str) -> bool:
    """Whether an http(s) URL carries a user, or a query that looks like a signature or a token."""
    if scheme_of(location) not in ("http", "https"):
        return False
    parts = urlsplit(location)
    names = [pair.partition("=")[0].lower() for pair in parts.query.split("&")]
    return "@" in parts.netloc or any(word in name for name in names for word in _SECRET_WORDS)


def join(folder: str, name: str) -> str:
    """The location of `name` in `folder`."""
    if scheme_of(folder) is None:
        return os.path.join(folder, name)
    base, query = _split_query(folder)
    if scheme_of(folder) in ("http", "https"):
        name = quote(name, safe="")  # a server decodes it: a name of another's making must not lead away
    return base.rstrip("/") + "/" + name + query


def parent(location: str) -> str:
    """The folder that holds `location`; for a URL it ends in "/"."""
    if scheme_of(location) is None:
        return os.path.dirname(location)
    base, query = _split_query(location)
    return base.rstrip("/").rpartition("/")[0] + "/" + query


def name_of(location: str) -> str:
    """The last part of a path or URL, without the query."""
    if scheme_of(location) is None:
        return os.path.basename(location)
    return _split_query(location)[0].rstrip("/").rpartition("/")[2]


def _split_query(url: str) -> tuple[str, str]:
    # Keys of an object store may hold "?" and "#".
    if scheme_of(url) in _OBJECT_STORES:
        return url, ""
    base, mark, query = url.partition("?")
    return base, mark + query
