# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between here and a server, as sentences; and whether it may pass."""

from __future__ import annotations

import http.client
import socket
import ssl
from typing import Final

from ..errors import LazymemError, OptionError, ReadError
from .base import Attempt, Transient
from .origin import Origin
from .proxies import Proxy
from .wording import clean, reason

#: What http.client, ssl and the socket raise where the other side or the network is at fault. ValueError:
#: from deep inside, for chunk sizes and the like that are no numbers.
FAILURES: Final = (OSError, http.client.HTTPException, ValueError)


class TunnelRefused(OSError):
    """A proxy does not connect to the host. Its text: status and reason."""


def sentence(
    error: Exception, shown: str, origin: Origin, proxy: Proxy | None, attempt: Attempt, timeout: float
) -> LazymemError:
    """What cannot be mended by trying again as `ReadError` or `OptionError`, the rest as `Transient`."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return ReadError(
            f"{shown}: the certificate of {origin} is not to be trusted ({clean(error.verify_message)}); if "
            "it ought to be, name the file of its authority in storage option ca_bundle or in SSL_CERT_FILE",
            url=shown,
        )
    if isinstance(error, ssl.SSLError) and error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
        return ReadError(
            f"{shown}: {origin} does not speak TLS; check the port, or write http:// if that is meant",
            url=shown,
        )
    if isinstance(error, UnicodeError):
        return OptionError(f"{shown}: {origin.host!r} is not the name of a host; check the URL or endpoint")
    if isinstance(error, socket.gaierror):
        host = origin.host if proxy is None else f"of the proxy, {proxy.host},"
        return Transient(
            f"{shown}: the host {host} cannot be found ({reason(error)}); check the URL, endpoint or proxy"
        )
    if isinstance(error, TunnelRefused) and proxy is not None:
        said = (
            f"{shown}: the proxy {proxy.host}:{proxy.port} refuses to connect to {origin} ({reason(error)}); "
            "check HTTPS_PROXY, its user and password, and NO_PROXY"
        )
        return Transient(said) if str(error).startswith("5") else ReadError(said, url=shown)
    return transient(error, shown, origin, attempt, timeout)


def transient(error: Exception, shown: str, origin: Origin, attempt: Attempt, timeout: float) -> Transient:
    """What may pass."""
    if attempt.aborted:
        return Transient(f"{shown}: the request was broken off")
    if isinstance(error, TimeoutError):
        return Transient(f"{shown}: nothing came from {origin} for {timeout:g} s")
    if isinstance(error, ConnectionRefusedError):
        return Transient(f"{shown}: {origin} refuses connections; check the URL or endpoint, and the server")
    if isinstance(error, (ConnectionError, ssl.SSLError)):
        return Transient(f"{shown}: the connection to {origin} broke ({reason(error)})")
    if isinstance(error, OSError):
        return Transient(f"{shown}: {origin} cannot be reached ({reason(error)})")
    if isinstance(error, http.client.IncompleteRead):
        return Transient(f"{shown}: the answer of {origin} ended too early")
    # http.client's own messages may quote what was sent.
    return Transient(f"{shown}: {origin} answered with something that is not HTTP ({type(error).__name__})")
