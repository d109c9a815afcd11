# SPDX-License-Identifier: Apache-2.0
"""GGUF: files that the gguf package wrote, compared with what it reads; and files that nobody wrote."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

import lazymem
from lazymem.containers import gguf as container
from lazymem.containers.base import Directory
from lazymem.errors import FormatError, LazymemError, UnsupportedFormat
from lazymem.recognizer import recognize

from .openers import FakeOpener, open_container

RNG = np.random.default_rng(3)
TOKENS = ["<s>", "é", "", "日本", *(f"token{number}" for number in range(20_000))]


def write(path: Path, tensors: dict[str, np.ndarray[Any, Any]], **more: Any) -> Path:
    """more: quantised: name -> (bytes, type); set: called with the writer, to add key-values."""
    writer = gguf.GGUFWriter(path, "llama")
    more.get("set", lambda writer: None)(writer)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    for name, (array, kind) in more.get("quantised", {}).items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_everything(writer: Any) -> None:
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_float32("f32", 0.5)
    writer.add_float32("nan", float("nan"))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float64("f64", 1e300)
    writer.add_bool("yes", True)
    writer.add_string("text", "grüße")
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("floats", [0.5, float("inf")])
    writer.add_token_list(TOKENS)


PLAIN = {
    "f32": RNG.standard_normal((3, 5)).astype(np.float32),
    "f16": RNG.standard_normal((2, 3, 4)).astype(np.float16),
    "f64": RNG.standard_normal(7),
    "i8": np.arange(-3, 3, dtype=np.int8),
    "i16": np.arange(5, dtype=np.int16),
    "i32": np.arange(5, dtype=np.int32),
    "i64": np.arange(5, dtype=np.int64),
}
WEIGHTS = (RNG.standard_normal((4, 512)) * 0.1).astype(np.float32)
KINDS = [gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q5_1", "Q8_0", "BF16")]
QUANTISED = {f"q.{kind.name}": (gguf.quants.quantize(WEIGHTS, kind), kind) for kind in KINDS}
# Blocks that the package cannot make are bytes to everybody but their kernels.
QUANTISED["q.Q4_K"] = (RNG.integers(0, 256, (4, 2 * 144), np.uint8), gguf.GGMLQuantizationType.Q4_K)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write(file, PLAIN, quantised=QUANTISED, set=add_everything)


def test_gguf_types_are_those_of_the_package() -> None:
    sizes = {kind: gguf.GGML_QUANT_SIZES[kind] for kind in gguf.GGMLQuantizationType}
    known = {number: (kind.name, kind.block, kind.size) for number, kind in container.TYPES.items()}
    assert {int(kind): (kind.name, *size) for kind, size in sizes.items() if int(kind) in known} == known
    # A newer package may have more; those that this one was written for are all here.
    assert {int(kind) for kind in sizes if int(kind) <= 41} <= known.keys()


def test_gguf_arrays_are_what_the_package_reads(path: Path) -> None:
    reader = gguf.GGUFReader(path)
    with lazymem.open(path) as snap:
        assert snap.format == "gguf"
        assert set(snap) == {*PLAIN, *QUANTISED} == {tensor.name for tensor in reader.tensors}
        for tensor in reader.tensors:
            same_shape = snap[tensor.name].shape == tensor.data.shape
            assert same_shape or tensor.tensor_type.name == "BF16"  # which it shows as bytes
            assert snap[tensor.name].tobytes() == tensor.data.tobytes()
        for name, array in PLAIN.items():
            assert snap[name].dtype == array.dtype
            np.testing.assert_array_equal(snap[name], array)
        assert snap["q.BF16"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(snap["q.BF16"], WEIGHTS.astype(ml_dtypes.bfloat16))
        assert dict(snap.info("q.Q4_K").metadata) == {"dtype": "Q4_K", "shape": [4, 512]}
        assert dict(snap.info("f32").metadata) == {}
        back = gguf.quants.dequantize(snap["q.Q8_0"], gguf.GGMLQuantizationType.Q8_0)
        assert np.abs(back - WEIGHTS).max() < 0.01


def test_gguf_metadata_is_json_of_all_types(path: Path) -> None:
    metadata = open_container(path).metadata
    expected = {
        "general.architecture": "llama", "u8": 255, "i8": -128, "u16": 65535, "i16": -32768,
        "u32": 2**32 - 1, "i32": -(2**31), "f32": 0.5, "nan": "nan", "u64": 2**64 - 1, "i64": -(2**63),
        "f64": 1e300, "yes": True, "text": "grüße", "numbers": [1, 2, 3], "floats": [0.5, "inf"],
        "tokenizer.ggml.tokens": TOKENS,
    }  # fmt: skip
    assert metadata == expected
    assert metadata["yes"] is True


@pytest.mark.parametrize("codec", ["zstd", "none"])
def test_gguf_is_built_and_comes_back_as_the_very_file(path: Path, tmp_path: Path, codec: str) -> None:
    report = lazymem.build(path, tmp_path / "m.lzm", codec=codec)
    assert report.exact
    with lazymem.open(tmp_path / "m.lzm") as snap, lazymem.open(path) as here:
        assert dict(snap.metadata) == dict(here.metadata)
        assert {name: dict(snap.info(name).metadata) for name in here} == {
            name: dict(here.info(name).metadata) for name in here
        }
        assert all(snap[name].tobytes() == here[name].tobytes() for name in here)
        assert snap.read_file("model.gguf") == path.read_bytes()
    lazymem.extract(tmp_path / "m.lzm", tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()


def test_gguf_by_url_is_opened_by_few_requests(path: Path) -> None:
    opener = FakeOpener(path.parent)
    found = recognize(opener.url("model.gguf"), opener)
    assert isinstance(found, Directory)
    assert found.arrays == open_container(path).arrays
    assert len(opener.requests) <= 4
    found.close()


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_gguf_alignment_is_the_files_own(tmp_path: Path, alignment: int) -> None:
    file = write(tmp_path / "a.gguf", PLAIN, set=lambda writer: writer.add_custom_alignment(alignment))
    reader = gguf.GGUFReader(file)
    offsets = {entry.name: entry.offset for entry in open_container(file).arrays}
    assert offsets == {tensor.name: tensor.data_offset for tensor in reader.tensors}


def test_gguf_is_known_by_content_and_held_to_its_name(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "model.bin"
    other.write_bytes(path.read_bytes())
    assert open_container(other).format == "gguf"
    assert open_container(path, as_format="raw").format == "raw"
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"something else")
    with pytest.raises(FormatError, match="does not begin with GGUF"):
        open_container(wrong)


# ---- hostile ----


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def head(tensors: int, pairs: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def info(name: bytes, shape: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def padded(content: bytes, data: int) -> bytes:
    return content + bytes(-len(content) % 32 + data)


HUGE = 2**63
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"GGUF", "needs 4 bytes"),
    "tensor count": (head(HUGE, 0) + bytes(100), "counts 9223372036854775808 tensors"),
    "key count": (head(0, HUGE) + bytes(100), "counts 9223372036854775808 key-values"),
    "key beyond the file": (head(0, 1) + struct.pack("<Q", 1000) + bytes(99), "needs 1000 bytes"),
    "key of any length": (head(0, 1) + struct.pack("<Q", HUGE) + bytes(99), "the limit is 65535"),
    "string beyond the file": (head(0, 1) + pair(b"k", 8, struct.pack("<Q", 999)), "needs 999 bytes"),
    "string of any length": (head(0, 1) + pair(b"k", 8, struct.pack("<Q", HUGE)), "the limit is"),
    "array of any length": (head(0, 1) + pair(b"k", 9, struct.pack("<IQ", 4, HUGE)), "more than"),
    "array beyond the file": (head(0, 1) + pair(b"k", 9, struct.pack("<IQ", 4, 99)), "needs 396 bytes"),
    "strings beyond the file": (head(0, 1) + pair(b"k", 9, struct.pack("<IQ", 8, 99)), "needs 8 bytes"),
    "arrays in arrays": (
        head(0, 1) + pair(b"k", 9, struct.pack("<IQ", 9, 1) * 3000),
        "arrays within arrays",
    ),
    "a bool of 2": (head(0, 1) + pair(b"k", 7, b"\2"), "neither 0 nor 1"),
    "unknown value": (head(0, 1) + pair(b"k", 13, bytes(8)), "is of type 13"),
    "key twice": (head(0, 2) + 2 * pair(b"k", 7, b"\1"), "stands twice"),
    "key that is no text": (head(0, 1) + pair(b"\xff", 7, b"\1"), "is no text"),
    "alignment of 0": (head(0, 1) + pair(b"general.alignment", 4, bytes(4)), "not a power of two"),
    "alignment of 48": (head(0, 1) + pair(b"general.alignment", 4, b"\x30\0\0\0"), "not a power of two"),
    "alignment of text": (head(0, 1) + pair(b"general.alignment", 8, text(b"32")), "not a power of two"),
    "version 1": (head(0, 0, 1), "has version 1"),
    "version 4": (head(0, 0, 4), "has version 4"),
    "big-endian": (head(0, 0, 3 << 24), "is big-endian"),
    "tensor twice": (padded(head(2, 0) + 2 * info(b"t", [1], 0, 0), 99), "stands twice"),
    "tensor that is no text": (padded(head(1, 0) + info(b"\xff", [1], 0, 0), 99), "is no text"),
    "unknown tensor": (padded(head(1, 0) + info(b"t", [1], 4, 0), 99), "ggml's type 4"),
    "tensor beyond the file": (padded(head(1, 0) + info(b"t", [99], 0, 0), 99), "needs 396 bytes"),
    "offset beyond the file": (padded(head(1, 0) + info(b"t", [1], 0, HUGE), 99), "needs 4 bytes"),
    "misaligned": (padded(head(1, 0) + info(b"t", [1], 0, 4), 99), "no multiple of 32"),
    "impossible shape": (padded(head(1, 0) + info(b"t", [HUGE, HUGE], 0, 0), 99), "impossible shape"),
    "shape too large for blocks": (
        padded(head(1, 0) + info(b"t", [32, HUGE, 2], 2, 0), 99),
        "impossible shape",
    ),
    "broken row": (padded(head(1, 0) + info(b"t", [33], 2, 0), 99), "no blocks of 32"),
    "no rows": (padded(head(1, 0) + info(b"t", [], 2, 0), 99), "no blocks of 32"),
    "dimensions": (padded(head(1, 0) + text(b"t") + b"\xff" * 4, 99), "4294967295 dimensions"),
    "overlap": (
        padded(head(2, 0) + info(b"a", [16], 0, 0) + info(b"b", [8], 0, 32), 99),
        "tensor 'b' overlaps tensor 'a'",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_gguf_that_is_hostile_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content, says = HOSTILE[case]
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    with pytest.raises((FormatError, UnsupportedFormat), match=says) as caught:
        open_container(file)
    assert str(file) in str(caught.value)


def test_gguf_tensor_without_bytes_or_dimensions(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    infos = info(b"scalar", [], 0, 0) + info(b"empty", [0, 3], 0, 0) + info(b"none", [32, 0], 2, 32)
    file.write_bytes(padded(head(3, 0, 2) + infos, 36))
    shapes = {entry.name: entry.shape for entry in open_container(file).arrays}
    assert shapes == {"scalar": (), "empty": (3, 0), "none": (0, 18)}


def test_gguf_token_that_is_no_text_is_spelt_out(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(head(0, 1) + pair(b"k", 9, struct.pack("<IQ", 8, 2) + text(b"\xe9") + text(b"ok")))
    assert open_container(file).metadata == {"k": ["\\xe9", "ok"]}


def test_gguf_cut_short_or_with_a_wrong_byte_never_crashes(tmp_path: Path) -> None:
    small = write(tmp_path / "small.gguf", {"t": PLAIN["f32"]}, quantised=QUANTISED).read_bytes()
    header = small.index(b"q.Q4_K") + 60
    file = tmp_path / "x.gguf"

    def attempt(content: bytes) -> None:
        file.write_bytes(content)
        try:
            directory = open_container(file)
        except LazymemError:
            return
        for entry in directory.arrays:
            assert 0 <= entry.offset <= entry.offset + entry.nbytes <= len(content)
        directory.close()

    for end in range(header):
        attempt(small[:end])
    for position in range(4, header):
        for value in (0, 0x80, 0xFF):
            attempt(small[:position] + bytes([value]) + small[position + 1 :])
