# SPDX-License-Identifier: Apache-2.0
"""One object by obstore's client, and what its exceptions mean.

Relies on: obstore releases the GIL while it waits; `if_match` and the status of an answer pass through it; a
range past the end brings less without an error, which is checked here. It cannot be broken off, so bytes
wait in its memory until it is clear that they are still wanted. It hangs after fork once it was used, so
nothing but the fetcher, which never forks, reads with it; only listing runs in the application.
"""

from __future__ import annotations

import email.utils
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ..errors import AccessDenied, LazymemError, OptionError, ReadError, SnapshotNotFound
from .base import Attempt, Opened, Transient
from .checks import changed, check_asked, deliver, short
from .refusals import Place, error_of, refusal_of_text
from .wording import clean

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult

_MODIFIED: Final = "last-modified:"
_WHERE: Final = {
    "gs://": "GOOGLE_APPLICATION_CREDENTIALS and your rights",
    "az://": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY and your rights",
}
_STATUS: Final = re.compile(r"status code: (\d{3})")


def load() -> Any:
    """The package. Raises `OptionError` where it is not installed."""
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise OptionError(
            "gs://, az:// and client='obstore' need the package obstore; install it: pip install "
            "'lazymem[obstore]'"
        ) from None
    return obstore


class ObstoreReader:
    """Implements `store.base.Reader`. An attempt's time-out is always the option `attempt_timeout`."""

    client = "obstore"

    def __init__(self, place: Place, container: Any) -> None:
        self._obstore = load()
        self._place = place
        self._container = container

    @property
    def url(self) -> str:
        return self._place.url

    def open(self, tail: int, *, timeout: float, attempt: Attempt | None = None) -> Opened:
        attempt = attempt or Attempt()
        wanted = max(tail, 1)
        try:
            found = self._get({"range": {"suffix": wanted}}, attempt)
        except LazymemError:
            raise
        except Exception as error:
            if type(error).__name__ == "NotSupportedError":
                attempt.requests -= 1  # nothing was sent: Azure has no ranges that count from the end
                return self._open_by_size(tail, attempt)
            if _status(error) == 416:  # it is empty
                return self._open_by_size(tail, attempt)
            raise error_from(self._place, error) from None
        size = found.meta["size"]
        if found.range != (max(0, size - wanted), size):
            raise ReadError(
                f"{self.url}: the last {wanted} of {size} bytes were asked for, but the server sent "
                f"{found.range[0]} to {found.range[1]}",
                url=self.url,
            )
        body = self._body(found, min(size, wanted), attempt)
        return Opened(size, _identity(found.meta), bytes(body) if tail else b"")

    def _open_by_size(self, tail: int, attempt: Attempt) -> Opened:
        attempt.requests += 1
        meta = self._try(lambda: self._obstore.head(self._container, self._place.key))
        opened = Opened(meta["size"], _identity(meta), b"")
        out = bytearray(min(tail, opened.size))
        self.read_into(opened.size - len(out), memoryview(out), opened, attempt, timeout=0)
        return Opened(opened.size, opened.identity, bytes(out))

    def read_into(
        self, offset: int, out: memoryview, opened: Opened, attempt: Attempt, *, timeout: float
    ) -> None:
        end = offset + len(out)
        check_asked(self.url, offset, len(out), opened)
        if not out:
            return
        asked: GetOptions = {"range": (offset, end)}
        if opened.identity.startswith(_MODIFIED):
            text = opened.identity.removeprefix(_MODIFIED)
            asked["if_unmodified_since"] = email.utils.parsedate_to_datetime(text)
        elif opened.identity and not opened.identity.startswith("W/"):
            asked["if_match"] = opened.identity
        found = self._try(lambda: self._get(asked, attempt))
        size, identity = found.meta["size"], _identity(found.meta)
        if size != opened.size:
            raise changed(self.url, f"it had {opened.size} bytes and has {size} now")
        if identity != opened.identity:
            raise changed(self.url, f"it is {clean(identity, 60)} now")
        if found.range != (offset, end):
            raise ReadError(
                f"{self.url}: bytes {offset} to {end} were asked for, but the server sent "
                f"{found.range[0]} to {found.range[1]}",
                url=self.url,
            )
        deliver(self.url, self._body(found, len(out), attempt), out, attempt)

    def _get(self, asked: GetOptions, attempt: Attempt) -> GetResult:
        attempt.requests += 1
        found: GetResult = self._obstore.get(self._container, self._place.key, options=asked)
        if found.meta["path"] != self._place.key:
            raise ReadError(f"{self.url}: obstore makes another key of it; use another client", url=self.url)
        return found

    def _body(self, found: GetResult, wanted: int, attempt: Attempt) -> Any:
        body = self._try(found.bytes)
        attempt.received += len(body)
        if len(body) != wanted:
            raise short(self.url, len(body), wanted)
        return body

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except LazymemError:
            raise
        except Exception as error:
            raise error_from(self._place, error) from None

    def close(self) -> None:
        """The connections are obstore's."""

    def __repr__(self) -> str:
        return f"ObstoreReader({self.url!r})"


def _identity(meta: Any) -> str:
    etag = meta["e_tag"]
    if etag and not etag.startswith("W/"):
        return str(etag)
    return _MODIFIED + email.utils.format_datetime(meta["last_modified"], usegmt=True)


def _status(error: BaseException) -> int:
    match = _STATUS.search(str(error).partition("\n\nDebug source")[0])
    return int(match[1]) if match else 0


def said(error: BaseException) -> str:
    """Its first sentence: what follows is Rust's view of the same."""
    return clean(str(error).partition("\n")[0])


def error_from(place: Place, error: Exception) -> LazymemError:
    """The exception for one of obstore's, by the status and the XML that its text quotes."""
    url, kind = place.url, type(error).__name__
    status = _status(error)
    if status:
        text = str(error)[: 64 << 10]
        if status in (401, 403) and not url.startswith(("s3:", "S3:")):
            return AccessDenied(
                f"{url}: access is denied ({status}); check {_WHERE[place.endpoint]}", url=url
            )
        if not 300 <= status < 400 or "<Code>" in text:
            return error_of(place, refusal_of_text(status, text))
        return ReadError(f"{url}: the bucket lies in another region; give storage option region", url=url)
    if isinstance(error, FileNotFoundError):
        return SnapshotNotFound(
            f"{url}: there is no object {place.key!r} in {place.bucket!r}; check it", url=url
        )
    if kind in ("UnauthenticatedError", "PermissionDeniedError") or "credential" in str(error)[:2000].lower():
        return AccessDenied(f"{url}: no credentials can be had, or they are refused ({said(error)})", url=url)
    if kind == "PreconditionError":
        return changed(url, "the server has another version")
    if isinstance(error, (ValueError, TypeError)) or kind in (
        "InvalidPathError",
        "UnknownConfigurationKeyError",
    ):
        return OptionError(f"{url}: obstore does not accept this: {said(error)}")
    if "InvalidCertificate" in str(error) or "invalid peer certificate" in str(error):
        return ReadError(
            f"{url}: the server's certificate is not to be trusted; name its authority in ca_bundle", url=url
        )
    return Transient(f"{url}: {said(error)}{_cause(error)}")


def _cause(error: BaseException) -> str:
    """What the socket said, from the depths of the text."""
    causes = re.findall(r'message: "([^"]{1,100})"|error: "([^"]{1,100})"', str(error))
    return "".join(f" ({clean(first or second)})" for first, second in causes[-1:])
