# SPDX-License-Identifier: Apache-2.0
"""The index forms that safetensors' slices take where torch does not do the indexing.

That is framework "np", and backend "pread". Integers (32 bits), slices with positive steps and without
negative bounds, one Ellipsis, tuples of these, and the empty list; bounds outside the tensor are errors,
where numpy would clip them. Checked and worded as in safetensors 0.8; a slice that ends before it begins,
which makes that version panic or return garbage, is an error here.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Final, SupportsIndex

import numpy as np

from .errors import InvalidIndex

Item = int | slice

_MAX_INDEX: Final = 2**31
_MAX_BOUND: Final = 2**64
_MAX_STEP: Final = 2**63


#: start, stop and step as they were given, None where they were not.
_Bounds = tuple[int | None, int | None, int | None]


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
    parsed = _parse(items, shape)
    _check_fits(parsed, shape)
    return tuple(
        item if isinstance(item, int) else _to_slice(item, length)
        for item, length in zip(parsed, shape, strict=False)
    )


def _to_slice(bounds: _Bounds, length: int) -> slice:
    start, stop, step = bounds
    # torch multiplies the step with a stride, and a step out of the dimension is as good as any other.
    return slice(start, stop, min(step or 1, max(length, 1)))


def _parse(items: Sequence[object], shape: Sequence[int]) -> list[int | _Bounds]:
    """Without the Ellipsis; each item is checked before the next is looked at, as there."""
    parsed: list[int | _Bounds] = []
    if sum(item is Ellipsis for item in items) > 1:
        raise InvalidIndex("Only one ellipsis (...) is allowed in slice index")
    for item in items:
        if item is Ellipsis:
            parsed += [(None, None, None)] * max(0, len(shape) - (len(items) - 1))
        elif isinstance(item, slice):
            parsed.append(_bounds(item))
        else:
            parsed.append(_select(_integer(item, len(parsed)), len(parsed), shape))
    return parsed


def _integer(item: Any, position: int) -> int:
    # np.bool has an __index__ that raises, now or in numpy's next version.
    if hasattr(item, "__index__") and not isinstance(item, np.bool_):
        try:
            number = operator.index(item)
        except TypeError:  # an array of several numbers
            pass
        else:
            if -_MAX_INDEX <= number < _MAX_INDEX:
                return number
    raise InvalidIndex(f"Unsupported slice index at position {position}: expected slice, int, or ellipsis")


def _select(index: int, dimension: int, shape: Sequence[int]) -> int:
    length = shape[dimension] if dimension < len(shape) else 0
    if index + length < 0:
        raise InvalidIndex(f"Invalid index {index} for dimension {dimension} of size {length}")
    return index + length if index < 0 else index


def _bounds(item: slice) -> _Bounds:
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
            asked = start if start >= length else stop - 1
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
