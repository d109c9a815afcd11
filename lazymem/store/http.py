# SPDX-License-Identifier: Apache-2.0
"""Objects by http(s) URL: any web server that answers ranges, and presigned URLs of any object store.

Versions are told apart as well as the server does it: nginx's ETag is made of size and seconds, so a file
that is replaced twice in a second looks the same, and only the chunks' checksums notice.

What the caller gives as `headers`, and a user in the URL, goes to the URL's own host and to no other,
wherever that redirects.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Final
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from ..errors import AccessDenied, BuildError, LazymemError, OptionError, ReadError, SnapshotNotFound
from ..options import StoreOptions
from . import locations, tls
from .base import Attempt, Reader, Transient, Writer
from .checks import may_pass, parse_retry_after
from .connections import Answer, Connections
from .origin import split_url
from .ranges import RangeReader
from .wording import clean

_REDIRECTS: Final = (301, 302, 303, 307, 308)
_REDIRECTS_MOST: Final = 5
# Where a redirect led may be a presigned URL, and this is how an expired one is answered.
_GONE: Final = (400, 401, 403, 404, 410)
# These are ours to send.
_RESERVED: Final = frozenset(
    {
        "range",
        "if-match",
        "if-unmodified-since",
        "accept-encoding",
        "host",
        "content-length",
        "transfer-encoding",
    }
)
_HEADER: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


class HttpStore:
    """Implements `store.base.Store` for reading; web servers offer nothing to write or list with."""

    def __init__(self, options: StoreOptions) -> None:
        bundle = tls.bundle_of(options.ca_bundle, options.environment)
        self._headers = _checked(dict(options.headers))
        self.connections = Connections(lambda: tls.make_context(bundle), options.environment)

    def reader(self, url: str) -> Reader:
        return HttpReader(url, self._headers, self.connections)

    def writer(self, url: str, *, overwrite: bool = True) -> AbstractContextManager[Writer]:
        raise BuildError(
            f"{locations.display(url)}: {_scheme(url)} is read-only; write to a file or to an object store "
            "(s3://), and publish that"
        )

    def list(self, url: str) -> Iterator[str]:
        raise OptionError(
            f"{locations.display(url)}: {_scheme(url)} servers cannot list a folder; name the object itself"
        )

    def __repr__(self) -> str:
        return "HttpStore()"


def _scheme(url: str) -> str:
    return f"{locations.scheme_of(url)}://"


def _checked(headers: dict[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        # The value may be a secret, and http.client's own message would quote it.
        if not _HEADER.fullmatch(name) or not value.isprintable() or not value.isascii():
            raise OptionError(
                f"headers: {clean(repr(name), 60)} is no header, or has a value that cannot be sent"
            )
        if name.lower() in _RESERVED:
            raise OptionError(f"headers: {name} is for lazymem to send; leave it out")
    return headers


class HttpReader(RangeReader):
    """Reads one URL. Where it was redirected to at first is where later requests go, while that works."""

    def __init__(self, url: str, headers: dict[str, str], connections: Connections) -> None:
        try:
            self._own, _ = split_url(url)
            shown, parts = locations.display(url), urlsplit(url)
        except ValueError as error:
            raise OptionError(f"{clean(url.partition('?')[0])}: is not a URL: {clean(str(error))}") from None
        host = parts.netloc.rpartition("@")[2]
        self._start = self._target = urlunsplit((parts.scheme, host, parts.path, parts.query, ""))
        self._headers = dict(headers)
        if parts.username is not None and not any(name.lower() == "authorization" for name in headers):
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        super().__init__(shown, connections)

    def _send(self, method: str, headers: dict[str, str], attempt: Attempt, timeout: float) -> Answer:
        target = self._target
        answer = self._follow(method, target, headers, attempt, timeout)
        if target != self._start and answer.status in _GONE:
            with answer:
                pass
            answer = self._follow(method, self._start, headers, attempt, timeout)
        if answer.status not in (200, 206, 412, 416):
            with answer:
                raise self._refused(answer)
        try:
            _check_encoding(self._url, answer)
        except BaseException:
            with answer:
                raise
        return answer

    def _follow(
        self, method: str, target: str, headers: dict[str, str], attempt: Attempt, timeout: float
    ) -> Answer:
        for _ in range(_REDIRECTS_MOST + 1):
            own = split_url(target)[0] == self._own
            answer = self._connections.request(
                method,
                target,
                {**self._headers, **headers} if own else headers,
                shown=self._url,
                attempt=attempt,
                timeout=timeout,
            )
            if answer.status not in _REDIRECTS:
                if answer.status in (200, 206):
                    self._target = target
                return answer
            with answer:
                target = self._redirected(target, answer)
        raise ReadError(
            f"{self._url}: redirects more than {_REDIRECTS_MOST} times, perhaps in a circle; check the URL",
            url=self._url,
        )

    def _redirected(self, target: str, answer: Answer) -> str:
        location = answer.header("location") or ""
        try:
            following = urlsplit(urljoin(target, location))
            new = split_url(following.geturl())[0] if location else None
        except ValueError:
            new = None
        if new is None:
            raise ReadError(
                f"{self._url}: {answer.origin} redirects ({answer.phrase}) to what is no http(s) URL",
                url=self._url,
            )
        if urlsplit(target).scheme == "https" and new.scheme == "http":
            raise ReadError(
                f"{self._url}: {answer.origin} redirects from https:// to http:// on {new}, where anybody "
                "could change the bytes; if that is meant, name that URL itself",
                url=self._url,
            )
        host = following.netloc.rpartition("@")[2]  # a user of the server's making is nobody
        return urlunsplit((following.scheme, host, following.path, following.query, ""))

    def _refused(self, answer: Answer) -> LazymemError:
        url, status, where = self._url, answer.status, answer.origin
        if may_pass(status):
            wait = parse_retry_after(answer.header("retry-after"))
            return Transient(f"{url}: {where} answered {answer.phrase}", status=status, retry_after=wait)
        if status in (404, 410):
            return SnapshotNotFound(
                f"{url}: {where} has nothing under this URL ({answer.phrase}); check it", url=url
            )
        if status == 401:
            return AccessDenied(
                f"{url}: {where} wants to know who asks ({answer.phrase}); give storage option "
                "headers={'Authorization': ...}, or write https://user:password@host/...",
                url=url,
            )
        if status == 407:
            return AccessDenied(
                f"{url}: the proxy wants a user and a password; write them into HTTP_PROXY", url=url
            )
        if status == 403:
            return AccessDenied(
                f"{url}: {where} refuses ({answer.phrase}); check your rights, and the age of a signed URL",
                url=url,
            )
        return ReadError(f"{url}: {where} answered {answer.phrase}; check the URL", url=url)


def _check_encoding(url: str, answer: Answer) -> None:
    encoding = answer.header("content-encoding")
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        raise ReadError(
            f"{url}: {answer.origin} sends it encoded ({clean(encoding, 30)}) though it was asked not to, so "
            "its bytes are not those of the object; switch that off in the server",
            url=url,
        )
