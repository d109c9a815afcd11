# SPDX-License-Identifier: Apache-2.0
"""Files right and wrong: accepted by both or refused by both, and then with the same kind of error."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .comparing import OURS, THEIRS, Package, Raised, assert_alike, both, entry, make_file, outcome

_FOUR, _EIGHT = b"1234", b"12345678"

FILES: dict[str, bytes] = {
    "nothing": b"",
    "7 bytes": b"1234567",
    "no header": struct.pack("<Q", 0),
    "length 2**63": struct.pack("<Q", 2**63),
    "length 2**64-1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "length over the limit": struct.pack("<Q", 100_000_001) + b"{}",
    "length beyond the file": make_file({}, length=100),
    "length short of the header": make_file({"t": entry()}, _FOUR, length=10),
    "no tensors": make_file({}),
    "no tensors, bytes": make_file({}, b"x"),
    "no UTF-8": make_file(b"\xff\xff"),
    "no JSON": make_file(b"{abc}"),
    "a list": make_file(b"[]"),
    "null": make_file(b"null"),
    "a string": make_file(b'"{}"'),
    "spaces": make_file(b"  {}  "),
    "padded with NUL": make_file(b"{}\0\0"),
    "two objects": make_file(b"{}{}"),
    "byte order mark": make_file(b"\xef\xbb\xbf{}"),
    "NaN": make_file(b'{"t":NaN}'),
    "infinity": make_file(b'{"__metadata__":{"a":Infinity}}'),
    "deep": make_file(b"[" * 3000 + b"]" * 3000),
    "deep objects": make_file(b'{"t":' * 3000 + b"1" + b"}" * 3000),
    "trailing comma": make_file(b'{"__metadata__":{},}'),
    "control character": make_file(b'{"__metadata__":{"a\nb":"c"}}'),
    "metadata": make_file({"__metadata__": {"a": "b", "c": ""}}),
    "metadata null": make_file({"__metadata__": None}),
    "metadata of numbers": make_file({"__metadata__": {"a": 1}}),
    "metadata of null": make_file({"__metadata__": {"a": None}}),
    "metadata list": make_file({"__metadata__": []}),
    "metadata nested": make_file({"__metadata__": {"a": {}}}),
    "metadata twice": make_file(b'{"__metadata__":{"a":"1"},"__metadata__":{"a":"1"}}'),
    "right": make_file({"t": entry()}, _FOUR),
    "further fields": make_file({"t": {**entry(), "x": [1, {"y": None}]}}, _FOUR),
    "escaped name": make_file(b'{"\\u0074":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', _FOUR),
    "no name": make_file({"": entry()}, _FOUR),
    "name with NUL": make_file({"a\0b": entry()}, _FOUR),
    "name of half a pair": make_file(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', _FOUR),
    "long name": make_file({"n" * 100_000: entry()}, _FOUR),
    "cut short": make_file({"t": entry()}, b"123"),
    "too long": make_file({"t": entry()}, b"12345"),
    "hole": make_file({"t": entry(), "u": entry(begin=8, end=12)}, b"1" * 12),
    "overlap": make_file({"t": entry(), "u": entry(begin=2, end=6)}, b"1" * 6),
    "same bytes": make_file({"t": entry(), "u": entry()}, _FOUR),
    "begins late": make_file({"t": entry(begin=4, end=8)}, _EIGHT),
    "unknown dtype": make_file({"t": entry("F33")}, _FOUR),
    "dtype in small letters": make_file({"t": entry("f32")}, _FOUR),
    "dtype a number": make_file({"t": entry(3)}, _FOUR),
    "dtype null": make_file({"t": entry(None)}, _FOUR),
    "dtype C128": make_file({"t": entry("C128", (1,), 0, 16)}, b"1" * 16),
    "shape empty": make_file({"t": entry(shape=[])}, _FOUR),
    "shape negative": make_file({"t": entry(shape=[-1])}, _FOUR),
    "shape of fractions": make_file({"t": entry(shape=[1.0])}, _FOUR),
    "shape with exponent": make_file(b'{"t":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', _FOUR),
    "shape a string": make_file({"t": entry(shape="1")}, _FOUR),
    "shape of strings": make_file({"t": entry(shape=["1"])}, _FOUR),
    "shape of bools": make_file({"t": entry(shape=[True])}, _FOUR),
    "shape null": make_file({"t": entry(shape=None)}, _FOUR),
    "shape overflows": make_file({"t": entry(shape=[2**62, 2**62])}, _FOUR),
    "shape overflows before a zero": make_file({"t": entry(shape=[2**62, 2**62, 0], end=0)}),
    "shape 2**64": make_file({"t": entry(shape=[2**64])}, _FOUR),
    "shape too big": make_file({"t": entry(shape=[2])}, _FOUR),
    "33 dimensions": make_file({"t": entry(shape=[1] * 33)}, _FOUR),
    "offsets reversed": make_file({"t": entry(begin=4, end=0)}, _FOUR),
    "offsets negative": make_file({"t": entry(begin=-4, end=0)}, _FOUR),
    "offsets of fractions": make_file({"t": entry(end=4.0)}, _FOUR),
    "offsets 2**64-1": make_file({"t": entry(end=2**64 - 1)}, _FOUR),
    "offsets of bools": make_file({"t": entry("U8", begin=False, end=True)}, b"1"),
    "three offsets": make_file({"t": {**entry(), "data_offsets": [0, 4, 4]}}, _FOUR),
    "one offset": make_file({"t": {**entry(), "data_offsets": [4]}}, _FOUR),
    "no offsets": make_file({"t": {"dtype": "F32", "shape": [1]}}, _FOUR),
    "a tensor a number": make_file({"t": 3}, _FOUR),
    "a field twice": make_file(
        b'{"t":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', _FOUR
    ),
    "F4": make_file({"t": entry("F4", [4], 0, 2)}, b"12"),
    "F4, half a byte": make_file({"t": entry("F4", [3], 0, 2)}, b"12"),
    "F4, rows of half bytes": make_file({"t": entry("F4", [2, 3], 0, 3)}, b"123"),
    "F6": make_file({"t": entry("F6_E2M3", [4], 0, 3)}, b"123"),
    "F6, part of a byte": make_file({"t": entry("F6_E3M2", [3], 0, 3)}, b"123"),
    "misaligned": make_file({"u": entry("U8", end=1), "t": entry(begin=1, end=5)}, b"12345"),
    "empty between": make_file(
        {"a": entry(), "z": entry(shape=[0], begin=4, end=4), "b": entry(begin=4, end=8)}, _EIGHT
    ),
    "empty inside": make_file({"a": entry(), "z": entry(shape=[0], begin=2, end=2)}, _FOUR),
    "empty behind": make_file({"a": entry(), "z": entry(shape=[0], begin=8, end=8)}, _FOUR),
    "only empty ones": make_file({"b": entry(shape=[0], end=0), "a": entry(shape=[2, 0], end=0)}),
}


def _all_of(package: Package, path: Path, framework: str) -> Any:
    with package.safe_open(path, framework) as file:
        names = file.keys()
        return (
            names,
            sorted(file.offset_keys()),
            file.metadata(),
            [file.get_slice(n).get_shape() for n in names],
        )


def _tensors(package: Package, path: Path) -> Any:
    with package.safe_open(path, "pt") as file:
        return {name: outcome(lambda name=name: file.get_tensor(name)) for name in file.offset_keys()}  # type: ignore[misc]


def _compare(content: bytes, path: Path) -> Any:
    path.write_bytes(content)
    for framework in ("np", "pt"):
        found = both(lambda package, framework=framework: _all_of(package, path, framework))  # type: ignore[misc]
    if not isinstance(found, Raised):
        theirs, ours = _tensors(THEIRS, path), _tensors(OURS, path)
        assert theirs.keys() == ours.keys()
        for name, tensor in theirs.items():
            assert_alike(tensor, ours[name])
    both(lambda package: sorted(package.deserialize(content), key=lambda item: item[0]))
    return found


@pytest.mark.parametrize("name", FILES)
def test_file_is_taken_or_refused_alike(name: str, tmp_path: Path) -> None:
    found = _compare(FILES[name], tmp_path / "file.safetensors")
    # Neither the name of the file nor what else it could be makes a difference.
    odd = tmp_path / "no-suffix"
    odd.write_bytes(FILES[name])
    if isinstance(found, Raised):
        both(lambda package: package.safe_open(odd, "np"))


def test_header_at_the_limit_is_refused_alike(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000) + b"{")
        file.truncate(200_000_100)
    for framework in ("np", "pt"):
        found = both(lambda package, framework=framework: package.safe_open(path, framework))  # type: ignore[misc]
        assert isinstance(found, Raised)


numbers = st.sampled_from([0, 1, 2, 4, 8, 12, -1, 2**63, 2**64, 1.0, True, None, "1"])
headers = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__", "\u00e9"]),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "U8", "BF16", "BOOL", "F4", "F6_E2M3", "X", None]),
            # A huge length beside a zero: see the table of differences.
            "shape": st.lists(numbers.filter(lambda length: length != 2**63), max_size=3) | st.none(),
            "data_offsets": st.lists(numbers, min_size=2, max_size=3),
        }
    )
    | st.sampled_from([{}, None, 3, {"a": "b"}]),
    max_size=3,
)
likely = st.builds(
    lambda shapes: {f"t{i}": entry("U8", shape) for i, shape in enumerate(shapes)},
    st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=headers, data=st.binary(max_size=16))
def test_any_header_is_taken_or_refused_alike(header: dict[str, Any], data: bytes, tmp_path: Path) -> None:
    if header.get("__metadata__") == {}:
        del header["__metadata__"]  # see the table of differences
    _compare(make_file(header, data), tmp_path / "file.safetensors")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 200), byte=st.integers(0, 255), cut=st.integers(0, 12))
def test_any_damage_is_taken_or_refused_alike(place: int, byte: int, cut: int, tmp_path: Path) -> None:
    header = {"__metadata__": {"k": "v"}, "a": entry(), "b": entry("U8", (2, 2), 4, 8)}
    content = bytearray(make_file(header, _EIGHT))
    content[place % len(content)] = byte
    damaged = bytes(content[: len(content) - cut])
    text = damaged[8:-8] if cut == 0 else b""
    try:
        keys = [key for key, _ in json.loads(text, object_pairs_hook=list)]
    except (ValueError, TypeError, UnicodeDecodeError):
        keys = []
    if len(set(keys)) == len(keys):  # a key twice: see the table
        _compare(damaged, tmp_path / "file.safetensors")
