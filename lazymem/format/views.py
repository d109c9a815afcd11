# SPDX-License-Identifier: Apache-2.0
"""Section VIEW: views as JSON, and back. Every name and number of it is hostile and checked here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..dtypes import dtype_from_json, dtype_to_json
from ..views import View, problem_of
from . import structs
from .sections import damaged

_KEYS: Final = {"name", "array", "offset", "dtype", "shape", "strides"}


def views_to_json(views: Iterable[View]) -> list[dict[str, Any]]:
    """Section VIEW. Raises `UnsupportedDtype`."""
    return [
        {
            "name": view.name,
            "array": view.array,
            "offset": view.offset,
            "dtype": dtype_to_json(view.dtype, name=view.name),
            "shape": list(view.shape),
            "strides": list(view.strides),
        }
        for view in views
    ]


def parse_views(
    url: str, values: Sequence[object] | None, names: Sequence[str], sizes: NDArray[np.uint64]
) -> list[tuple[View, int]]:
    """The views, each with the row of its array. names, sizes: of the arrays, hidden ones too."""
    if not values:
        return []
    rows = {name: row for row, name in enumerate(names)}
    known = set(names)
    dtypes: dict[str, np.dtype[Any]] = {}
    views = []
    for number, value in enumerate(values):
        field = f"section VIEW entry {number}"
        if not isinstance(value, dict) or value.keys() != _KEYS:
            raise damaged(url, field, "is no object with exactly the keys of a view")
        name, array, dtype = value["name"], value["array"], value["dtype"]
        if not isinstance(name, str) or not isinstance(array, str):
            raise damaged(url, field, "has a name that is no string")
        if len(_encoded(url, field, name)) > structs.MAX_NAME:
            raise damaged(url, field, "has too long a name")
        if name in known:
            raise damaged(url, field, f"has the name {name[:200]!r}, which stands twice")
        known.add(name)
        if array not in rows:
            raise damaged(url, field, f"is a view of {array[:200]!r}, and there is no such array")
        if not isinstance(value["shape"], list) or not isinstance(value["strides"], list):
            raise damaged(url, field, "has a shape or strides that are no list")
        if isinstance(dtype, str) and dtype in dtypes:
            found = dtypes[dtype]
        else:
            found = dtype_from_json(dtype, url=url, field=field)
            if isinstance(dtype, str):
                dtypes[dtype] = found
        view = View(name, array, value["offset"], found, tuple(value["shape"]), tuple(value["strides"]))
        problem = problem_of(view, int(sizes[rows[array]]))
        if problem is not None:
            raise damaged(url, field, problem)
        views.append((view, rows[array]))
    return views


def _encoded(url: str, field: str, name: str) -> bytes:
    try:
        return name.encode("utf-8")
    except UnicodeEncodeError:  # JSON can escape what UTF-8 cannot say
        raise damaged(url, field, "has a name with lone surrogates") from None
