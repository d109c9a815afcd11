# SPDX-License-Identifier: Apache-2.0
"""torch.save's files: what real torch writes, read bit for bit; and files that lie, or want to run code."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lazymem
from lazymem.builder import build
from lazymem.builder.containers import combine
from lazymem.containers import detect, torch_pickle, torch_tree
from lazymem.containers.base import Directory
from lazymem.errors import FormatError, LazymemError, UnsupportedFormat
from lazymem.extractor import cat, extract
from lazymem.verifier import verify

from ..children import check_child
from .openers import FakeOpener, open_container

State = Mapping[str, Any]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of what torch.load gave, by the names that they should have."""
    if isinstance(value, torch.Tensor):
        yield name or "data", value
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{name}.{key}" if name else str(key))


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().contiguous().reshape(-1)
    return bytes(plain.view(torch.uint8).numpy()) if plain.numel() else b""


def check_same(path: Path, snapshot: lazymem.Snapshot) -> None:
    expected = dict(leaves(torch.load(path)))
    assert set(snapshot) == set(expected)
    for name, tensor in expected.items():
        array = snapshot[name]
        assert array.shape == tuple(tensor.shape), name
        assert array.tobytes() == snapshot.read(name).tobytes() == bits(tensor), name
        if array.size > 1 and all(length > 1 for length in array.shape):
            assert array.strides == tuple(s * tensor.element_size() for s in tensor.stride()), name


def gpt2() -> State:
    wte = torch.randn(50, 8)
    return OrderedDict([("wte.weight", wte), ("h.0.ln.bias", torch.randn(8)), ("lm_head.weight", wte)])


def channels_last() -> State:
    return torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last).state_dict()


def checkpoint() -> State:
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "rng": torch.get_rng_state(),
        "best": np.float64(0.25),
        "tags": {"a", "b"},
        "shape": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "raw": b"bytes",
    }


BASE = torch.arange(100, dtype=torch.float32)


def with_attributes() -> State:
    tensor, parameter = torch.randn(3), torch.nn.Parameter(torch.randn(2, 2))
    tensor.note = "kept"  # type: ignore[attr-defined]
    parameter.note = "kept"  # type: ignore[attr-defined]
    return {"t": tensor, "p": parameter}


STATES: dict[str, Callable[[], Any]] = {
    "attributes": with_attributes,
    "plain": lambda: torch.nn.Linear(4, 3).state_dict(),
    "tied": gpt2,
    "channels_last": channels_last,
    "checkpoint": checkpoint,
    "transposed": lambda: {"t": torch.randn(4, 6).t(), "p": torch.randn(2, 3, 4).permute(2, 0, 1)},
    "expanded": lambda: {"e": torch.randn(3).expand(5, 3), "one": torch.randn(1).expand(7)},
    "sliced": lambda: {"s": BASE[10:20], "step": BASE[1:90:7], "diagonal": BASE.view(10, 10).diagonal()},
    "sliced_alone": lambda: {"s": torch.randn(50)[10:20]},
    "apart": lambda: {"a": BASE[:40], "b": BASE[40:60].view(4, 5), "c": BASE[70:]},
    "overlap": lambda: {"a": BASE[:40], "b": BASE[30:60]},
    "whole_and_part": lambda: {"part": BASE[5:9], "whole": BASE, "square": BASE.view(10, 10)},
    "scalar": lambda: {"z": torch.tensor(3.5), "i": torch.tensor(7)},
    "empty": lambda: {"n": torch.zeros(0, 4), "m": torch.randn(5)[2:2], "other": torch.zeros(3, 0)},
    "alone": lambda: torch.randn(3, 4),
    "list": lambda: [torch.randn(2), {"x": torch.randn(1, 1)}, (torch.randn(2), 5)],
    "parameter": lambda: {"p": torch.nn.Parameter(torch.randn(2, 2)), "b": torch.nn.Buffer(torch.randn(3))},
    "nothing": lambda: {},
    "big": lambda: {f"layers.{i}.weight": torch.randn(40, 50 + i) for i in range(20)},
    "storage": lambda: {"t": torch.randn(2), "s": [1, 2.5, None, True, "text", -(1 << 40)]},
}


@pytest.fixture(params=STATES, ids=str)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "state.pt"
    torch.manual_seed(5)
    value = STATES[request.param]()
    if request.param == "checkpoint":  # torch.load allows fewer numpy scalars than we do
        value.pop("best")
    torch.save(value, path)
    return path


def test_open_shows_what_torch_loads(saved: Path) -> None:
    with lazymem.open(saved) as snap:
        assert snap.format == "torch"
        check_same(saved, snap)


def test_build_keeps_tensors_and_gives_the_file_back(saved: Path, tmp_path: Path) -> None:
    report = build(saved, tmp_path / "a.lzm", chunk_size=1 << 16)
    assert report.exact
    build(tmp_path / "a.lzm", tmp_path / "b.lzm", codec="lz4", chunk_size=1 << 17)
    for path in (tmp_path / "a.lzm", tmp_path / "b.lzm"):
        assert verify(path).ok
        with lazymem.open(path, backend="eager") as snap:
            check_same(saved, snap)
        extract(path, tmp_path / "back.pt", overwrite=True)
        assert (tmp_path / "back.pt").read_bytes() == saved.read_bytes()
    if report.arrays:
        extract(tmp_path / "a.lzm", tmp_path / "out.npz", format="npz")
        with np.load(tmp_path / "out.npz") as loaded:
            assert {name: loaded[name].tobytes() for name in loaded.files} == {
                name: bits(tensor) for name, tensor in leaves(torch.load(saved))
            }


def test_snapshots_of_torch_files_are_lazy(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(1_000_000.0).view(1000, 1000).t(), "x": torch.ones(3)}, tmp_path / "a.pt")
    build(tmp_path / "a.pt", tmp_path / "a.lzm", chunk_size=1 << 16)
    code = """
        import sys, numpy as np, lazymem
        with lazymem.open(sys.argv[1]) as snap:
            assert np.array_equal(snap["w"], np.arange(1e6, dtype="f4").reshape(1000, 1000).T)
            assert snap["x"].tolist() == [1, 1, 1]
    """
    check_child(code, tmp_path / "a.lzm")


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.pt"
    state = {**checkpoint(), "number": 1 << 80, "true": True, "float": 0.5, "array": bytearray(b"x")}
    torch.save(state, path, pickle_protocol=protocol)
    directory = open_container(path)
    assert set(directory.names) == {name for name, _ in leaves(state)}
    values = directory.metadata["torch"]
    assert values["epoch"] == 3
    assert values["best"] == 0.25
    assert sorted(values["tags"]) == ["a", "b"]
    assert values["optimizer.param_groups.0.betas"] == [0.9, 0.999]
    assert values["true"] is True
    assert values["float"] == 0.5
    assert values["shape"] == [2, 3]
    assert values["device"] == "cpu"
    assert directory.metadata["torch_left_out"] == 3
    directory.close()


SHOWN = {
    torch.float4_e2m1fn_x2: {"dtype": "F4", "shape": [32]},
    **{
        dtype: {"dtype": str(dtype).removeprefix("torch.")}
        for dtype in (torch.bits1x8, torch.bits2x4, torch.bits4x2, torch.bits8, torch.bits16)
    },
}
REFUSED = (torch.complex32, torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4,
           getattr(torch, "bcomplex32", None))  # fmt: skip


def all_dtypes() -> list[torch.dtype]:
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return sorted(
        (dtype for dtype in found if str(dtype)[6:].strip("u") not in [f"int{b}" for b in range(1, 8)]),
        key=str,
    )


@pytest.mark.parametrize("dtype", all_dtypes(), ids=str)
def test_every_dtype_that_torch_saves(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.arange(16, dtype=torch.uint8) % (2 if dtype is torch.bool else 255)
    path = tmp_path / "a.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"x": raw.view(dtype)}, path)
    if dtype in REFUSED:
        with pytest.raises(UnsupportedFormat, match=r"dtype|Storage"):
            open_container(path)
        return
    with lazymem.open(path) as snap:
        assert snap["x"].tobytes() == bytes(raw.numpy())
        assert snap.info("x").metadata == SHOWN.get(dtype, {})
        if dtype not in SHOWN:
            assert str(snap["x"].dtype) == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: torch.ones(3).to_sparse(), "sparse"),
        (lambda: torch.ones(3, 3).to_sparse_csr(), "sparse|csr"),
        (lambda: torch.ones(3, device="meta"), "meta"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj(), "conjugated"),
        (lambda: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (lambda: Path("x"), "pathlib"),
        (lambda: np.ones(3), "_reconstruct"),
        (lambda: {(1, 2): torch.ones(2)}, "key"),
        (lambda: {"a.b": torch.ones(2), "a": {"b": torch.ones(2)}}, "both called 'a.b'"),
        (lambda: {"1": 3, 1: torch.ones(2)}, "both called '1'"),
    ],
)
def test_what_is_not_read_is_a_named_error(tmp_path: Path, make: Callable[[], Any], found: str) -> None:
    path = tmp_path / "a.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"x": make()} if not isinstance(make(), dict) else make(), path)
    with pytest.raises(FormatError, match=found):
        open_container(path)


def test_old_format_and_torchscript_say_what_to_do(tmp_path: Path) -> None:
    for protocol in (2, 4):
        torch.save(
            {"x": torch.ones(2)},
            tmp_path / "a.bin",
            _use_new_zipfile_serialization=False,
            pickle_protocol=protocol,
        )
        with pytest.raises(UnsupportedFormat, match="old format"):
            open_container(tmp_path / "a.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "b.pt"))
    with pytest.raises(UnsupportedFormat, match="TorchScript"):
        open_container(tmp_path / "b.pt")


# ---- files made by hand ----


def rewrite(path: Path, changes: Mapping[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """The same archive with other members; None removes one."""
    with zipfile.ZipFile(path) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    prefix = next(iter(members)).split("/")[0]
    members.update({f"{prefix}/{name}": data for name, data in changes.items()})  # type: ignore[misc]
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in members.items():
            if data is not None:
                new.writestr(name, data)
    return path


@pytest.fixture
def simple(tmp_path: Path) -> Path:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"byteorder": b"big"}, "byteorder is 'big'"),
        ({"byteorder": b"x" * 100}, "instead of a word"),
        ({"version": b"99\n"}, "version is '99'"),
        ({"version": b"soon"}, "version is 'soon'"),
        ({"data/0": None}, "missing"),
        ({"data/0": bytes(23)}, "24 bytes, but its member has 23"),
        ({"data.pkl": b""}, "ends before its STOP"),
    ],
)
def test_archives_that_lie_are_named_errors(
    simple: Path, changes: dict[str, bytes | None], found: str
) -> None:
    with pytest.raises(FormatError, match=found):
        open_container(rewrite(simple, changes))


def test_archives_of_other_zip_programs_are_read(simple: Path) -> None:
    expected = torch.load(simple)
    rewrite(simple, {"byteorder": None})
    with lazymem.open(simple) as snap:
        assert snap["w"].tobytes() == bits(expected["w"])
    with pytest.raises(UnsupportedFormat, match=r"is compressed.*zip -0"):
        open_container(rewrite(simple, {}, zipfile.ZIP_DEFLATED))


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with lazymem.open(tmp_path / "a.pt") as snap:
        assert snap["w"].tolist() == [1, 1, 1]


class Call:
    """Pickles as a call of `function`, by REDUCE."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


SHELL = b"touch RAN"
EVIL: dict[str, bytes] = {
    "reduce": pickle.dumps(Call(os.system, "touch RAN"), 2),
    "stack_global": pickle.dumps(Call(os.system, "touch RAN"), 4),
    "eval": pickle.dumps(Call(eval, "open('RAN', 'w')"), 4),
    "inst": b"(S'touch RAN'\nios\nsystem\n.",
    "inst_v": b"(Vtouch RAN\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nVtouch RAN\no.",
    "obj_known": b"(ccollections\nOrderedDict\no.",
    "newobj": b"\x80\x02cos\nsystem\nX\x09\x00\x00\x00touch RAN\x85\x81.",
    "newobj_ex": b"\x80\x04cos\nsystem\n)}\x92.",
    "build": b"\x80\x02ccollections\nOrderedDict\n(tR}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb.",
    "ext1": b"\x80\x02\x82\x01)R.",
    "ext4": b"\x80\x02\x84\x01\x00\x00\x00)R.",
    "dotted": b"\x80\x04\x8c\x0ctorch._utils\x8c\x09os.system\x93.",
    "getattr": b"\x80\x02cbuiltins\ngetattr\n.",
    "import": b"\x80\x02cbuiltins\n__import__\n.",
    "torch_load": b"\x80\x02ctorch.serialization\nload\n.",
    "rebuild_by_type": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n)NtR.",
    "persid": b"Pstorage\n.",
}


@pytest.mark.parametrize("name", EVIL)
def test_malicious_pickle_runs_nothing(simple: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(simple.parent)
    rewrite(simple, {"data.pkl": EVIL[name]})
    with pytest.raises(FormatError) as caught:
        open_container(simple)
    assert not os.path.exists("RAN")
    if b"system" in EVIL[name] and "inst" not in name:
        assert isinstance(caught.value, UnsupportedFormat)
        assert "system" in str(caught.value)
        assert "nothing of it was run" in str(caught.value)


def string(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + data


def tensor(
    offset: Any = 0, shape: Any = (2, 3), strides: Any = (3, 1), numel: Any = 6, kind: str = "FloatStorage"
) -> bytes:
    def numbers(values: Any) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t" if isinstance(values, tuple) else number(values)

    storage = (
        b"("
        + string("storage")
        + f"ctorch\n{kind}\n".encode()
        + string("0")
        + string("cpu")
        + number(numel)
        + b"tQ"
    )
    arguments = storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89}"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def state(**tensors: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(string(name) + data for name, data in tensors.items()) + b"u."


def test_pickle_by_hand_is_read(simple: Path) -> None:
    expected = bits(torch.load(simple)["w"])
    with lazymem.open(rewrite(simple, {"data.pkl": state(x=tensor())})) as snap:
        assert snap["x"].tobytes() == expected


@pytest.mark.parametrize(
    "data",
    [
        state(x=tensor(offset=1)),
        state(x=tensor(offset=-1)),
        state(x=tensor(shape=(2, 4))),
        state(x=tensor(shape=(-2, 3))),
        state(x=tensor(shape=(2,))),
        state(x=tensor(shape=6)),
        state(x=tensor(strides=(4, 1))),
        state(x=tensor(strides=(-3, 1))),
        state(x=tensor(strides=(1 << 62, 1))),
        state(x=tensor(shape=(1 << 62, 3), strides=(0, 0))),
        state(x=tensor(shape=(1 << 62, 1 << 62), strides=(0, 0))),
        state(x=tensor(shape=(1,) * 65, strides=(1,) * 65)),
        state(x=tensor(numel=7)),
        state(x=tensor(numel=-1)),
        state(x=tensor(numel=1 << 62)),
        state(x=tensor(kind="DoubleStorage")),
        state(x=tensor(kind="QInt8Storage")),
        state(x=tensor(), y=tensor(numel=5, shape=(5,), strides=(1,))),
        state(x=tensor(), y=tensor(kind="IntStorage")),
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02" + b"]" * 100 + b"a" * 99 + b".",
        b"\x80\x02]q\x00"
        + b"".join(
            b"](" + b"h" + bytes([i]) + (b"h" + bytes([i])) * 9 + b"eq" + bytes([i + 1]) for i in range(12)
        )
        + b".",
        b"\x80\x02r\xff\xff\xff\xff.",
        b"\x80\x02j\xff\xff\xff\xff.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02\x8b\xff\xff\xff\xff.",
        b"\x80\x04\x8d" + b"\xff" * 8 + b".",
        b"\x80\x04\x96" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x02X\x02\x00\x00\x00\xed\xa0.",
        b"\x80\x02}X\x01\x00\x00\x00ass.",
        b"\x80\x02}((ttNu.",
        b"}V\\ud800\nNs.",
        b"\x80\x02" + b"(" * 1000 + b".",
        b"\x80\x02" + b")\x85" * 100_000 + b"}q\x00h\x00Ns.",
        b"\x80\x02}(" + b")" + b"\x85" * 100_000 + b"Nu.",
        b"\x80\x02\x85.",
        b"\x80\x02NNR.",
        b"\x80\x02N(Qt.",
        b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R.",
        b"\x80\x02c_codecs\nencode\n" + string("x") + string("rot13") + b"\x86R.",
        b"\x80\x02ccollections\nOrderedDict\nK\x05\x85R.",
        b"\x80\x09N.",
        b"\xff",
        b"I" + b"9" * 5000 + b"\n.",
    ],
    ids=lambda data: repr(data[:30]),
)
def test_pickles_that_lie_are_named_errors(simple: Path, data: bytes) -> None:
    rewrite(simple, {"data.pkl": data})
    with pytest.raises(FormatError):
        open_container(simple)


def test_limits_of_pickle_and_tree_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pickle, "MAX_PICKLE", 10)
    with pytest.raises(FormatError, match="limit is 10"):
        torch_pickle.read_pickle("x", b"N" * 11)
    monkeypatch.undo()
    monkeypatch.setattr(torch_pickle, "_MAX_OPCODES", 10)
    with pytest.raises(FormatError, match="more than 10 opcodes"):
        torch_pickle.read_pickle("x", b"N" * 11)
    long = {"k" * 40_000: {"k" * 40_000: 1}}
    with pytest.raises(UnsupportedFormat, match="names"):
        torch_tree.Leaves("x", long)
    found = torch_tree.Leaves("x", {"big": "x" * 300_000, "small": 1})
    assert (found.values, found.left_out) == ({"small": 1}, 1)


def arrays_of(directory: Directory) -> dict[str, bytes]:
    result = {}
    for entry in directory.arrays:
        result[entry.name] = directory.files[entry.file].read(entry.offset, entry.nbytes)
    return result


def check_right_or_error(path: Path, expected: dict[str, bytes]) -> bool:
    """Whether it was read. A file taken for raw bytes is none of torch's."""
    try:
        directory = open_container(path)
    except LazymemError:
        return False
    with_names = directory.format == "torch" and arrays_of(directory)
    directory.close()
    if with_names:
        assert with_names.keys() == expected.keys()
    return bool(with_names)


def test_every_truncation_is_an_error(simple: Path) -> None:
    data = simple.read_bytes()
    for length in range(len(data)):
        simple.write_bytes(data[:length])
        assert not check_right_or_error(simple, {}), length


def test_flipped_bytes_are_errors_or_right(simple: Path) -> None:
    data = simple.read_bytes()
    directory = open_container(simple)
    expected = arrays_of(directory)
    spans = [(entry.offset, entry.offset + entry.nbytes) for entry in directory.arrays]
    directory.close()
    chance = random.Random(7)
    for position in range(len(data)):
        if any(begin <= position < end for begin, end in spans):
            continue  # read in place, the bytes of arrays are what lies there
        changed = bytearray(data)
        changed[position] ^= 1 << chance.randrange(8)
        simple.write_bytes(changed)
        try:
            directory = open_container(simple)
        except LazymemError:
            continue
        if directory.format == "torch":
            assert arrays_of(directory) == expected, position
        directory.close()


def test_flipped_bytes_of_the_pickle_never_raise_anything_else(simple: Path) -> None:
    with zipfile.ZipFile(simple) as archive:
        data = next(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    chance = random.Random(8)
    for _ in range(3000):
        changed = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            changed[chance.randrange(len(data))] = chance.randrange(256)
        with contextlib.suppress(LazymemError):
            torch_tree.Leaves("x", torch_pickle.read_pickle("x", bytes(changed)))


# ---- remote ----


def test_remote_open_takes_few_requests(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.randn(300, 300) for i in range(40)}
    state |= {f"layers.{i}.bias": torch.randn(300) for i in range(40)}
    torch.save(state, tmp_path / "a.pt")
    opener = FakeOpener(tmp_path)
    directory = detect.open_container(opener.url("a.pt"), opener)
    assert arrays_of(directory) == {name: bits(tensor) for name, tensor in state.items()}
    for blob in opener.blobs:
        blob.closed = False
    opener = FakeOpener(tmp_path)
    detect.open_container(opener.url("a.pt"), opener)
    assert len(opener.requests) <= 3


def test_remote_archives_of_other_programs_are_read_by_their_headers(simple: Path) -> None:
    expected = {name: bits(tensor) for name, tensor in torch.load(simple).items()}
    rewrite(simple, {})
    opener = FakeOpener(simple.parent)
    assert arrays_of(detect.open_container(opener.url("a.pt"), opener)) == expected


def test_remote_and_local_agree_on_every_state(saved: Path) -> None:
    opener = FakeOpener(saved.parent)
    remote, local = detect.open_container(opener.url("state.pt"), opener), open_container(saved)
    with contextlib.closing(local):
        assert remote.arrays == local.arrays
        assert remote.views == local.views


def test_large_alignment_is_read(tmp_path: Path) -> None:
    from torch.utils.serialization import config

    state = {"a": torch.randn(3), "b": torch.randn(4)}
    with config.patch({"save.storage_alignment": 4096}):
        torch.save(state, tmp_path / "a.pt")
    opener = FakeOpener(tmp_path)
    remote = detect.open_container(opener.url("a.pt"), opener)
    assert [entry.offset % 4096 for entry in remote.arrays] == [0, 0]
    assert arrays_of(remote) == {name: bits(tensor) for name, tensor in state.items()}


def test_two_files_combine_with_their_views(tmp_path: Path) -> None:
    for name in ("one", "two"):
        torch.save({"w": BASE[:5], "v": BASE[3:9]}, tmp_path / f"{name}.pt")
    directory = combine([open_container(tmp_path / "one.pt"), open_container(tmp_path / "two.pt")])
    directory.close()
    assert sorted(directory.names) == ["one/v", "one/w", "two/v", "two/w"]
    build([tmp_path / "one.pt", tmp_path / "two.pt"], tmp_path / "a.lzm")
    with lazymem.open(tmp_path / "a.lzm", backend="eager") as snap:
        assert snap["two/v"].tobytes() == bits(BASE[3:9])
    out = io.BytesIO()
    torch.save({"w": BASE.view(10, 10)[:, 2]}, tmp_path / "c.pt")
    cat(tmp_path / "c.pt", "w", out)
    assert out.getvalue() == bits(BASE.view(10, 10)[:, 2])
