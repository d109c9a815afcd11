# SPDX-License-Identifier: Apache-2.0
"""The index forms that safetensors' slices take where torch does not do the indexing.

That is framework "np", and backend "pread". Integers (32 bits), slices with positive steps and without
negative bounds, one Ellipsis, tuples of these, and the empty list; bounds outside the tensor are errors,
where numpy would clip them. Checked and worded as in safetensors 0.8; a slice that ends before it begins,
which makes that version panic or return garbage, is an error here.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Sequence
from typing import Any, Final, SupportsIndex

import numpy as np

from .errors import InvalidIndex

Item = int | slice

_MAX_INDEX: Final = 2**31
_MAX_BOUND: Final = 2**64
_MAX_STEP: Final = 2**63


def parse_index(index: object, shape: Sequence[int]) -> tuple[Item, ...]:
    """What to index numpy's array, or torch's tensor, with; it fits the shape.

    Raises `InvalidIndex`, and `TypeError` and `OverflowError` for bounds that are no numbers.
    """
    if isinstance(index, list):
        if index:
            raise InvalidIndex("Non empty lists are not implemented")
        index = slice(0, 0)
    items = list(index) if isinstance(index, tuple) else [index]
    if not items:
        return ()
    checked = [_kind(item, position) for position, item in enumerate(items)]
    expanded = _expand(checked, len(shape))
    parsed = [_bounds(item, number, shape) for number, item in enumerate(expanded)]
    _check_fits(parsed, shape)
    return tuple(item if isinstance(item, int) else slice(*item) for item in parsed)


def _kind(item: object, position: int) -> int | slice | types.EllipsisType:
    if isinstance(item, slice) or item is Ellipsis:
        return item
    try:
        # np.bool has __index__ for its own use, which raises.
        number = operator.index(item)  # type: ignore[arg-type]
        if -_MAX_INDEX <= number < _MAX_INDEX and not isinstance(item, np.bool_):
            return number
    except TypeError:
        pass
    raise InvalidIndex(f"Unsupported slice index at position {position}: expected slice, int, or ellipsis")


def _expand(items: list[int | slice | types.EllipsisType], ndim: int) -> list[Item]:
    """Without the Ellipsis."""
    places = [number for number, item in enumerate(items) if item is Ellipsis]
    if len(places) > 1:
        raise InvalidIndex("Only one ellipsis (...) is allowed in slice index")
    rest: list[Any] = [item for item in items if item is not Ellipsis]
    if places:
        rest[places[0] : places[0]] = [slice(None)] * max(0, ndim - len(rest))
    return rest


#: start, stop and step as they were given, None where they were not.
_Bounds = tuple[int | None, int | None, int | None]


def _bounds(item: Item, number: int, shape: Sequence[int]) -> int | _Bounds:
    if isinstance(item, int):
        if item >= 0 or number >= len(shape):
            return item
        if item + shape[number] < 0:
            raise InvalidIndex(f"Invalid index {item} for dimension {number} of size {shape[number]}")
        return item + shape[number]
    start, stop = _bound(item.start), _bound(item.stop)
    step = None if item.step is None else _number(item.step)
    if step is not None:
        if step >= _MAX_STEP or step < -_MAX_STEP:
            raise OverflowError("Python int too large to convert to C long")
        if step <= 0:
            raise InvalidIndex(f"Slice step must be a positive integer, got {step}")
    return start, stop, step


def _number(value: SupportsIndex) -> int:
    return operator.index(value)


def _bound(value: SupportsIndex | None) -> int | None:
    if value is None:
        return None
    number = _number(value)
    if number < 0:
        raise OverflowError("can't convert negative int to unsigned")
    if number >= _MAX_BOUND:
        raise OverflowError("int too big to convert")
    return number


def _check_fits(items: Sequence[int | _Bounds], shape: Sequence[int]) -> None:
    said = f"Error during slicing [{', '.join(map(_shown, items))}] with shape {list(shape)}: "
    if len(items) > len(shape):
        raise InvalidIndex(said + "more slicing indexes than dimensions in tensor")
    for dimension in reversed(range(len(items))):
        item, length = items[dimension], shape[dimension]
        if isinstance(item, int):
            start, stop, asked = item, item, item
        else:
            start = item[0] or 0
            stop = length if item[1] is None else item[1]
            asked = max(start, stop - 1)
        if start >= length or stop > length:
            raise InvalidIndex(
                f"{said}index {asked} out of bounds for tensor dimension #{dimension} of size {length}"
            )
        if stop < start:
            raise InvalidIndex(f"{said}dimension #{dimension} would end before it begins")


def _shown(item: int | _Bounds) -> str:
    if isinstance(item, int):
        return str(item)
    start, stop, step = ("" if bound is None else str(bound) for bound in item)
    return f"{start}:{stop}" + (f":{step}" if step and step != "1" else "")
