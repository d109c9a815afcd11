# SPDX-License-Identifier: Apache-2.0
"""Which proxy a request goes through, as HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY say."""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from ..errors import OptionError


@dataclass(frozen=True)
class Proxy:
    """headers: what the proxy itself is to get, perhaps a password."""

    host: str
    port: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)


def proxy_for(scheme: str, host: str, port: int, environment: Mapping[str, str]) -> Proxy | None:
    """The proxy that leads to a host; None: go there directly. Raises `OptionError`."""
    for name in (f"{scheme}_proxy", "all_proxy"):
        for variable in (name, name.upper()):
            url = environment.get(variable)
            if url:
                return None if _is_excluded(host, port, environment) else _parse(variable, url)
    return None


def _parse(variable: str, url: str) -> Proxy:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        host, port = parts.hostname, parts.port or 80
    except ValueError:  # the port is no number
        host, port = None, 0
    if parts.scheme != "http" or not host:
        # The URL itself may hold a password.
        raise OptionError(
            f"{variable} names a proxy that this client cannot use; write it as http://host:port, or take "
            'storage option client="boto3"'
        )
    headers = {}
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    return Proxy(host, port, headers)


def _is_excluded(host: str, port: int, environment: Mapping[str, str]) -> bool:
    excluded = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    return any(_matches(entry.strip().lower(), host.lower(), port) for entry in excluded.split(","))


def _matches(entry: str, host: str, port: int) -> bool:
    """A host with its sub-domains, perhaps with a port; an address or a network; or all: "*"."""
    if not entry or entry == "*":
        return bool(entry)
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False)
    except ValueError:  # one of them is a name
        pass
    name, _, number = entry.rpartition(":")
    if name and number.isdigit():
        return int(number) == port and _matches(name, host, port)
    name = entry.removeprefix("*").lstrip(".")
    return bool(name) and (host == name or host.endswith("." + name))
