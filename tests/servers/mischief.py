# SPDX-License-Identifier: Apache-2.0
"""What the hostile network can do to a request, to which requests, and how it remembers them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote


@dataclass(frozen=True)
class Fault:
    """What happens to one request. Several fields may be set; offsets count bytes of the answer's body.

    Before the server sees it: delay (seconds, plus up to `jitter`), `silence` (no answer, ever),
    `status` with an S3 error `code` and `retry_after` seconds, `garbage` (bytes that are no HTTP),
    `forget`: headers that the server shall not see.
    On the way back: `headers` replaced (None: taken away), `rate` in bytes a second, the bit at `flip`
    (an offset into the body) turned, and the body broken at an offset: `reset` (RST), `stall` (nothing
    more comes, the connection stays), `truncate` (closed in good order, too early).
    """

    delay: float = 0.0
    jitter: float = 0.0
    silence: bool = False
    status: int | None = None
    code: str = "InternalError"
    retry_after: int | None = None
    garbage: bytes | None = None
    forget: tuple[str, ...] = ()
    headers: Mapping[str, str | None] = field(default_factory=dict)
    rate: float | None = None
    flip: int | None = None
    reset: int | None = None
    stall: int | None = None
    truncate: int | None = None


@dataclass
class Rule:
    """Which requests a fault befalls: those that match, `times` of them, after the first `skip`.

    ranged: with (True) or without (False) a Range header. where: any further condition.
    probability: by a generator of the rule's own, so that a test is the same each time.
    """

    fault: Fault
    method: str | None = None
    ranged: bool | None = None
    where: Callable[[Request], bool] | None = None
    probability: float = 1.0
    times: int | None = None
    skip: int = 0
    seed: int = 0
    matched: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def applies(self, request: Request) -> bool:
        """To be asked once a request: it counts."""
        if self.method is not None and request.method != self.method:
            return False
        if self.ranged is not None and (request.range is not None) != self.ranged:
            return False
        if self.where is not None and not self.where(request):
            return False
        if self._random.random() >= self.probability:
            return False
        self.matched += 1
        return self.skip < self.matched and (self.times is None or self.matched <= self.skip + self.times)


@dataclass
class Request:
    """One request as it came, and what became of it.

    headers: names in lower case. status: None while there is none, or where the answer was no HTTP.
    body_bytes: how much of the answer's body was passed on. began, ended: of time.monotonic().
    """

    method: str
    target: str = field(repr=False)  # with the query, where a signature may be
    headers: dict[str, str] = field(repr=False)
    began: float
    status: int | None = None
    body_bytes: int = 0
    ended: float | None = None
    fault: Fault | None = None

    @property
    def path(self) -> str:
        return unquote(self.target.partition("?")[0])

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    @property
    def range(self) -> str | None:
        return self.headers.get("range")

    @property
    def if_match(self) -> str | None:
        return self.headers.get("if-match")

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.range or ''} -> {self.status}, {self.body_bytes} bytes"
