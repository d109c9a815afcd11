# SPDX-License-Identifier: Apache-2.0
"""The object of a torch.save, flattened: tensors by dotted names, what is no tensor as JSON.

An object of a pickle may name one list a thousand times, and that another one: depth, number and
length of names are bounded, whatever the size of the pickle was.
"""

from __future__ import annotations

import math
from typing import Any, Final

from ..errors import UnsupportedFormat
from .base import damaged, unsupported
from .torch_globals import Storage, Tensor, Text

#: The name of a tensor that was saved alone.
ALONE: Final = "data"

_MAX_DEPTH: Final = 64
_MAX_NODES: Final = 1_000_000
_MAX_NAME: Final = 65_535
_MAX_NAMES: Final = 64 << 20
_MAX_METADATA: Final = 256 << 10
_FIELD: Final = "data.pkl"
_PLAIN: Final = (str, int, float, bool, type(None))


class Leaves:
    """tensors: name -> tensor, in their order. values: the other leaves that are JSON, by name.

    left_out: how many others there are: not JSON, or more than fit into 256 KiB.
    """

    def __init__(self, url: str, value: Any) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, Any] = {}
        self.left_out = 0
        self._url = url
        self._nodes = self._name_bytes = self._value_bytes = 0
        self._add("", value, 0)

    def _add(self, name: str, value: Any, depth: int) -> None:
        self._count(1 + (len(value) if type(value) in (list, tuple) else 0))
        self._name_bytes += len(name)
        if depth > _MAX_DEPTH:
            raise self._too("deep", _MAX_DEPTH)
        if len(name) > _MAX_NAME or self._name_bytes > _MAX_NAMES:
            raise self._too("long in its names", _MAX_NAME)
        if isinstance(value, Storage):
            value = Tensor(value, value.dtype or "uint8", 0, (value.numel,), (1,))
        if isinstance(value, Tensor):
            self._check_name(name)
            self.tensors[name or ALONE] = value
        elif type(value) is dict:
            for key, item in value.items():
                self._add(_join(name, key if isinstance(key, str) else repr(key)), item, depth + 1)
        elif type(value) in (list, tuple) and not all(isinstance(item, _PLAIN) for item in value):
            for number, item in enumerate(value):
                self._add(_join(name, str(number)), item, depth + 1)
        else:
            self._check_name(name)
            self._add_value(name or ALONE, value)

    def _count(self, number: int) -> None:
        self._nodes += number
        if self._nodes > _MAX_NODES:
            raise self._too("large", _MAX_NODES)

    def _too(self, what: str, limit: int) -> UnsupportedFormat:
        found = f"holds an object that is too {what} (the limit is {limit})"
        return unsupported(self._url, _FIELD, found, "save a flat state_dict")

    def _check_name(self, name: str) -> None:
        if len(name.encode("utf-8")) > _MAX_NAME:  # a pickle's strings were decoded from UTF-8
            raise self._too("long in its names", _MAX_NAME)
        if (name or ALONE) in self.tensors or name in self.values:
            raise damaged(self._url, _FIELD, f"has two leaves that are both called {name[:200]!r}")

    def _add_value(self, name: str, value: Any) -> None:
        if isinstance(value, Text):
            value = value.text
        values = value if type(value) in (list, tuple) else (value,)
        size = len(name) + sum(len(item) if isinstance(item, str) else 8 for item in values)
        fits = self._value_bytes + size <= _MAX_METADATA
        if not fits or not all(_is_json(item) for item in values):
            self.left_out += 1
            return
        self._value_bytes += size
        self.values[name] = list(value) if isinstance(value, tuple) else value


def _is_json(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return value.bit_length() <= 64
    return isinstance(value, _PLAIN)


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part
