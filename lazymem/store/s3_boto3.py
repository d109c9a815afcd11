# SPDX-License-Identifier: Apache-2.0
"""S3 ranges by botocore's own client, which is boto3's: for who must have its ways, at its price.

Relies on: urllib3's responses can be shut down from another thread (2.3); where they cannot, an attempt that
was broken off ends with its next byte, or with its timeout.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from ..errors import ReadError
from .aws import Session
from .base import Attempt, Opened, Transient
from .checks import (
    Header,
    changed,
    check_asked,
    check_span,
    condition_of,
    identity_of,
    parse_length,
    parse_span,
    short,
)
from .refusals import RENEWABLE, refusal_of_response

_STEP: Final = 256 << 10


class Boto3Reader:
    """Implements `store.base.Reader`. An attempt's time-out is always the option `attempt_timeout`."""

    client = "boto3"

    def __init__(self, url: str, bucket: str, key: str, session: Session) -> None:
        self._url = url
        self._bucket = bucket
        self._key = key
        self._session = session

    @property
    def url(self) -> str:
        return self._url

    def open(self, tail: int, *, timeout: float, attempt: Attempt | None = None) -> Opened:
        attempt = attempt or Attempt()
        wanted = max(tail, 1)
        answer = self._call("get_object", attempt, Range=f"bytes=-{wanted}")
        if answer is None:
            return self._open_empty(attempt)
        header = _header_of(answer)
        span = parse_span(header("content-range"))
        if span is None or span.end != span.size or span.begin != max(0, span.size - wanted):
            answer["Body"].close()
            raise ReadError(
                f"{self._url}: the last {wanted} bytes were asked for, but the server sent others",
                url=self._url,
            )
        out = bytearray(span.end - span.begin)
        self._fill(answer, memoryview(out), attempt)
        return Opened(span.size, identity_of(header), bytes(out) if tail else b"")

    def _open_empty(self, attempt: Attempt) -> Opened:
        header = _header_of(self._call("head_object", attempt) or {})
        if parse_length(header("content-length")) != 0:
            raise ReadError(
                f"{self._url}: the server refuses to send its last bytes though there are some", url=self._url
            )
        return Opened(0, identity_of(header), b"")

    def read_into(
        self, offset: int, out: memoryview, opened: Opened, attempt: Attempt, *, timeout: float
    ) -> None:
        end = offset + len(out)
        check_asked(self._url, offset, len(out), opened)
        if not out:
            return
        etag = condition_of(opened.identity).get("If-Match")
        given = {"IfMatch": etag} if etag else {}
        answer = self._call("get_object", attempt, Range=f"bytes={offset}-{end - 1}", **given)
        if answer is None:
            raise changed(self._url, "it is shorter now")
        try:
            check_span(self._url, offset, end, opened, _header_of(answer))
        except BaseException:
            answer["Body"].close()
            raise
        self._fill(answer, out, attempt)

    def _call(self, name: str, attempt: Attempt, **given: str) -> Any:
        """One request, a second one if other credentials can be had for those that were refused.

        None: the server has no such range.
        """
        from botocore.exceptions import ClientError

        with self._session.errors(self._url, self._bucket, self._key):
            generation = self._session.generation
            for is_last in (False, True):
                # Fetched here if they are about to expire, in the right environment; not in the call.
                self._session.credentials()
                client = self._session.client("ranges", self._bucket)
                attempt.requests += 1
                try:
                    return getattr(client, name)(Bucket=self._bucket, Key=self._key, **given)
                except ClientError as error:
                    refusal = refusal_of_response(error.response)
                    if refusal.status == 416:
                        return None
                    if is_last or refusal.code not in RENEWABLE or not self._session.renew(generation):
                        raise
        raise AssertionError

    def _fill(self, answer: Any, out: memoryview, attempt: Attempt) -> None:
        from urllib3.exceptions import HTTPError

        body = answer["Body"]
        attempt.bind(_unblock(body))
        got = 0
        try:
            with self._session.errors(self._url, self._bucket, self._key):
                while got < len(out) and not attempt.aborted:
                    data = body.read(min(_STEP, len(out) - got))
                    if not data:
                        break
                    out[got : got + len(data)] = data
                    got += len(data)
                    attempt.received += len(data)
        except (OSError, HTTPError):
            if not attempt.aborted:
                raise Transient(f"{self._url}: the connection broke after {got} bytes") from None
        finally:
            attempt.bind(None)
            body.close()
        if attempt.aborted:
            raise Transient(f"{self._url}: the request was broken off")
        if got < len(out):
            raise short(self._url, got, len(out))

    def close(self) -> None:
        """The connections are the session's."""

    def __repr__(self) -> str:
        return f"Boto3Reader({self._url!r})"


def _header_of(answer: Any) -> Header:
    headers: dict[str, str] = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return headers.get


def _unblock(body: Any) -> Callable[[], None]:
    shutdown = getattr(getattr(body, "_raw_stream", None), "shutdown", None)

    def unblock() -> None:
        if shutdown is not None:
            with suppress(OSError, ValueError, RuntimeError):  # it has ended already
                shutdown()

    return unblock
