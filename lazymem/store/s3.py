# SPDX-License-Identifier: Apache-2.0
"""S3 and what speaks its protocol. Ranges by our own connections, with URLs that botocore signs.

S3 does not want Range and If-Match signed, so one presigned URL serves every range of an object until it is
signed anew: after minutes, for another region, or with other credentials. botocore's own get_object costs
one to two milliseconds of CPU time for each request, which this pays once.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

from ..errors import OptionError, SnapshotNotFound
from ..options import StoreOptions
from . import locations, tls
from .aws import Session, Signed, session_for
from .base import Attempt, Reader, Writer
from .connections import Answer, Connections
from .ranges import RangeReader
from .refusals import RENEWABLE, error_of, refusal_of_answer

if TYPE_CHECKING:
    from .objects import S3Containers

_SIGN_AGAIN: Final = (
    240.0  # seconds; temporary credentials live longer than this after botocore hands them out
)
_KEY_MOST: Final = 1024  # bytes of UTF-8
# What botocore accepts; AWS's own rules are narrower, and old buckets and other servers' are not.
_BUCKET: Final = re.compile(r"[a-zA-Z0-9._-]{1,255}")


def split_s3_url(url: str) -> tuple[str, str]:
    """Bucket and key. The key is taken as it stands: "?", "#" and "%" are characters like others.

    Raises `OptionError` for what cannot be one; the key may be empty.
    """
    bucket, _, key = url.partition("://")[2].partition("/")
    if not bucket:
        raise OptionError(f"{url}: names no bucket; write s3://bucket/key")
    if not _BUCKET.fullmatch(bucket):
        advice = "give credentials as storage options" if "@" in bucket else "write s3://bucket/key"
        shown = bucket.rpartition("@")[2]
        raise OptionError(f"s3://{shown}/{key}: {shown!r} cannot be the name of a bucket; {advice}")
    try:
        length = len(key.encode())
    except UnicodeEncodeError:
        raise OptionError(f"{url!r}: the key is not text that UTF-8 can hold; check the URL") from None
    if length > _KEY_MOST or "\0" in key:
        raise OptionError(f"{url[:200]}: the key has {length} bytes; S3 takes {_KEY_MOST}, without NUL")
    return bucket, key


def split_object_url(url: str) -> tuple[str, str]:
    """Bucket and key of an object. Raises `OptionError`."""
    bucket, key = split_s3_url(url)
    if not key:
        raise OptionError(f"{url}: names a bucket, but no object in it; write s3://{bucket}/key")
    return bucket, key


class S3Store:
    """Implements `store.base.Store`."""

    def __init__(self, options: StoreOptions) -> None:
        self._options = options
        self._session = session_for(options)
        self._lock = threading.Lock()
        self._containers: S3Containers | None = None
        self.connections = Connections(lambda: tls.make_context(self._session.bundle()), options.environment)

    def reader(self, url: str) -> Reader:
        bucket, key = split_object_url(url)
        if self._options.client == "boto3":
            from .s3_boto3 import Boto3Reader

            return Boto3Reader(url, bucket, key, self._session)
        if self._options.client == "obstore":
            return self._obstore().reader(url, bucket, key)
        return S3Reader(url, bucket, key, self._session, self.connections)

    def _obstore(self) -> S3Containers:
        from .objects import S3Containers

        with self._lock:
            if self._containers is None:
                self._containers = S3Containers(self._options, self._session)
            return self._containers

    def writer(self, url: str, *, overwrite: bool = True) -> AbstractContextManager[Writer]:
        from .s3_writer import S3Upload

        bucket, key = split_object_url(url)
        with self._session.errors(url, bucket, key):
            client = self._session.client("calls", bucket)
        locations.warn_if_plain(client.meta.endpoint_url)
        return S3Upload(url, bucket, key, client, self._session, overwrite=overwrite)

    def list(self, url: str) -> Iterator[str]:
        bucket, key = split_s3_url(url)
        prefix = key if not key or key.endswith("/") else key + "/"
        with self._session.errors(url, bucket, key):
            client = self._session.client("calls", bucket)
            locations.warn_if_plain(client.meta.endpoint_url)
            names, exists = _list(client, bucket, prefix)
        if not exists and prefix:
            raise SnapshotNotFound(
                f"{url}: bucket {bucket!r} has nothing under {prefix!r}; check the key", url=url
            )
        return iter(sorted(names))

    def __repr__(self) -> str:
        return f"S3Store({self._session!r})"


def _list(client: Any, bucket: str, prefix: str) -> tuple[set[str], bool]:
    """Names under the prefix, and whether anything lies there at all: a folder's own marker counts."""
    names: set[str] = set()
    exists = False
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
    for page in pages:
        found = [item["Key"] for item in page.get("Contents", ())]
        found += [item["Prefix"] for item in page.get("CommonPrefixes", ())]
        for key in found:
            name = key.removeprefix(prefix)
            exists = True
            # "": the marker. "/": a folder without a name. Others: not what was asked for.
            if key.startswith(prefix) and name.strip("/") and "/" not in name[:-1]:
                names.add(name)
    return names, exists


class S3Reader(RangeReader):
    """Reads one object of S3 over our own connections."""

    def __init__(self, url: str, bucket: str, key: str, session: Session, connections: Connections) -> None:
        self._bucket = bucket
        self._key = key
        self._session = session
        self._lock = threading.Lock()
        self._signed: dict[str, Signed] = {}
        super().__init__(url, connections)

    def _send(self, method: str, headers: dict[str, str], attempt: Attempt, timeout: float) -> Answer:
        moved = renewed = False
        while True:
            signed = self._sign(method)
            answer = self._connections.request(
                method, signed.url, headers, shown=self._url, attempt=attempt, timeout=timeout
            )
            if answer.status in (200, 206, 412, 416):
                return answer
            with answer:
                refusal = refusal_of_answer(answer)
            old = time.monotonic() - signed.made > _SIGN_AGAIN / 4
            if refusal.is_elsewhere and not moved:
                moved = again = self._session.learn_region(self._bucket, refusal.region)
            elif refusal.code in RENEWABLE and not renewed:
                renewed = again = self._session.renew(signed.generation) or old
            else:
                again = refusal.status == 403 and old and not renewed
                renewed = True
            if again:
                self._forget(signed)
                continue
            raise error_of(self._session.place(self._url, self._bucket, self._key), refusal)

    def _sign(self, method: str) -> Signed:
        with self._lock:
            signed = self._signed.get(method)
            if (
                signed is None
                or signed.generation != self._session.generation
                or time.monotonic() - signed.made > _SIGN_AGAIN
                or signed.region != self._session.region_of(self._bucket)
            ):
                with self._session.errors(self._url, self._bucket, self._key):
                    signed = self._session.sign(method, self._bucket, self._key)
                self._signed[method] = signed
            return signed

    def _forget(self, signed: Signed) -> None:
        with self._lock:
            self._signed = {method: one for method, one in self._signed.items() if one is not signed}
