# SPDX-License-Identifier: Apache-2.0
"""JSON objects out of other people's files: headers and indexes."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, Final, NoReturn

from ..errors import LazymemError
from .base import damaged

_KEY_END: Final = re.compile(r'"[ \t\n\r]*:')


def load_json(content: bytes, url: str, field: str) -> dict[str, Any]:
    """The object that `content` spells, the whole of `url` or its part `field`.

    Raises `FormatError` for anything else: other values, NaN, a key that stands twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise damaged(url, field, f"has the key {twice[:200]!r} twice")
        return value

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        text = content.decode("utf-8")
        value = json.loads(text, parse_constant=refuse)
        # The hook makes parsing three times as slow, so it only runs if a key may stand twice: each
        # key in the text is a match, and other matches can only make it run in vain.
        if len(_KEY_END.findall(text)) != _count_keys(value):
            json.loads(text, object_pairs_hook=unique)
    except LazymemError:
        raise
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise damaged(url, field, f"is no valid JSON ({str(error)[:200]})") from None
    if not isinstance(value, dict):
        raise damaged(url, field, f"is a JSON {type(value).__name__} instead of an object")
    return value


def _count_keys(value: Any) -> int:
    """Keys of an object and of the objects right in it: all there are, if the header is in order."""
    if not isinstance(value, dict):
        return 0
    return len(value) + sum([len(inner) for inner in value.values() if isinstance(inner, dict)])
