# SPDX-License-Identifier: Apache-2.0
"""Dtypes as JSON (format/FORMAT.md, "Dtypes"), and what the writer needs to know about them.

A dtype is written only if reading it back gives an equal one, and read only if it is written
exactly as this module would write it. Nothing here evaluates or unpickles anything.
"""

from __future__ import annotations

import re
from typing import Any, Final

import ml_dtypes
import numpy as np

from .errors import FormatError, UnsupportedDtype, UnsupportedFormat

DtypeJson = str | list[Any]

MAX_ITEMSIZE: Final = 2**31 - 1  # numpy's own limit
MAX_DEPTH: Final = 32  # structures within structures

#: Every dtype that the installed ml_dtypes defines, by name. Their dtype.str ("<V2") says nothing.
EXTENSION_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    np.dtype(scalar).name: np.dtype(scalar)
    for scalar in vars(ml_dtypes).values()
    if isinstance(scalar, type) and issubclass(scalar, np.generic)
}
# numpy has 24 builtin kinds; every number above belongs to an extension.
_EXTENSION_NAMES: Final = {dtype.num: name for name, dtype in EXTENSION_DTYPES.items()}

_NUMPY_STRING: Final = re.compile(r"[<>|][biufcSUVmM][0-9]{1,10}(\[([1-9][0-9]{0,9})?[A-Za-z]{1,7}\])?")
_EXTENSION_STRING: Final = re.compile(r"[a-z][a-z0-9_]{1,39}")


def dtype_to_json(dtype: np.dtype[Any], *, name: str = "") -> DtypeJson:
    """Return `dtype` as FORMAT.md writes it; `name` is the array's, for the error's sentence.

    Raises `UnsupportedDtype` for object dtypes, strings of variable length, and for any dtype
    that would come back different (overlapping or unsorted fields, unnamed fields).
    """
    value = _to_json(dtype, name, 0)
    try:
        same = dtype_from_json(value, url="", field="") == dtype
    except FormatError:
        same = False
    if not same:
        raise UnsupportedDtype(
            f"{_array(name)} has dtype {_shown(dtype)}, which a snapshot cannot express; give its fields "
            "names and let them follow one another (numpy.lib.recfunctions.repack_fields)"
        )
    return value


def dtype_from_json(value: object, *, url: str, field: str) -> np.dtype[Any]:
    """Return the dtype that `value`, parsed JSON of any shape, stands for.

    Raises `FormatError` if it is not a dtype exactly as FORMAT.md writes it, and
    `UnsupportedFormat` for the name of an extension dtype that is not installed here.
    """
    try:
        dtype = _from_json(value, 0)
        if _to_json(dtype, "", 0) != value:
            raise _BadDtype("not in the one form that is written")
        return dtype
    except _UnknownName as error:
        raise UnsupportedFormat(
            f"{url}: {field} has the dtype {str(error)!r}, which the installed ml_dtypes does not know; "
            "upgrade ml_dtypes",
            url=url,
            field=field,
        ) from None
    except (_BadDtype, TypeError, ValueError, OverflowError) as error:
        raise FormatError(
            f"{url}: {field} is not a valid dtype ({_clip(str(error))}); the file is damaged",
            url=url,
            field=field,
        ) from None


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether the elements are floating-point numbers, real or complex, of any width."""
    if dtype.num in _EXTENSION_NAMES:
        return not _EXTENSION_NAMES[dtype.num].startswith(("int", "uint"))
    return dtype.kind in "fc"


def plane_width(dtype: np.dtype[Any]) -> int:
    """Bytes of one real number (2, 4 or 8) if byte planes make sense for `dtype`, else 0."""
    if not is_float(dtype):
        return 0
    name = _EXTENSION_NAMES.get(dtype.num, "")
    parts = 2 if dtype.kind == "c" or "complex" in name else 1
    width = dtype.itemsize // parts
    # An 80-bit long double fills 12 or 16 bytes with its own layout; one byte has no planes.
    return width if width in (2, 4, 8) else 0


class _BadDtype(Exception):
    """What is wrong with a JSON dtype."""


class _UnknownName(Exception):
    """Well-formed name of an extension dtype that is not here."""


def _clip(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."


def _shown(dtype: np.dtype[Any]) -> str:
    return _clip(str(dtype))


def _array(name: str) -> str:
    return f"array {name!r}" if name else "the array"


def _to_json(dtype: np.dtype[Any], name: str, depth: int) -> DtypeJson:
    if dtype.hasobject:
        raise UnsupportedDtype(
            f"{_array(name)} has dtype {_shown(dtype)}, whose elements are Python objects or strings of "
            "variable length; convert it to a dtype of fixed size"
        )
    if dtype.num in _EXTENSION_NAMES:
        extension = _EXTENSION_NAMES[dtype.num]
        if dtype != EXTENSION_DTYPES[extension]:
            raise UnsupportedDtype(
                f"{_array(name)} has dtype {extension} in the other byte order; convert it to the machine's"
            )
        return extension
    if dtype.num >= 256 or dtype.subdtype is not None:
        raise UnsupportedDtype(f"{_array(name)} has dtype {_shown(dtype)}, which a snapshot cannot express")
    if dtype.names is None:
        return dtype.str
    if depth == MAX_DEPTH:
        raise UnsupportedDtype(f"{_array(name)} has a dtype nested more than {MAX_DEPTH} deep; flatten it")
    return _descr(dtype, dtype.names, name, depth)


def _descr(dtype: np.dtype[Any], names: tuple[str, ...], array: str, depth: int) -> list[Any]:
    assert dtype.fields is not None
    items: list[Any] = []
    end = 0
    for field_name in names:
        field = dtype.fields[field_name]
        base, offset = field[0], field[1]
        title = field[2] if len(field) > 2 else None
        if offset < end or (title is not None and not isinstance(title, str)):
            raise UnsupportedDtype(
                f"{_array(array)} has a structured dtype whose field {field_name!r} overlaps the one before, "
                "is out of order, or has a title that is no string; see numpy.lib.recfunctions.repack_fields"
            )
        if offset > end:
            items.append(["", f"|V{offset - end}"])
        end = offset + base.itemsize
        shape: tuple[int, ...] = ()
        if base.subdtype is not None:
            base, shape = base.subdtype
        item: list[Any] = [
            field_name if title is None else [title, field_name],
            _to_json(base, array, depth + 1),
        ]
        if shape:
            item.append(list(shape))
        items.append(item)
    if dtype.itemsize > end:
        items.append(["", f"|V{dtype.itemsize - end}"])
    return items


def _from_json(value: object, depth: int) -> np.dtype[Any]:
    if isinstance(value, str):
        return _from_string(value)
    if not isinstance(value, list):
        raise _BadDtype(f"found a {type(value).__name__} where a string or a list must stand")
    if depth == MAX_DEPTH:
        raise _BadDtype(f"nested more than {MAX_DEPTH} deep")
    names: list[str] = []
    titles: list[str | None] = []
    formats: list[Any] = []
    offsets: list[int] = []
    end = 0
    for item in value:
        title, name, dtype = _field(item, depth)
        if end + dtype.itemsize > MAX_ITEMSIZE:
            raise _BadDtype(f"items of more than {MAX_ITEMSIZE} bytes")
        if name:
            names.append(name)
            titles.append(title)
            formats.append(dtype)
            offsets.append(end)
        elif title is not None or dtype.kind != "V" or dtype.str != item[1] or not dtype.itemsize:
            raise _BadDtype("a field without a name that is not padding")
        end += dtype.itemsize
    # Names and titles share one name space in numpy, which itself only looks at part of the clashes.
    keys = names + [title for title in titles if title is not None]
    if len(set(keys)) != len(keys):
        raise _BadDtype("two fields of one name")
    spec: dict[str, Any] = {"names": names, "formats": formats, "offsets": offsets, "itemsize": end}
    if any(title is not None for title in titles):
        spec["titles"] = titles
    return np.dtype(spec)  # type: ignore[call-overload, no-any-return]


def _field(item: object, depth: int) -> tuple[str | None, str, np.dtype[Any]]:
    if not isinstance(item, list) or len(item) not in (2, 3):
        raise _BadDtype("a field that is not [name, dtype] or [name, dtype, shape]")
    title: str | None = None
    name = item[0]
    if isinstance(name, list) and len(name) == 2 and isinstance(name[0], str):
        title, name = name
    if not isinstance(name, str):
        raise _BadDtype("a field whose name is not a string")
    dtype = _from_json(item[1], depth + 1)
    if len(item) == 2:
        return title, name, dtype
    shape = item[2]
    if not isinstance(shape, list) or not 1 <= len(shape) <= 64:
        raise _BadDtype("a field whose shape is not a list of 1 to 64 lengths")
    itemsize = dtype.itemsize
    for length in shape:
        if type(length) is not int or not 0 <= length <= MAX_ITEMSIZE:
            raise _BadDtype("a field with an impossible shape")
        itemsize *= length
        if itemsize > MAX_ITEMSIZE:
            raise _BadDtype(f"items of more than {MAX_ITEMSIZE} bytes")
    return title, name, np.dtype((dtype, tuple(shape)))


def _from_string(value: str) -> np.dtype[Any]:
    known = EXTENSION_DTYPES.get(value)
    if known is not None:
        return known
    if _NUMPY_STRING.fullmatch(value):
        dtype = np.dtype(value)
        # dtype.str is canonical: "|i4", "<M8[1s]" and "<f1" (an ml_dtypes alias) are not ours.
        if dtype.str == value and dtype.num < 256:
            return dtype
    elif _EXTENSION_STRING.fullmatch(value) and value not in np.sctypeDict:
        raise _UnknownName(value)
    raise _BadDtype(f"found {_clip(value)!r}")
