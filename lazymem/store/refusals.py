# SPDX-License-Identifier: Apache-2.0
"""What an S3 server, or botocore on the way to one, says no with; and what a user is told then."""

from __future__ import annotations

import email.utils
import re
import time
from typing import Any, Final, NamedTuple

from ..errors import AccessDenied, BuildError, LazymemError, OptionError, ReadError, SnapshotNotFound
from .base import Transient
from .checks import changed, may_pass, parse_retry_after
from .connections import Answer
from .wording import clean

_BODY_MOST: Final = 64 << 10
_PASSING: Final = frozenset(
    {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException",
     "RequestLimitExceeded", "BandwidthLimitExceeded", "OperationAborted"}
)  # fmt: skip
#: The credentials were good, or may have been, and are not any more: others may be had meanwhile.
RENEWABLE: Final = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "InvalidToken",
     "InvalidAccessKeyId", "SignatureDoesNotMatch"}
)  # fmt: skip
_EXPIRED: Final = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")
_OTHER_REGION: Final = frozenset(
    {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed",
     "IllegalLocationConstraintException"}
)  # fmt: skip
_REGION: Final = re.compile(r"[a-z0-9-]{1,40}")
_SKEW: Final = 300  # seconds; S3 bears 900


class Place(NamedTuple):
    """What the sentences name. credentials: where they were found, in words."""

    url: str
    bucket: str
    key: str
    endpoint: str
    credentials: str


class Refusal(NamedTuple):
    """An answer that is no success. code, said: S3's; "" where there was no body. skew: the server's clock
    minus ours, in seconds."""

    status: int
    code: str
    said: str
    region: str | None
    skew: float
    retry_after: float | None

    @property
    def is_elsewhere(self) -> bool:
        """Whether the bucket lies in another region than was asked."""
        return self.code in _OTHER_REGION or self.status in (301, 307)

    def __str__(self) -> str:
        """For a message: all that is known."""
        return " ".join(
            part for part in (str(self.status), self.code, self.said and f"({self.said})") if part
        )


def refusal_of_answer(answer: Answer) -> Refusal:
    """Read what the server said, from an answer of our own connections."""
    body = answer.read(_BODY_MOST).decode("utf-8", "replace")
    region = answer.header("x-amz-bucket-region") or _element(body, "Region")
    return Refusal(
        answer.status,
        _element(body, "Code"),
        _element(body, "Message"),
        region if _REGION.fullmatch(region) else None,
        _skew(answer.header("date")),
        parse_retry_after(answer.header("retry-after")),
    )


def refusal_of_text(status: int, text: str) -> Refusal:
    """The same from a text that has the server's XML somewhere in it."""
    return Refusal(status, _element(text, "Code"), _element(text, "Message"), None, 0.0, None)


def refusal_of_response(response: Any) -> Refusal:
    """The same from a botocore ClientError's response."""
    told = response.get("ResponseMetadata", {})
    headers = told.get("HTTPHeaders", {})
    error = response.get("Error", {})
    code = clean(str(error.get("Code") or ""), 60)
    region = str(headers.get("x-amz-bucket-region") or error.get("Region") or "")
    return Refusal(
        int(told.get("HTTPStatusCode") or 0),
        "" if code.isdigit() else code,  # of a HEAD, whose answer has no body
        clean(str(error.get("Message") or "")) if not code.isdigit() else "",
        region if _REGION.fullmatch(region) else None,
        _skew(headers.get("date")),
        parse_retry_after(headers.get("retry-after")),
    )


def _element(body: str, name: str) -> str:
    # Not an XML parser: the text comes from outside, and two of its words are all that is wanted.
    match = re.search(rf"<{name}>([^<]{{0,1000}})</{name}>", body)
    return clean(match[1]) if match else ""


def _skew(date: str | None) -> float:
    parsed = email.utils.parsedate_tz(date or "")
    try:
        return email.utils.mktime_tz(parsed) - time.time() if parsed is not None else 0.0
    except (ValueError, OverflowError):
        return 0.0


def error_of(place: Place, refusal: Refusal) -> LazymemError:
    """The exception for an answer that is no success, of a read or a listing."""
    url, status, code = place.url, refusal.status, refusal.code
    at = f"{place.endpoint} answered {refusal}"
    if may_pass(status) or code in _PASSING:
        return Transient(f"{url}: {at}", status=status, retry_after=refusal.retry_after)
    if status == 412 or code == "PreconditionFailed":
        return changed(url, "the server has another version")
    if code == "NoSuchBucket":
        return SnapshotNotFound(
            f"{url}: {place.endpoint} has no bucket {place.bucket!r}; check the name and the endpoint",
            url=url,
        )
    if refusal.is_elsewhere:
        where = f"region {refusal.region}" if refusal.region else "another region"
        return ReadError(
            f"{url}: the bucket lies in {where} ({at}); give storage option region, or set AWS_REGION",
            url=url,
        )
    if code == "NoSuchUpload":
        return ReadError(f"{url}: somebody else ended the upload ({at}); try again", url=url)
    if status == 404 or code == "NoSuchKey":
        return SnapshotNotFound(
            f"{url}: bucket {place.bucket!r} has no object {place.key!r}; check the key", url=url
        )
    if code == "InvalidBucketName":
        return OptionError(f"{url}: {place.bucket!r} cannot be the name of a bucket ({at})")
    if code == "InvalidObjectState":
        return ReadError(f"{url}: the object is archived ({at}); restore it first", url=url)
    if status in (401, 403) or code in RENEWABLE:
        return AccessDenied(_denied(place, refusal, at), url=url)
    return ReadError(f"{url}: {at}", url=url)


def _denied(place: Place, refusal: Refusal, at: str) -> str:
    code, url, found = refusal.code, place.url, place.credentials
    timing = re.search(r"has expired|not yet valid", refusal.said) if code == "AccessDenied" else None
    if code == "RequestTimeTooSkewed" or (timing and abs(refusal.skew) > _SKEW):
        return f"{url}: this machine's clock is {-refusal.skew:+.0f} s off the server's ({at}); set the clock"
    if code == "InvalidAccessKeyId":
        return f"{url}: {place.endpoint} does not know the access key from {found}; check key and endpoint"
    if code == "SignatureDoesNotMatch":
        return f"{url}: the secret key from {found} does not belong to its access key ({at}); check both"
    if code in _EXPIRED:
        return f"{url}: the temporary credentials from {found} have expired ({at}); get new ones"
    if code == "InvalidToken":
        return f"{url}: the session token from {found} is wrong ({at}); get new credentials"
    return (
        f"{url}: access is denied with the credentials from {found} ({at}); they need s3:GetObject to read, "
        "s3:PutObject to write; without s3:ListBucket an object that does not exist is answered like this too"
    )


def build_error(error: LazymemError) -> LazymemError:
    """The same sentence as an error of writing."""
    if isinstance(error, (AccessDenied, OptionError, BuildError)):
        return error
    return BuildError(str(error))


def client_error(place: Place, error: BaseException, timeout: float = 0) -> LazymemError:
    """The exception for one of botocore's, of a read or a listing."""
    from botocore import exceptions as boto

    url, at = place.url, place.endpoint
    if isinstance(error, LazymemError):
        return error
    if isinstance(error, boto.ClientError):
        return error_of(place, refusal_of_response(error.response))
    if isinstance(error, boto.ProfileNotFound):
        profile = clean(str(error.kwargs.get("profile")), 60)
        return OptionError(
            f"{url}: AWS's configuration has no profile {profile!r}; check storage option profile, "
            "AWS_PROFILE and ~/.aws/config"
        )
    if isinstance(error, (boto.ConfigParseError, boto.ConfigNotFound)):
        path = clean(str(error.kwargs.get("path")), 120)
        return OptionError(f"{url}: AWS's configuration file {path} cannot be read; mend it")
    if isinstance(error, (boto.NoCredentialsError, boto.NoAuthTokenError)):
        return AccessDenied(no_credentials(url), url=url)
    if isinstance(error, boto.PartialCredentialsError):
        return AccessDenied(
            f"{url}: the credentials are incomplete ({clean(str(error))}); complete them", url=url
        )
    retrieval = (
        boto.CredentialRetrievalError,
        boto.TokenRetrievalError,
        boto.SSOError,
        boto.MetadataRetrievalError,
    )
    if isinstance(error, retrieval):
        return AccessDenied(f"{url}: no credentials can be had ({clean(str(error))}); log in anew", url=url)
    if isinstance(error, boto.SSLError):
        return ReadError(
            f"{url}: {at} cannot be trusted ({clean(_innermost(error))}); name the file of its authority in "
            "storage option ca_bundle or in AWS_CA_BUNDLE",
            url=url,
        )
    if isinstance(error, (boto.ReadTimeoutError, boto.ConnectTimeoutError)):
        return Transient(f"{url}: nothing came from {at}" + (f" for {timeout:g} s" if timeout else ""))
    if isinstance(error, boto.ProxyConnectionError):
        return Transient(
            f"{url}: the proxy on the way to {at} does not answer; check HTTPS_PROXY and HTTP_PROXY"
        )
    if isinstance(error, boto.EndpointConnectionError):
        return Transient(f"{url}: {at} cannot be reached ({clean(_innermost(error))}); check the endpoint")
    if isinstance(error, (boto.HTTPClientError, boto.IncompleteReadError)):
        return Transient(f"{url}: the connection to {at} broke ({clean(_innermost(error), 80)})")
    if isinstance(error, (boto.BotoCoreError, ValueError)):  # of an endpoint, a region, a parameter
        return OptionError(f"{url}: botocore does not accept this: {clean(str(error))}")
    raise error


def _innermost(error: BaseException) -> str:
    """What the socket said, without the URL that the outer errors quote."""
    cause: Any = getattr(error, "kwargs", {}).get("error", error)
    while True:
        inner = getattr(cause, "reason", None) or cause.__cause__ or cause.__context__
        if not isinstance(inner, BaseException):
            break
        cause = inner
    strerror = getattr(cause, "strerror", None)
    return strerror or str(cause).rpartition(": ")[2] or type(cause).__name__


def no_credentials(url: str) -> str:
    """The sentence for somebody who has none."""
    return (
        f"{url}: no credentials were found (environment, ~/.aws, instance role); set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give storage option anonymous=True for a public object"
    )
