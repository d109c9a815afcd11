# SPDX-License-Identifier: Apache-2.0
"""dtypes as JSON: exact there and back, or refused."""

from __future__ import annotations

import json
import reprlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lazymem.dtypes import (
    EXTENSION_DTYPES,
    MAX_DEPTH,
    dtype_from_json,
    dtype_to_json,
    is_float,
    plane_width,
)
from lazymem.errors import FormatError, UnsupportedDtype, UnsupportedFormat


def layout(dtype: np.dtype[Any]) -> Any:
    """Everything that makes two dtypes the same, which numpy's == only looks at in part."""
    if dtype.subdtype is not None:
        return layout(dtype.subdtype[0]), dtype.subdtype[1]
    if dtype.names is None:
        return dtype.type, dtype.str, dtype.itemsize
    assert dtype.fields is not None
    fields = [(name, *dtype.fields[name][1:], layout(dtype.fields[name][0])) for name in dtype.names]
    return dtype.itemsize, fields


def round_trip(dtype: np.dtype[Any]) -> np.dtype[Any]:
    text = json.dumps(dtype_to_json(dtype, name="x"))
    return dtype_from_json(json.loads(text), url="file", field="x")


SIMPLE = [
    *("|b1", "|i1", "|u1", "<i2", ">i2", "<u4", ">u8", "<f2", ">f4", "<f8", "<f16", "<c8", ">c16", "<c32"),
    *("|S10", "|S0", "<U7", ">U7", "|V5", "|V0", "<M8", "<M8[ns]", ">M8[D]", "<m8[25s]", "<m8"),
]


@pytest.mark.parametrize("text", SIMPLE)
def test_dtype_simple_is_its_numpy_string(text: str) -> None:
    assert dtype_to_json(np.dtype(text)) == text
    assert layout(round_trip(np.dtype(text))) == layout(np.dtype(text))


def test_extension_dtypes_are_all_of_the_installed_ml_dtypes() -> None:
    for name in ("bfloat16", "float8_e4m3fn", "float4_e2m1fn", "float6_e3m2fn", "int4", "uint2"):
        assert EXTENSION_DTYPES[name] == np.dtype(getattr(ml_dtypes, name))


@pytest.mark.parametrize("name", sorted(EXTENSION_DTYPES))
def test_dtype_of_ml_dtypes_is_its_name(name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name))
    assert dtype_to_json(dtype) == name
    assert round_trip(dtype).type is dtype.type


bf16 = ml_dtypes.bfloat16
STRUCTURED = [
    np.dtype([("x", "<f4"), ("y", "<i2", (3,))]),
    np.dtype([("ключ", bf16), ("b", ml_dtypes.float8_e5m2, (2, 3))]),
    np.dtype({"names": ["a", "b"], "formats": ["u1", "<f8"]}, align=True),
    np.dtype({"names": ["a", "b"], "formats": ["u1", "<f8"], "offsets": [3, 16], "itemsize": 40}),
    np.dtype([("in", [("p", "S3"), ("q", [("r", ">u2")], (2,))]), ("t", "M8[us]")]),
    np.dtype([(("A title", "n"), "<i8"), ("m", "V3")]),
    np.dtype([("empty", "<f4", (0,)), ("one", "<f4", (1,))]),
    np.dtype([]),
]


@pytest.mark.parametrize("dtype", STRUCTURED, ids=str)
def test_dtype_structured_comes_back_exactly(dtype: np.dtype[Any]) -> None:
    assert layout(round_trip(dtype)) == layout(dtype)


@settings(deadline=None)
@given(st.one_of(hnp.nested_dtypes(), hnp.scalar_dtypes(), hnp.array_dtypes()))
def test_dtype_comes_back_exactly_or_is_refused(dtype: np.dtype[Any]) -> None:
    try:
        back = round_trip(dtype)
    except UnsupportedDtype:
        assert dtype.subdtype is not None or dtype.names is not None
    else:
        assert layout(back) == layout(dtype)


REFUSED = [
    np.dtype("O"),
    np.dtype([("a", [("b", "O")])]),
    np.dtype([("a", "O", (2,))]),
    *([np.dtypes.StringDType()] if hasattr(np.dtypes, "StringDType") else []),  # numpy 2
    np.dtype(("<f4", (3,))),
    np.dtype(bf16).newbyteorder(">"),
    np.dtype({"names": ["a", "b"], "formats": ["<f4", "<f4"], "offsets": [0, 2]}),
    np.dtype({"names": ["a", "b"], "formats": ["<f4", "<f4"], "offsets": [4, 0]}),
    np.dtype({"names": [""], "formats": ["V4"]}),
    np.dtype({"names": [""], "formats": ["<f4"]}),
    np.dtype({"names": ["a"], "formats": ["<f4"], "titles": [7]}),
]


@pytest.mark.parametrize("dtype", REFUSED, ids=str)
def test_dtype_without_json_is_refused_by_array_name(dtype: np.dtype[Any]) -> None:
    with pytest.raises(UnsupportedDtype, match="'weights'"):
        dtype_to_json(dtype, name="weights")


def test_dtype_nested_too_deep_is_refused() -> None:
    dtype: np.dtype[Any] = np.dtype("<f4")
    for _ in range(MAX_DEPTH):
        dtype = np.dtype([("a", dtype)])
    assert round_trip(dtype) == dtype
    with pytest.raises(UnsupportedDtype, match="deep"):
        dtype_to_json(np.dtype([("a", dtype)]))


def nested_json(depth: int) -> Any:
    value: Any = "<f4"
    for _ in range(depth):
        value = [["a", value]]
    return value


HOSTILE: list[Any] = [
    *("O", "|O", "|O8", "<O8", "<f4,<f4", "a" * 1_000_000, "V-1", "|V-1", "", "<f3", "f4", "=f4", "|i4"),
    *("<i1", "<f1", "<V2", "<M8[1s]", "<M8[s/4]", "<M8[xx]", "<M8[0s]", "|S2147483648", "<U2147483647"),
    *("|V99999999999", "<f4\n", "<f٤", "(2,)<f4", "<T16", "__import__('os')", "object", "float32", "int"),
    *("\0", "|S010"),
    *(None, True, 1, 1.5, {}, {"names": ["a"]}, [None], ["<f4"], [["a"]], [["a", "<f4", [1], 2]]),
    *([["a", "<f4", 3]], [["a", "<f4", []]], [["a", "<f4", [-1]]], [["a", "<f4", [True]]]),
    *([["a", "<f4", [1.0]]], [["a", "<f4", None]], [["a", "<f4", [10**30]]]),
    *([["a", "<f4", [2**31, 2**31]]], [["a", "|V2147483647"], ["b", "|u1"]], [["a", "<f4", [1] * 65]]),
    *([["a", "<f4"], ["a", "<f4"]], [[["t", "a"], "<f4"], ["t", "<f4"]], [["", "<f4"]], [["", "|V0"]]),
    *([["", [["a", "|u1"]]]], [["", "bfloat16"]], [["", "|V2"], ["", "|V2"]], [["", "|V2", [1]]]),
    *([[["t"], "<f4"]], [[["t", 1], "<f4"]], [[[1, "t"], "<f4"]], [[1, "<f4"]], [["a", "|O"]]),
    *(nested_json(MAX_DEPTH + 1), nested_json(500)),
]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: reprlib.repr(value)[:40])
def test_dtype_hostile_json_is_refused(value: Any) -> None:
    with pytest.raises(FormatError) as caught:
        dtype_from_json(value, url="the-file", field="the-field")
    assert "the-file: the-field" in str(caught.value)
    assert len(str(caught.value)) < 400
    assert (caught.value.url, caught.value.field) == ("the-file", "the-field")


def test_dtype_of_a_later_ml_dtypes_says_what_to_upgrade() -> None:
    with pytest.raises(UnsupportedFormat, match=r"float3_e9m9.*upgrade ml_dtypes"):
        dtype_from_json("float3_e9m9", url="f", field="x")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.sampled_from([*SIMPLE, "bfloat16"]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=12,
)


@settings(deadline=None)
@given(json_values)
def test_dtype_any_json_is_a_dtype_written_so_or_refused(value: Any) -> None:
    try:
        dtype = dtype_from_json(value, url="f", field="x")
    except FormatError:
        return
    assert dtype_to_json(dtype) == value


@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        *[("<f2", 2), (">f2", 2), (bf16, 2), ("<f4", 4), (">f4", 4), ("<c8", 4), ("<f8", 8), ("<c16", 8)],
        *[("<f16", 0), ("<c32", 0), (ml_dtypes.float8_e5m2, 0), (ml_dtypes.float4_e2m1fn, 0)],
    ],
)
def test_plane_width_of_floats(dtype: Any, width: int) -> None:
    assert is_float(np.dtype(dtype))
    assert plane_width(np.dtype(dtype)) == width


@pytest.mark.parametrize("dtype", ["<i4", "|b1", "<M8[s]", "|V2", "|S4", [("a", "<f4")], ml_dtypes.int4])
def test_plane_width_of_others_is_none(dtype: Any) -> None:
    assert not is_float(np.dtype(dtype))
    assert plane_width(np.dtype(dtype)) == 0
