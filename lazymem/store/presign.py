# SPDX-License-Identifier: Apache-2.0
"""A signed URL without a botocore client, where keys and endpoint are given and nothing else decides.

Loading botocore and making a client took more than half of the time until the first tensor of a model (0.36
of 0.58 s), in the way of a thread that touched memory. So the plain case is done here: keys and endpoint from
storage options or the environment, no profile, no configuration file. Everything else is botocore's to
decide, and `Facts.of` says None. The tests hold every URL against botocore's own.

Signature Version 4 in the query: https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html
"""

from __future__ import annotations

import hmac
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final
from urllib.parse import quote, urlsplit

from ..options import StoreOptions

#: Variables whose effect is known here. With any other AWS_* botocore decides.
_UNDERSTOOD: Final = frozenset(
    "AWS_" + name
    for name in (
        "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "DEFAULT_REGION", "REGION", "ENDPOINT_URL",
        "ENDPOINT_URL_S3", "EC2_METADATA_DISABLED", "CONFIG_FILE", "SHARED_CREDENTIALS_FILE", "CA_BUNDLE",
        "MAX_ATTEMPTS", "RETRY_MODE", "REQUEST_CHECKSUM_CALCULATION", "RESPONSE_CHECKSUM_VALIDATION", "PAGER",
    )
)  # fmt: skip
_FILES: Final = (("AWS_CONFIG_FILE", "config"), ("AWS_SHARED_CREDENTIALS_FILE", "credentials"))
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_HOST: Final = re.compile(r"https?://([a-z0-9.-]+)(:[0-9]{1,5})?/?")
_REGION: Final = "us-east-1"  # what botocore signs for where nobody says, and the endpoint is given


@dataclass(frozen=True, slots=True)
class Facts:
    """What signing takes. found: where the keys come from, in botocore's words."""

    endpoint: str
    region: str
    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(repr=False)
    found: str

    @classmethod
    def of(cls, options: StoreOptions) -> Facts | None:
        """None where more has a say than keys and endpoint."""
        env = options.environment
        endpoint = options.endpoint_url or env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
        key, secret, token = options.access_key_id, options.secret_access_key, options.session_token
        found = "explicit"
        if key is None:
            names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
            key, secret, token = (env.get(name) for name in names)
            found = "env"
        region = options.region or env.get("AWS_DEFAULT_REGION") or _REGION
        if (
            options.anonymous
            or options.profile is not None
            or options.addressing_style == "virtual"
            or not endpoint
            or not _is_plain(endpoint)
            or not key
            or not secret
            or not _NAME.fullmatch(region)
            or "global" in region
            or _more_is_configured(env)
        ):
            return None
        return cls(endpoint.rstrip("/"), region, key, secret, token or None, found)

    def sign(self, method: str, bucket: str, key: str, seconds: int, region: str | None = None) -> str | None:
        """The URL, good for so many seconds from now. None where the names are not plain. Sends nothing."""
        region = region or self.region
        if not _NAME.fullmatch(bucket) or not _NAME.fullmatch(region) or not key or key.startswith("/"):
            return None
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        scope = f"{now[:8]}/{region}/s3/aws4_request"
        parameters = {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Credential": f"{self.access_key_id}/{scope}",
            "X-Amz-Date": now,
            "X-Amz-Expires": str(seconds),
            "X-Amz-SignedHeaders": "host",
        }
        if self.session_token is not None:
            parameters["X-Amz-Security-Token"] = self.session_token
        query = "&".join(f"{name}={quote(parameters[name], safe='-_.~')}" for name in sorted(parameters))
        path = f"/{bucket}/{quote(key, safe='/~')}"
        request = f"{method}\n{path}\n{query}\nhost:{_host_of(self.endpoint)}\n\nhost\nUNSIGNED-PAYLOAD"
        text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{sha256(request.encode()).hexdigest()}"
        secret = b"AWS4" + self.secret_access_key.encode()
        for part in scope.split("/"):
            secret = _mac(secret, part)
        return f"{self.endpoint}{path}?{query}&X-Amz-Signature={_mac(secret, text).hex()}"


def _mac(secret: bytes, text: str) -> bytes:
    return hmac.new(secret, text.encode(), sha256).digest()


def _is_plain(endpoint: str) -> bool:
    """An address of somebody's own server. AWS's have rules of their own."""
    matched = _HOST.fullmatch(endpoint)
    return matched is not None and "amazonaws.com" not in matched[1]


def _host_of(endpoint: str) -> str:
    """As it stands in the request's Host: without the port that the scheme implies."""
    parts = urlsplit(endpoint)
    implied = {"http": ":80", "https": ":443"}[parts.scheme]
    return parts.netloc.removesuffix(implied)


def _more_is_configured(env: Mapping[str, str]) -> bool:
    if any(name.startswith("AWS_") and name not in _UNDERSTOOD for name in env):
        return True
    home = env.get("HOME") or os.path.expanduser("~")
    for variable, name in _FILES:
        path = env.get(variable) or os.path.join(home, ".aws", name)
        try:
            if os.stat(path.replace("~", home, 1) if path.startswith("~/") else path).st_size > 0:
                return True
        except FileNotFoundError:
            pass
        except OSError:
            return True  # whatever it is, botocore shall say it
    return False
