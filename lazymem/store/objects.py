# SPDX-License-Identifier: Apache-2.0
"""Google's and Azure's object stores, and S3's ranges for who wants them so, by obstore (an extra).

Which store objects are made, and with whose credentials; `obstore_reader` reads with them.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import datetime, timedelta, timezone
from typing import Any, Final
from urllib.parse import urlsplit

from ..errors import BuildError, LazymemError, OptionError, SnapshotNotFound
from ..options import StoreOptions, environment_as
from . import locations, tls
from .aws import Session
from .base import Reader, Writer
from .obstore_reader import ObstoreReader, error_from, load, said
from .refusals import Place

_CREDENTIALS_LIVE: Final = timedelta(minutes=4)
_ADVICE: Final = {
    "gs": "Google's S3 interface takes uploads: s3://bucket/key with storage option "
    "endpoint_url='https://storage.googleapis.com' and an HMAC key",
    "az": "write to a file, and copy that with Azure's tools",
}


def _kind(url: str) -> str:
    return "gs" if locations.scheme_of(url) in ("gs", "gcs") else "az"


def _client_options(options: StoreOptions, endpoint: str | None, bundle: str | bool | None) -> dict[str, Any]:
    given: dict[str, Any] = {
        "allow_http": (endpoint or "").startswith("http://"),
        "connect_timeout": timedelta(seconds=min(options.attempt_timeout, 10.0)),
        "read_timeout": timedelta(seconds=options.attempt_timeout),
        "timeout": timedelta(days=1),  # of a whole answer, which lasts as long as bytes come
        "user_agent": "lazymem",
    }
    if bundle is False:
        given["allow_invalid_certificates"] = True
    elif isinstance(bundle, str) and not os.path.isdir(bundle):
        try:
            with open(bundle, "rb") as file:
                given["root_certificate"] = file.read()
        except OSError as error:
            raise OptionError(f"ca_bundle {bundle!r} cannot be read ({error.strerror}); check it") from None
    return given


_NO_RETRIES: Final = {"max_retries": 0}  # who drives a reader retries


def _split(url: str) -> tuple[str, str]:
    """The container's URL, and the key as it stands."""
    scheme, _, rest = url.partition("://")
    container, _, key = rest.partition("/")
    if not container:
        raise OptionError(f"{url}: names no bucket; write {scheme}://bucket/key")
    return f"{scheme.lower()}://{container}", key


def _check_key(url: str, key: str) -> None:
    if not key:
        raise OptionError(f"{url}: names a bucket, but no object in it; write {url.rstrip('/')}/key")
    # obstore makes another key of these, without a word about it.
    if key != key.strip("/") or "//" in key or {".", ".."} & set(key.split("/")):
        raise OptionError(
            f"{url}: obstore cannot name the object {key!r}, whose parts are empty or made of dots; rename it"
        )


class ObjectStore:
    """Implements `store.base.Store` for gs:// and az://; reading and listing."""

    def __init__(self, options: StoreOptions) -> None:
        self._obstore = load()
        self._options = options
        self._lock = threading.Lock()
        self._containers: dict[str, Any] = {}

    def reader(self, url: str) -> Reader:
        container, key = _split(url)
        _check_key(url, key)
        place = Place(url, container.partition("://")[2], key, _kind(url) + "://", "the environment")
        return ObstoreReader(place, self._container(url, container))

    def writer(self, url: str, *, overwrite: bool = True) -> AbstractContextManager[Writer]:
        raise BuildError(
            f"{url}: {_kind(url)}:// is read-only here, since obstore cannot abort an upload without leaving "
            f"parts behind; {_ADVICE[_kind(url)]}"
        )

    def list(self, url: str) -> Iterator[str]:
        container, key = _split(url)
        prefix = key.rstrip("/")
        place = Place(url, container.partition("://")[2], prefix, _kind(url) + "://", "the environment")
        try:
            found = self._obstore.list_with_delimiter(self._container(url, container), prefix or None)
        except Exception as error:
            raise error_from(place, error) from None
        begin = len(prefix) + 1 if prefix else 0
        names = {item["path"][begin:] for item in found["objects"]}
        names |= {folder[begin:].rstrip("/") + "/" for folder in found["common_prefixes"]}
        if not names and prefix:
            raise SnapshotNotFound(f"{url}: nothing lies under {prefix + '/'!r}; check the key", url=url)
        return iter(sorted(name for name in names if name.strip("/")))

    def _container(self, url: str, container: str) -> Any:
        with self._lock:
            if container not in self._containers:
                self._containers[container] = self._make(url, container)
            return self._containers[container]

    def _make(self, url: str, container: str) -> Any:
        options = self._options
        endpoint = options.endpoint_url
        given: dict[str, Any] = {}
        if endpoint is not None:
            given["base_url" if _kind(url) == "gs" else "endpoint"] = endpoint
        if options.anonymous:
            given["skip_signature"] = True
        bundle = tls.bundle_of(options.ca_bundle, options.environment)
        locations.warn_if_plain(endpoint or "")
        try:
            with environment_as(options.environment):
                return self._obstore.store.from_url(
                    re.sub("^gcs:", "gs:", container),
                    client_options=_client_options(options, endpoint, bundle),
                    retry_config=_NO_RETRIES,
                    **given,
                )
        except LazymemError:
            raise
        except Exception as error:
            raise OptionError(f"{url}: obstore does not accept this: {said(error)}") from None

    def __repr__(self) -> str:
        return "ObjectStore()"


class S3Containers:
    """obstore's view of the buckets of one session, for ranges by client="obstore"."""

    def __init__(self, options: StoreOptions, session: Session) -> None:
        self._obstore = load()
        self._options = options
        self._session = session
        self._lock = threading.Lock()
        self._containers: dict[str, Any] = {}

    def reader(self, url: str, bucket: str, key: str) -> Reader:
        """A reader of the object, with the session's credentials."""
        _check_key(url, key)
        with self._lock:
            if bucket not in self._containers:
                with self._session.errors(url, bucket, key):
                    self._containers[bucket] = self._make(bucket)
            place = self._session.place(url, bucket, key)
            return ObstoreReader(place, self._containers[bucket])

    def _make(self, bucket: str) -> Any:
        from botocore.exceptions import NoCredentialsError

        options = self._options
        client = self._session.client("ranges", bucket)
        endpoint, region = client.meta.endpoint_url, client.meta.region_name
        given: dict[str, Any] = {"region": "us-east-1" if region == "aws-global" else region}
        if not re.search(r"\.amazonaws\.com(\.cn)?$", urlsplit(endpoint).hostname or ""):
            given["endpoint"] = endpoint
        if options.addressing_style == "virtual" and "endpoint" in given:
            given["endpoint"] = endpoint.replace("://", f"://{bucket}.", 1)
        given["virtual_hosted_style_request"] = options.addressing_style == "virtual"
        if options.anonymous:
            given["skip_signature"] = True
        elif self._session.credentials() is None:
            raise NoCredentialsError
        else:
            given["credential_provider"] = self._credentials
        # Without AWS's variables: botocore has read them, and some would overrule what it made of them.
        quiet = {name: text for name, text in options.environment.items() if not name.startswith("AWS_")}
        with environment_as(quiet):
            return self._obstore.store.S3Store(
                bucket,
                client_options=_client_options(options, endpoint, self._session.bundle()),
                retry_config=_NO_RETRIES,
                **given,
            )

    def _credentials(self) -> dict[str, Any]:
        found = self._session.credentials()
        return {
            "access_key_id": found.access_key,
            "secret_access_key": found.secret_key,
            "token": found.token,
            "expires_at": datetime.now(timezone.utc) + _CREDENTIALS_LIVE,
        }
