# SPDX-License-Identifier: Apache-2.0
"""What a server said, fit for an error message: short, on one line, without what may be secret."""

from __future__ import annotations

import re
from typing import Final

# Parameters of presigned URLs of all kinds; servers and proxies like to quote the URL that they got.
_SECRETS: Final = re.compile(
    r"(?i)\b(X-Amz-Signature|X-Amz-Credential|X-Amz-Security-Token|X-Goog-Signature|X-Goog-Credential"
    r"|AWSAccessKeyId|Signature|sig|[a-z_-]*token|password|key-pair-id|policy)(=|%3D)[^&\s\"'<>]+"
)
_USER: Final = re.compile(r"//[^/\s@]+@")


def clean(text: str, limit: int = 200) -> str:
    """At most `limit` printable characters of `text`, which anybody may have written."""
    text = _USER.sub("//", _SECRETS.sub(r"\1=...", text[: 8 * limit]))
    text = " ".join("".join(one if one.isprintable() else " " for one in text).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def reason(error: BaseException) -> str:
    """Why a system call or a look-up failed."""
    return (
        clean((error.strerror if isinstance(error, OSError) else None) or str(error)) or type(error).__name__
    )
