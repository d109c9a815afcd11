# SPDX-License-Identifier: Apache-2.0
"""Section SRCS: the bases of a layer, how they are named, and which names are followed.

Owns the rule that a layer leads nowhere but to its own store, so that whoever writes an object cannot have
the local files, or the internal hosts, of whoever opens it read. Opens nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final
from urllib.parse import urlsplit

from ..errors import FormatError, OptionError
from ..store import locations
from . import structs
from .origin import unsafe_name
from .sections import damaged

_FIELD: Final = "section SRCS"
_HEX: Final = re.compile(r"[0-9a-f]*")
_MAX_URL: Final = 4096


@dataclass(frozen=True, slots=True)
class Base:
    """One file whose chunks a layer uses. url: as written. digest: of its content, hexadecimal.

    size: of the file, in bytes. index: the checksum of its index, hexadecimal: what tells this file from
    another of the same content, whose chunks lie elsewhere.
    """

    url: str
    digest: str
    size: int
    index: str


_KEYS: Final = tuple(field.name for field in fields(Base))


def parse_bases(url: str, value: Sequence[Any]) -> tuple[Base, ...]:
    """Section SRCS, checked on its own. Raises `FormatError`."""
    if len(value) > structs.MAX_BASES:
        raise damaged(url, _FIELD, f"names {len(value)} files, more than {structs.MAX_BASES}")
    return tuple(_parse_base(url, i, entry) for i, entry in enumerate(value))


def _parse_base(url: str, number: int, entry: Any) -> Base:
    field = f"{_FIELD} entry {number}"
    if not isinstance(entry, dict) or entry.keys() != set(_KEYS):
        raise damaged(url, field, f"is not an object of exactly {', '.join(_KEYS)}")
    base = Base(**entry)
    problem = _problem_of(base.url)
    if problem is not None:
        raise damaged(url, field, f"has a url that {problem}")
    for name, length in (("digest", 64), ("index", 16)):
        text = getattr(base, name)
        if not isinstance(text, str) or len(text) != length or not _HEX.fullmatch(text):
            raise damaged(url, field, f"has a {name} that is not {length} hexadecimal digits")
    least = structs.HEAD.size + structs.TAIL.size
    if type(base.size) is not int or not least <= base.size < 1 << 63:
        raise damaged(url, field, f"has an impossible size ({str(base.size)[:40]})")
    return base


def _problem_of(name: Any) -> str | None:
    """Why this cannot name a base, if it cannot; the end of a sentence."""
    if not isinstance(name, str) or not name or len(name) > _MAX_URL:
        return f"is not a string of 1 to {_MAX_URL} characters"
    if not name.isprintable():
        return "holds characters that cannot be printed"
    if locations.scheme_of(name) is not None:
        return None if locations.display(name) == name else "carries a user or a query"
    if name.startswith("/"):
        return None
    return unsafe_name(name)


def resolve(layer: str, base: Base) -> str:
    """The location of a base of the layer at `layer`. Raises `FormatError` if it is in another store."""
    if locations.scheme_of(base.url) is None and not base.url.startswith("/"):
        location = locations.parent(layer)
        for part in base.url.split("/"):
            location = locations.join(location, part)
        return location
    if not is_same_store(layer, base.url):
        raise FormatError(
            f"{layer}: {_FIELD} names {base.url!r}, but a layer leads only to files of its own store (a "
            "local one to local files, a remote one to the same bucket or host); build it anew there",
            url=layer,
            field=_FIELD,
        )
    return base.url


def is_same_store(one: str, other: str) -> bool:
    """Whether both are local, or both of one bucket or host."""
    scheme = locations.scheme_of(one)
    if scheme != locations.scheme_of(other):
        return False
    return scheme is None or urlsplit(one).netloc.lower() == urlsplit(other).netloc.lower()


def name_for(layer: str, base: str) -> str:
    """How the layer at `layer` is to name the file at `base`: relative where that lies beside or below it.

    Raises `OptionError` for what a layer cannot name.
    """
    if not is_same_store(layer, base):
        raise OptionError(
            f"{locations.display(base)}: cannot be the base of {layer}: both must be local, or lie in one "
            "bucket; `lazymem copy` it there first"
        )
    if locations.scheme_of(base) is None:
        base, layer = os.path.abspath(base), os.path.abspath(layer)
    folder = locations.parent(layer).rstrip("/") + "/"
    relative = base[len(folder) :] if base.startswith(folder) else None
    # join() quotes for http, so only what needs no quoting may be relative to both.
    name = relative if relative is not None and unsafe_name(relative) is None else base
    problem = _problem_of(name)
    if problem is not None:
        raise OptionError(f"{name!r}: is no name for a base, because it {problem}; rename the file")
    return name
