# SPDX-License-Identifier: Apache-2.0
"""What an answer to a request for a range must look like to be believed, whatever moves the bytes.

The range is exactly the one that was asked for, of an object of the size and identity that it had at open.
Headers come from outside: every number is limited before it is used.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import ReadError, SnapshotChanged
from .base import Attempt, Opened, Transient
from .wording import clean

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Gives a header of an answer, by its name in lower case; None if it is not there.
Header = Callable[[str], "str | None"]

_SIZE_MOST: Final = 1 << 62
_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII)
_NO_RANGE: Final = re.compile(r"bytes \*/(\d{1,19})", re.ASCII)
_ETAG: Final = re.compile(r"[\x21-\x7e]{1,1024}")
_MODIFIED: Final = "last-modified:"


class Span(NamedTuple):
    """Bytes from `begin` up to but not including `end`, of `size`."""

    begin: int
    end: int
    size: int


def parse_span(text: str | None) -> Span | None:
    """Content-Range of a 206; None if it is not there or says nothing sensible."""
    match = _RANGE.fullmatch(text or "")
    if match is None:
        return None
    first, last, size = (int(digits) for digits in match.groups())
    return Span(first, last + 1, size) if first <= last < size <= _SIZE_MOST else None


def is_empty(text: str | None) -> bool:
    """Whether the Content-Range of a 416 says that there are no bytes at all."""
    match = _NO_RANGE.fullmatch(text or "")
    return match is not None and int(match[1]) == 0


def parse_length(text: str | None) -> int | None:
    """Content-Length; None if it is not there or no sensible number."""
    if text is None or not re.fullmatch(r"\d{1,19}", text, re.ASCII) or int(text) > _SIZE_MOST:
        return None
    return int(text)


def identity_of(header: Header) -> str:
    """What tells versions apart: a strong ETag, else the date, else a weak ETag, else nothing: ""."""
    etag = header("etag") or ""
    if not _ETAG.fullmatch(etag):
        etag = ""
    if etag and not etag.startswith("W/"):
        return etag
    modified = header("last-modified")
    if modified is not None and email.utils.parsedate_tz(modified) is not None and len(modified) < 100:
        return _MODIFIED + modified
    return etag


def condition_of(identity: str) -> dict[str, str]:
    """The headers by which the server itself refuses another version."""
    if identity.startswith(_MODIFIED):
        return {"If-Unmodified-Since": identity.removeprefix(_MODIFIED)}
    return {} if not identity or identity.startswith("W/") else {"If-Match": identity}


def changed(url: str, found: str) -> SnapshotChanged:
    """The error for an object that is another version by now."""
    return SnapshotChanged(f"{url}: was replaced while it was open ({found}); open it again", url=url)


def check_version(url: str, opened: Opened, size: int, header: Header) -> None:
    """Raise `SnapshotChanged` if an answer comes from another version than the one that was opened."""
    if size != opened.size:
        raise changed(url, f"it had {opened.size} bytes and has {size} now")
    if not opened.identity:
        return
    kind = "Last-Modified" if opened.identity.startswith(_MODIFIED) else "ETag"
    now = header(kind.lower())
    if now == opened.identity.removeprefix(_MODIFIED):
        return
    if now is None:
        raise ReadError(
            f"{url}: an answer came without the {kind} that the first one had, so nobody can tell which "
            "version it holds; the store, or something between here and there, is broken",
            url=url,
        )
    raise changed(url, f"its {kind} is {clean(now, 60)} now")


def check_span(url: str, begin: int, end: int, opened: Opened, header: Header) -> None:
    """Raise if a 206 is not exactly the bytes from `begin` up to `end` of the version that was opened."""
    told = header("content-range")
    span = parse_span(told)
    if span is None:
        raise ReadError(
            f"{url}: the server sent a range, but not which (Content-Range: {clean(told or 'none', 60)})",
            url=url,
        )
    check_version(url, opened, span.size, header)
    if (span.begin, span.end) != (begin, end):
        raise ReadError(
            f"{url}: bytes {begin} to {end} were asked for, but the server sent {span.begin} to {span.end}; "
            "the store, or something between here and there, does not understand ranges",
            url=url,
        )
    length = header("content-length")
    if length is not None and parse_length(length) != end - begin:
        raise ReadError(
            f"{url}: the server announced {clean(length, 30)} bytes for a range of {end - begin}", url=url
        )


def short(url: str, got: int, wanted: int) -> Transient:
    """The error for a body that ended too early."""
    return Transient(f"{url}: the connection ended after {got} of {wanted} bytes")


def check_asked(url: str, offset: int, length: int, opened: Opened) -> None:
    """Raise `ReadError` for a range that the object does not have."""
    if offset < 0 or offset > opened.size - length:
        raise ReadError(
            f"{url}: bytes {offset} to {offset + length} were asked for, but the object has {opened.size}; "
            "it is cut short or damaged",
            url=url,
        )


def deliver(url: str, data: Buffer, out: memoryview, attempt: Attempt) -> None:
    """Copy what a client has in memory of its own; for clients that cannot be broken off while they wait.

    Raises `Transient`, and writes nothing, if the attempt was given up meanwhile: then `out` is another's.
    """
    attempt.bind(lambda: None)  # while something is bound, who aborts waits
    try:
        if attempt.aborted:
            raise Transient(f"{url}: the request was broken off")
        out[:] = memoryview(data).cast("B")
    finally:
        attempt.bind(None)


def parse_retry_after(text: str | None) -> float | None:
    """Seconds, from a number or a date; None if it says nothing sensible."""
    if text is None:
        return None
    if re.fullmatch(r"\d{1,5}", text, re.ASCII):
        return float(text)
    date = email.utils.parsedate_tz(text)
    if date is None:
        return None
    try:
        seconds = email.utils.mktime_tz(date) - time.time()
    except (ValueError, OverflowError):
        return None
    return seconds if 0 <= seconds < 100_000 else None


#: Statuses that may pass. 500 and above too, but for two that say "never".
_PASSING: Final = (408, 425, 429)


def may_pass(status: int) -> bool:
    """Whether the same request may succeed later."""
    return status in _PASSING or (status >= 500 and status not in (501, 505))
