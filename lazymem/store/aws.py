# SPDX-License-Identifier: Apache-2.0
"""AWS's ways as boto3 knows them: credentials, profiles, regions, endpoints, signing.

botocore, which boto3 is made of, is asked directly: a quarter of boto3's start-up time is its own, and
nothing of that would be used. Imported where an s3:// URL first needs it.

botocore reads the environment of its process; what it is to see is the application's at open. So every
call that may look there (a client is made, credentials are fetched, something is signed) goes through here.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from ..errors import AccessDenied
from ..options import StoreOptions, environment_as
from . import tls
from .presign import Facts
from .refusals import Place, client_error, no_credentials

_SIGNED_SECONDS: Final = 3600
_RENEW_SECONDS: Final = 5.0  # credentials that are younger than this are not asked for again
_SESSIONS_MOST: Final = 32

_FOUND: Final = {
    "explicit": "storage_options",
    "env": "the environment (AWS_ACCESS_KEY_ID)",
    "shared-credentials-file": "the file ~/.aws/credentials (AWS_SHARED_CREDENTIALS_FILE)",
    "config-file": "the file ~/.aws/config (AWS_CONFIG_FILE)",
    "iam-role": "the instance's role",
    "container-role": "the container's role",
    "": "AWS's configuration",
}


class Signed(NamedTuple):
    """A URL that needs no other credentials, and what it was made with. To be shown to nobody."""

    url: str
    made: float
    generation: int
    region: str | None

    def __repr__(self) -> str:
        return f"Signed(generation={self.generation}, region={self.region!r})"


class Session:
    """What botocore makes of one set of options; shared by the objects and threads of a process."""

    def __init__(self, options: StoreOptions) -> None:
        self._options = options
        self._lock = threading.RLock()
        self._session: Any = None
        self._clients: dict[tuple[str, str | None], Any] = {}
        self._regions: dict[str, str] = {}
        self._opened = 0.0
        self._found = ""
        self._facts = Facts.of(options)  # None: botocore has to be asked
        self.generation = 0

    def client(self, purpose: str, bucket: str) -> Any:
        """A botocore client for the bucket's region. Raises botocore's exceptions; see `errors`.

        purpose: "ranges" (one attempt each, with the timeout of an attempt) or "calls" (botocore's retries).
        """
        with self._lock, self._environment() as session:
            key = purpose, self._regions.get(bucket)
            if key not in self._clients:
                self._clients[key] = self._make_client(session, *key)
            return self._clients[key]

    def _make_client(self, session: Any, purpose: str, region: str | None) -> Any:
        from botocore import UNSIGNED
        from botocore.config import Config

        options = self._options
        timeout = options.attempt_timeout if purpose == "ranges" else 60.0
        config = Config(
            signature_version=UNSIGNED if options.anonymous else "s3v4",
            s3=None if options.addressing_style == "auto" else {"addressing_style": options.addressing_style},
            # Whatever is not AWS refuses the trailing checksums that are botocore's default.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            connect_timeout=min(timeout, 10.0),
            read_timeout=timeout,
            retries={"total_max_attempts": 1} if purpose == "ranges" else None,
            max_pool_connections=64,
            tcp_keepalive=True,
        )
        client = session.create_client(
            "s3",
            region_name=region or options.region,
            endpoint_url=options.endpoint_url,
            verify=self._bundle(session),
            config=config,
        )
        if not options.anonymous:
            self._found = getattr(session.get_credentials(), "method", "")
        return client

    @contextmanager
    def _environment(self) -> Iterator[Any]:
        """The botocore session, in the environment that it belongs to."""
        with environment_as(self._options.environment):
            if self._session is None:
                self._session = self._open()
            yield self._session

    def _open(self) -> Any:
        import botocore.session

        _mute_secrets()

        options = self._options
        session = botocore.session.Session(profile=options.profile)
        session.user_agent_extra = "lazymem"
        if options.access_key_id is not None:
            session.set_credentials(options.access_key_id, options.secret_access_key, options.session_token)
        self._opened = time.monotonic()
        return session

    def _bundle(self, session: Any) -> str | bool | None:
        configured = session.get_config_variable("ca_bundle") if self._options.ca_bundle is None else None
        return configured or tls.bundle_of(self._options.ca_bundle, self._options.environment)

    def bundle(self) -> str | bool | None:
        """Whom to trust, for our own connections; see `tls.bundle_of`."""
        if self._facts is not None:
            env, given = self._options.environment, self._options.ca_bundle
            return (env.get("AWS_CA_BUNDLE") if given is None else None) or tls.bundle_of(given, env)
        with self._lock, self._environment() as session:
            return self._bundle(session)

    def sign(self, method: str, bucket: str, key: str) -> Signed:
        """A URL for GET or HEAD that Range and If-Match may be sent with. Raises botocore's exceptions."""
        if (facts := self._facts) is not None:
            with self._lock:
                region, generation, now = self._regions.get(bucket), self.generation, time.monotonic()
                plain = facts.sign(method, bucket, key, _SIGNED_SECONDS, region)
                if plain is not None:
                    self._opened = self._opened or now
                    self._found = facts.found
                    return Signed(plain, now, generation, region)
        client = self.client("ranges", bucket)
        with self._lock, self._environment():
            url = client.generate_presigned_url(
                "head_object" if method == "HEAD" else "get_object",
                Params={"Bucket": bucket, "Key": key},
                ExpiresIn=_SIGNED_SECONDS,
            )
            return Signed(url, time.monotonic(), self.generation, self._regions.get(bucket))

    def credentials(self) -> Any:
        """The credentials as they are now, fetched anew if they expire soon; None if anonymous."""
        if self._options.anonymous:
            return None
        with self._lock, self._environment() as session:
            found = session.get_credentials()
            return None if found is None else found.get_frozen_credentials()

    def renew(self, generation: int) -> bool:
        """Look for credentials anew: those of `generation` were refused. Whether to try once more."""
        with self._lock:
            if self.generation != generation:
                return True  # another thread did it meanwhile
            if self._options.anonymous or time.monotonic() - self._opened < _RENEW_SECONDS:
                return False
            self._session = None
            self._opened = 0.0
            self._clients = {}
            self.generation += 1
            return True

    def learn_region(self, bucket: str, region: str | None) -> bool:
        """Take in where the server says that a bucket lies. Whether that is news."""
        with self._lock:
            if region is None or self._regions.get(bucket) == region:
                return False
            self._regions[bucket] = region
            return True

    def region_of(self, bucket: str) -> str | None:
        """Where the server said that a bucket lies, if it did."""
        return self._regions.get(bucket)

    def place(self, url: str, bucket: str, key: str) -> Place:
        """What error messages name. Sends nothing and raises nothing."""
        with self._lock:
            clients = list(self._clients.values())
        known = self._options.endpoint_url if self._facts is None else self._facts.endpoint
        at = clients[-1].meta.endpoint_url if clients else known
        return Place(
            url,
            bucket,
            key,
            urlsplit(at or "").netloc.rpartition("@")[2] or "AWS",
            "nobody (anonymous=True)" if self._options.anonymous else _FOUND.get(self._found, self._found),
        )

    @contextmanager
    def errors(self, url: str, bucket: str, key: str) -> Iterator[None]:
        """In the block, botocore's exceptions become ours."""
        try:
            yield
        except Exception as error:
            from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError  # of no use before

            if isinstance(error, NoCredentialsError):
                raise AccessDenied(no_credentials(url), url=url) from None
            if not isinstance(error, (BotoCoreError, ClientError, ValueError)):
                raise
            place = self.place(url, bucket, key)
            raise client_error(place, error, self._options.attempt_timeout) from None

    def __repr__(self) -> str:
        return f"Session(profile={self._options.profile!r}, endpoint_url={self._options.endpoint_url!r})"


_sessions: OrderedDict[str, Session] = OrderedDict()
_sessions_lock = threading.Lock()


def session_for(options: StoreOptions) -> Session:
    """The process's one session for these options."""
    names = ("endpoint_url", "region", "profile", "access_key_id", "secret_access_key", "session_token",
             "anonymous", "addressing_style", "ca_bundle", "attempt_timeout")  # fmt: skip
    key = json.dumps([getattr(options, name) for name in names] + [sorted(options.environment.items())])
    with _sessions_lock:
        session = _sessions.pop(key, None) or Session(options)
        _sessions[key] = session  # the last used one last
        if len(_sessions) > _SESSIONS_MOST:
            _sessions.popitem(last=False)
        return session


def _mute_secrets() -> None:
    """botocore's own DEBUG records hold access keys, signatures and tokens; nobody's log shall.

    Who has set a level for one of these loggers keeps it.
    """
    for name in ("auth", "credentials", "endpoint", "hooks", "httpsession", "parsers"):
        logger = logging.getLogger(f"botocore.{name}")
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)


def _forget_sessions() -> None:
    """In a child of fork: the connections are the parent's, and a lock's holder may not exist."""
    global _sessions, _sessions_lock
    _sessions, _sessions_lock = OrderedDict(), threading.Lock()


os.register_at_fork(after_in_child=_forget_sessions)
