# SPDX-License-Identifier: Apache-2.0
"""safetensors: what the package accepts is shown, what it refuses is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors import deserialize as untyped_deserialize
from safetensors.numpy import save_file

from lazymem.containers import safetensors
from lazymem.containers.base import Directory
from lazymem.errors import BuildError, FormatError, UnsupportedFormat

from .openers import open_container

deserialize: Any = untyped_deserialize


def encode(header: Any, buffer: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + buffer


def info(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def opened(tmp_path: Path, data: bytes) -> Directory:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    return open_container(path)


def package_accepts(data: bytes) -> bool:
    try:
        deserialize(data)
    except SafetensorError:
        return False
    return True


def accepts(tmp_path: Path, data: bytes) -> bool:
    try:
        opened(tmp_path, data).close()
    except FormatError as error:
        message = str(error)
    else:
        return True
    assert str(tmp_path / "x.safetensors") in message
    assert len(message) < 800
    return False


def test_safetensors_shows_what_the_package_saved(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype="<f4").reshape(2, 3),
        "имя.веса": np.arange(5, dtype=np.int8),
        "empty": np.zeros((0, 4)),
        "scalar": np.array(2.5, "<f2"),
        "bf16": np.arange(4).astype(ml_dtypes.bfloat16),
        "flag": np.array([True, False]),
    }
    path = tmp_path / "model.safetensors"
    save_file(arrays, path, metadata={"format": "np"})
    directory = open_container(path)
    assert (directory.format, dict(directory.metadata)) == ("safetensors", {"format": "np"})
    assert {entry.name for entry in directory.arrays} == set(arrays)
    for entry in directory.arrays:
        array = arrays[entry.name]
        assert (entry.dtype, entry.shape, entry.order) == (array.dtype, array.shape, "C")
        assert directory.files[0].read(entry.offset, entry.nbytes) == array.tobytes()


KINDS = {
    **{kind: (dtype.itemsize * 8, dtype) for kind, dtype in safetensors.DTYPES.items()},
    **{kind: (bits, np.dtype("u1")) for kind, bits in safetensors.PACKED_BITS.items()},
}


def test_safetensors_dtypes_are_those_of_the_package() -> None:
    with pytest.raises(SafetensorError) as caught:
        deserialize(encode({"a": info("?", [0], 0, 0)}))
    named = str(caught.value).partition("expected one of ")[2].partition(" at line")[0]
    assert {name.strip("` ") for name in named.split(",")} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_every_dtype_is_shown(tmp_path: Path, kind: str) -> None:
    bits, dtype = KINDS[kind]
    nbytes = 8 * bits // 8
    data = encode({"a": info(kind, [2, 4], 0, nbytes)}, bytes(nbytes))
    assert package_accepts(data)
    (entry,) = opened(tmp_path, data).arrays
    assert (entry.dtype, entry.nbytes) == (dtype, nbytes)
    assert entry.shape == ((2, nbytes // 2) if kind in safetensors.PACKED_BITS else (2, 4))
    own = {"dtype": kind, "shape": [2, 4]}
    assert dict(entry.metadata) == (own if kind in safetensors.PACKED_BITS else {})
    assert safetensors.dtype_name(entry.dtype, entry.shape, entry.metadata) == (kind, [2, 4])


@pytest.mark.parametrize(
    ("shape", "shown"), [([3, 2], (3, 1)), ([2, 3], (3,)), ([0, 3], (0,)), ([4, 0], (4, 0)), ([2], (1,))]
)
def test_safetensors_packed_rows_that_fill_no_bytes_are_flat(
    tmp_path: Path, shape: list[int], shown: tuple[int, ...]
) -> None:
    nbytes = int(np.prod(shape)) // 2
    (entry,) = opened(tmp_path, encode({"a": info("F4", shape, 0, nbytes)}, bytes(nbytes))).arrays
    assert entry.shape == shown


def test_safetensors_data_may_be_unaligned(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}'
    (entry,) = opened(tmp_path, encode(header, bytes(8))).arrays
    assert entry.offset % 8


ONE = info("U8", [4], 0, 4)
CORPUS: list[tuple[Any, bytes]] = [
    ({}, b""),
    (b"{}  \n\t ", b""),
    (b" {}", b""),
    ({"a": ONE}, bytes(4)),
    ({"a": ONE}, bytes(3)),
    ({"a": ONE}, bytes(5)),
    ({"a": info("U8", [4], 1, 5)}, bytes(5)),
    ({"a": ONE, "b": info("U8", [1], 5, 6)}, bytes(6)),
    ({"a": ONE, "b": info("U8", [2], 3, 5)}, bytes(5)),
    ({"a": ONE, "b": info("U8", [4], 0, 4)}, bytes(4)),
    ({"b": info("U8", [1], 4, 5), "a": ONE}, bytes(5)),
    ({"a": ONE, "e": info("F32", [0], 4, 4), "f": info("F32", [3, 0], 0, 0)}, bytes(4)),
    ({"a": ONE, "e": info("F32", [0], 2, 2)}, bytes(4)),
    ({"a": info("U8", [], 0, 1)}, bytes(1)),
    ({"a": info("F32", [], 0, 1)}, bytes(1)),
    ({"a": info("U8", [5], 0, 4)}, bytes(4)),
    ({"a": info("U8", [-4], 0, 4)}, bytes(4)),
    ({"a": info("U8", [4.0], 0, 4)}, bytes(4)),
    ({"a": info("U8", [True], 0, 1)}, bytes(1)),
    ({"a": info("U8", ["4"], 0, 4)}, bytes(4)),
    ({"a": info("U8", [None], 0, 4)}, bytes(4)),
    ({"a": {**ONE, "shape": 4}}, bytes(4)),
    ({"a": {**ONE, "shape": None}}, bytes(4)),
    ({"a": info("F64", [2**61], 0, 0)}, b""),
    ({"a": info("F64", [2**63, 2], 0, 0)}, b""),
    ({"a": info("U8", [2**64], 0, 0)}, b""),
    ({"a": info("U8", [2**32, 2**32], 0, 0)}, b""),
    ({"a": info("F64", [2**60 + 1, 16], 0, 128)}, bytes(128)),
    ({"a": info("F4", [3], 0, 1)}, bytes(1)),
    ({"a": info("F4", [3], 0, 2)}, bytes(2)),
    ({"a": info("F6_E2M3", [4], 0, 3)}, bytes(3)),
    ({"a": info("F6_E2M3", [2], 0, 2)}, bytes(2)),
    ({"a": info("F4", [], 0, 1)}, bytes(1)),
    ({"a": info("u8", [4], 0, 4)}, bytes(4)),
    ({"a": info("", [4], 0, 4)}, bytes(4)),
    ({"a": {**ONE, "dtype": 7}}, bytes(4)),
    ({"a": {**ONE, "dtype": ["U8"]}}, bytes(4)),
    ({"a": info("U8", [0], 4, 0)}, bytes(4)),
    ({"a": info("U8", [4], -4, 0)}, bytes(4)),
    ({"a": info("U8", [4], 0.0, 4)}, bytes(4)),
    ({"a": info("U8", [4], 0, 2**64 + 4)}, bytes(4)),
    ({"a": info("U8", [4], None, 4)}, bytes(4)),
    ({"a": {**ONE, "data_offsets": [0]}}, bytes(4)),
    ({"a": {**ONE, "data_offsets": [0, 4, 4]}}, bytes(4)),
    ({"a": {**ONE, "data_offsets": {"0": 0, "1": 4}}}, bytes(4)),
    ({"a": {**ONE, "more": [1, {"x": None}]}}, bytes(4)),
    ({"a": {"dtype": "U8", "shape": [4]}}, bytes(4)),
    ({"a": {}}, b""),
    ({"a": None}, b""),
    ({"a": "U8"}, b""),
    ({"a": 1}, b""),
    ({"__metadata__": {"k": "v"}, "a": ONE}, bytes(4)),
    ({"__metadata__": None, "a": ONE}, bytes(4)),
    ({"__metadata__": {"k": 1}}, b""),
    ({"__metadata__": {"k": None}}, b""),
    ({"__metadata__": []}, b""),
    ({"__metadata__": "x"}, b""),
    ({"": ONE}, bytes(4)),
    ({"a/../b\u0000 \u2028": ONE}, bytes(4)),
    ([], b""),
    (b"", b""),
    (b"null", b""),
    (b"{", b""),
    (b"{}x", b""),
    (b"{},", b""),
    (b"\xef\xbb\xbf{}", b""),
    (b"{'a':1}", b""),
    (b'{"\xff":1}', b""),
    (b'{"a\nb":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b""),
    (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b""),
    (b'{"__metadata__":{"k":"\\udc00"}}', b""),
    (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":NaN}}', b""),
    (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":-Infinity}}', b""),
    (b'{"a":{"dtype":"U8","shape":[00],"data_offsets":[0,0]}}', b""),
    (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"dtype":"I8"}}', b""),
    (b'{"a":{"dtype":"U8","shape":[0,],"data_offsets":[0,0]}}', b""),
    (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    (b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,0]}}', b""),
]


@pytest.mark.parametrize(("header", "buffer"), CORPUS, ids=lambda value: repr(value)[:60])
def test_safetensors_header_is_judged_as_the_package_judges_it(
    tmp_path: Path, header: Any, buffer: bytes
) -> None:
    data = encode(header, buffer)
    assert accepts(tmp_path, data) == package_accepts(data)


EMPTY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
DIFFERENT: dict[str, tuple[bytes, bool]] = {
    # Two tensors of one name: the package takes the last. Which is meant cannot be known.
    "a key twice": (b'{"a":%s,"a":%s}' % (EMPTY, EMPTY), False),
    "a key twice, spelt otherwise": (b'{"a":%s,"\\u0061":%s}' % (EMPTY, EMPTY), False),
    "a metadata key twice": (b'{"__metadata__":{"k":"1","k":"2"}}', False),
    # serde reads a structure from a list too; no writer makes one.
    "a tensor as a list": (b'{"a":["U8",[0],[0,0]]}', False),
    # No numpy array has more dimensions, or lengths whose product overflows though one is zero.
    "65 dimensions": (
        b'{"a":{"dtype":"U8","shape":%s,"data_offsets":[0,1]}}' % str([1] * 65).encode(),
        False,
    ),
    "an overflow beside a zero": (
        b'{"a":{"dtype":"F64","shape":[0,%d,8],"data_offsets":[0,0]}}' % 2**60,
        False,
    ),
    # serde reads -0 as a float; Python as the integer that it is.
    "minus zero": (EMPTY.join([b'{"a":', b"}"]).replace(b"[0]", b"[-0]"), True),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_safetensors_header_is_judged_otherwise_than_the_package_on_purpose(
    tmp_path: Path, case: str
) -> None:
    header, ours = DIFFERENT[case]
    data = encode(header, b"x" if b"[0,1]" in header else b"")
    assert accepts(tmp_path, data) is ours
    assert package_accepts(data) is not ours


@pytest.mark.parametrize("length", [3, 100_000_001, 2**63, 2**64 - 1])
def test_safetensors_impossible_header_length_is_refused_unread(tmp_path: Path, length: int) -> None:
    data = struct.pack("<Q", length) + b"{}"
    assert not accepts(tmp_path, data)
    assert not package_accepts(data)


@pytest.mark.parametrize("size", range(8))
def test_safetensors_shorter_than_a_length_is_refused(tmp_path: Path, size: int) -> None:
    assert not accepts(tmp_path, bytes(size))


def test_safetensors_header_longer_than_the_first_read(tmp_path: Path) -> None:
    count = 12 * 256
    header = {f"model.layers.{i}.weight": info("U8", [1], i, i + 1) for i in range(count)}
    directory = opened(tmp_path, encode(header, bytes(range(256)) * 12))
    assert len(directory.arrays) == count
    first = [directory.files[0].read(entry.offset, 1)[0] for entry in directory.arrays[250:260]]
    assert first == [i % 256 for i in range(250, 260)]


def test_safetensors_error_names_file_and_tensor(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"x\.safetensors: tensor 'bad' is F32 of shape \[3\]") as caught:
        opened(tmp_path, encode({"ok": ONE, "bad": info("F32", [3], 4, 8)}, bytes(8)))
    assert caught.value.field == "tensor 'bad'"


def test_safetensors_unknown_dtype_is_unsupported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match="'F3_NEW'"):
        opened(tmp_path, encode({"a": info("F3_NEW", [0], 0, 0)}))


# ---- writing ----


def test_safetensors_made_header_is_what_the_package_reads() -> None:
    tensors = [("имя", "F32", [2, 1], 8), ("e", "U8", [0], 0), ("s", "BF16", [], 2)]
    data = safetensors.make_header(tensors, {"k": "v"}) + bytes(10)
    read = {name: (entry["dtype"], entry["shape"]) for name, entry in deserialize(data)}
    assert read == {"имя": ("F32", [2, 1]), "e": ("U8", [0]), "s": ("BF16", [])}
    assert int.from_bytes(data[:8], "little") % 8 == 0


def test_safetensors_made_header_has_no_tensor_called_metadata() -> None:
    with pytest.raises(BuildError, match="__metadata__"):
        safetensors.make_header([("__metadata__", "U8", [0], 0)], {})


def test_safetensors_has_no_name_for_other_dtypes() -> None:
    for dtype in (">f4", "<c16", "S4", ml_dtypes.int4, "V2"):
        assert safetensors.dtype_name(np.dtype(dtype), (2,), {}) is None
    hostile = {"dtype": "F4", "shape": [2**62, 2**62]}
    assert safetensors.dtype_name(np.dtype("u1"), (2,), hostile) == ("U8", [2])
