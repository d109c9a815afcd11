# SPDX-License-Identifier: Apache-2.0
"""Where an http(s) URL leads: scheme, host and port; and what is to be asked for there."""

from __future__ import annotations

from typing import Final, NamedTuple
from urllib.parse import quote, urlsplit

_PORTS: Final = {"http": 80, "https": 443}
# RFC 3986's reserved characters and "%": what a URL that is quoted already may hold.
_SAFE: Final = "%/:?#[]@!$&'()*+,;=-._~"


class Origin(NamedTuple):
    """What a connection leads to."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def split_url(url: str) -> tuple[Origin, str]:
    """Origin and request target. Raises `ValueError`, without the URL in it, for what is no http(s) URL."""
    parts = urlsplit(url)
    if parts.scheme not in _PORTS:
        raise ValueError("it does not begin with http:// or https://")
    if not parts.hostname:
        raise ValueError("it names no host")
    port = _PORTS[parts.scheme] if parts.port is None else parts.port  # ValueError: no number
    target = quote(parts.path or "/", safe=_SAFE) + (
        f"?{quote(parts.query, safe=_SAFE)}" if parts.query else ""
    )
    return Origin(parts.scheme, parts.hostname, port), target
