# SPDX-License-Identifier: Apache-2.0
"""Every public function and method, with arguments right and wrong; every dtype; aliasing and storages."""

from __future__ import annotations

import inspect
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from safetensors.torch import _is_complete, save_file, storage_ptr, storage_size

import lazymem.safetensors
import lazymem.safetensors.numpy
import lazymem.safetensors.torch

from .comparing import OURS, THEIRS, Package, Raised, both, outcome

TORCH_DTYPES = [dtype for dtype in safetensors.torch._SIZE if dtype is not None]


def _ones(dtype: torch.dtype) -> torch.Tensor:
    size = safetensors.torch._SIZE[dtype]
    raw = torch.arange(1, 1 + 12 * size, dtype=torch.uint8).reshape(3, 4 * size)
    return (raw % 2).view(dtype) if dtype == torch.bool else raw.view(dtype)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    tensors = {
        "a": torch.arange(50, dtype=torch.float32).reshape(10, 5),
        "s": torch.tensor(3.0),
        "e": torch.zeros(0, 5),
        "i": torch.arange(7),
    }
    save_file(tensors, path, metadata={"format": "pt", "k": "v"})
    return path


OPENING: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}),
    (("PATH",), {}),
    (("PATH", "xx"), {}),
    (("PATH", "NP"), {}),
    (("PATH", 3), {}),
    (("PATH", None), {}),
    ((3, "np"), {}),
    ((None, "np"), {}),
    ((b"PATH", "np"), {}),
    (("nope", "np"), {}),
    (("", "np"), {}),
    (("a\0b", "np"), {}),
    (("nope", "xx"), {}),
    (("nope", "np", "cuda"), {}),
    (("nope", "np", "bad"), {}),
    (("nope", "pt"), {"backend": "x"}),
    *((("PATH", name), {}) for name in ("pt", "torch", "pytorch", "np", "numpy", "paddle")),
    *(
        (("PATH", framework, device), {})
        for framework in ("np", "pt")
        for device in (
            "cpu",
            None,
            "cpu:0",
            "CPU",
            "bad",
            "",
            "cuda:",
            "cuda:x",
            "cuda:-1",
            "cuda:0:1",
            "vulkan",
            -1,
            1.5,
            b"cpu",
        )
    ),
    *((("PATH", "np", device), {}) for device in ("cuda", "cuda:1", 0, True, "mps", "xla:1")),
    (("PATH", "pt"), {"backend": "x"}),
    (("PATH", "pt"), {"backend": ""}),
    (("PATH", "pt"), {"backend": None}),
    (("PATH", "pt"), {"backend": 3}),
    (("PATH", "pt"), {"backend": "pread"}),
    (("PATH", "pt", "cpu", "mmap"), {}),
    (("PATH",), {"framework": "np", "device": "cpu"}),
    ((), {"filename": "PATH", "framework": "np"}),
]


@pytest.mark.parametrize("call", OPENING, ids=repr)
def test_opening_takes_the_same_arguments(call: tuple[tuple[Any, ...], dict[str, Any]], path: Path) -> None:
    def real(value: Any) -> Any:
        return {"PATH": str(path), b"PATH": os.fsencode(path)}.get(value, value)

    arguments, keywords = [real(value) for value in call[0]], {k: real(v) for k, v in call[1].items()}
    found = both(lambda package: package.safe_open(*arguments, **keywords).keys())
    if isinstance(found, Raised) and found.kind in (FileNotFoundError, safetensors.SafetensorError):
        both(lambda package: package.safe_open(*arguments, **keywords).keys(), messages=True)


@pytest.mark.parametrize("framework", ["np", "pt"])
@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_every_method_gives_the_same(framework: str, backend: str, path: Path) -> None:
    calls = [
        lambda file: file.keys(),
        lambda file: file.offset_keys(),
        lambda file: file.metadata(),
        lambda file: file.get_tensors(),
        lambda file: list(file.get_tensors()),
        *(
            lambda file, name=name: file.get_tensor(name)
            for name in ("a", "s", "e", "i", "zz", 3, None, b"a")
        ),
        *(
            lambda file, name=name: file.get_slice(name).get_shape()
            for name in ("a", "s", "e", "zz", 3, None)
        ),
        lambda file: file.get_slice("a").get_dtype(),
        lambda file: file.get_tensor(name="a"),
        lambda file: file.get_slice(name="a")[:2],
        lambda file: file.get_tensor(),
        lambda file: file.get_tensor("a", "b"),
        lambda file: file["a"],
        lambda file: len(file),
        lambda file: list(file),
        lambda file: "a" in file,
        lambda file: setattr(file, "x", 1),
        lambda file: file.nothing,
        lambda file: file.__enter__() is file,
        lambda file: file.__exit__(),
        lambda file: file.__exit__(None, None, None),
        # Closed by the line before, whoever opened it.
        *(
            lambda file, name=name: getattr(file, name)()
            for name in ("keys", "offset_keys", "metadata", "get_tensors")
        ),
        lambda file: file.get_tensor("a"),
        lambda file: file.get_slice("a"),
        lambda file: file.__enter__() is file,
        lambda file: file.__exit__(None, None, None),
    ]
    opened = {package: package.safe_open(path, framework, backend=backend) for package in (THEIRS, OURS)}
    for call in calls:
        both(lambda package, call=call: call(opened[package]))  # type: ignore[misc]


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_what_was_got_outlives_the_handle(framework: str, path: Path) -> None:
    def use(package: Package) -> Any:
        with package.safe_open(path, framework) as file:
            kept, part = file.get_tensor("a"), file.get_slice("a")
        path.unlink()
        try:
            return kept, part[2:4], part.get_shape(), part.get_dtype()
        finally:
            save_file({"a": torch.arange(50, dtype=torch.float32).reshape(10, 5)}, path)

    both(use)


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_dtype_gives_the_same_tensor(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"t": _ones(dtype)}, path)
    both(lambda package: package.load_file(path))
    if not str(dtype).startswith("torch.float4"):
        both(lambda package: package.load_file(path, backend="pread"))
    both(lambda package: package.safe_open(path, "pt").get_slice("t").get_dtype())
    both(lambda package: package.safe_open(path, "pt").get_slice("t").get_shape())
    both(lambda package: [item[1] for item in package.deserialize(path.read_bytes())])
    name = str(dtype).removeprefix("torch.")
    if not name.startswith("float4"):
        both(lambda package: package.safe_open(path, "pt").get_slice("t")[1:, :2])
    if not name.startswith(("float4", "float8_e8m0")):
        both(lambda package: package.load(path.read_bytes()))
    if not name.startswith(("float4", "float8")):
        both(lambda package: package.load_file_np(path))
    if not name.startswith(("float4", "float8", "bfloat16")):
        both(lambda package: package.load_np(path.read_bytes()))


def test_memory_is_shared_and_private_alike(path: Path) -> None:
    def share(package: Package) -> Any:
        with package.safe_open(path, "pt") as file:
            first, second, part = file.get_tensor("a"), file.get_tensor("a"), file.get_slice("a")[3:]
        first[4, 4] = -1
        again = package.load_file(path)["a"]
        return (
            first.data_ptr() == second.data_ptr(),
            second[4, 4].item(),
            part[1, 4].item(),
            part.data_ptr() - first.data_ptr(),
            again[4, 4].item(),
            first.data_ptr() == again.data_ptr(),
            first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr(),
            path.read_bytes()[-4:],
        )

    both(share)


def test_storages_are_the_tensors_own_bytes_alike(path: Path) -> None:
    def storages(package: Package) -> Any:
        tensors = package.load_file(path)
        return {
            name: (
                storage_size(t),
                storage_ptr(t) == t.data_ptr(),
                t.storage_offset(),
                t.stride(),
                _is_complete(t),
            )
            for name, t in tensors.items()
            if t.numel()
        }

    both(storages)


def test_tensors_can_be_saved_and_pickled_again(path: Path, tmp_path: Path) -> None:
    def again(package: Package) -> Any:
        tensors = package.load_file(path)
        save_file(tensors, tmp_path / "again.safetensors")
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        return (
            (tmp_path / "again.safetensors").read_bytes(),
            len(buffer.getvalue()),
            pickle.dumps(tensors["a"]),
        )

    theirs, ours = outcome(lambda: again(THEIRS)), outcome(lambda: again(OURS))
    assert theirs[1][:2] == ours[1][:2]


@pytest.mark.parametrize(
    "data",
    [b"", b"1234567", "text", bytearray(8), memoryview(b"12345678"), None, 3],
    ids=lambda data: repr(data).split(" at ")[0],
)
def test_load_refuses_the_same(data: Any) -> None:
    both(lambda package: package.load(data))
    both(lambda package: package.load_np(data))
    both(lambda package: package.deserialize(data))


def test_open_handle_takes_the_same(path: Path) -> None:
    with path.open("rb") as file, path.open() as text:
        for f in (file, text, 3, None, io.BytesIO(b"")):
            both(lambda package, f=f: package.safe_open_handle(f, "np").get_tensors())  # type: ignore[misc]
            both(lambda package, f=f: package.safe_open_handle(f, "pt", "cpu", backend="pread").keys())  # type: ignore[misc]
            both(lambda package, f=f: package.safe_open_handle(f, framework="xx"))  # type: ignore[misc]


@pytest.mark.parametrize("name", ["load_file", "load", "load_model"])
def test_signatures_begin_alike(name: str) -> None:
    modules = [(safetensors.torch, lazymem.safetensors.torch), (safetensors.numpy, lazymem.safetensors.numpy)]
    for theirs, ours in modules:
        if hasattr(theirs, name):
            wanted = inspect.signature(getattr(theirs, name)).parameters.values()
            found = list(inspect.signature(getattr(ours, name)).parameters.values())[: len(wanted)]
            assert [(p.name, p.kind, p.default) for p in wanted] == [
                (p.name, p.kind, p.default) for p in found
            ]


def test_every_public_name_is_there() -> None:
    for module in ("", "torch", "numpy", "_safetensors_rust"):
        theirs = getattr(safetensors, module) if module else safetensors
        ours = getattr(lazymem.safetensors, module) if module else lazymem.safetensors
        for name in vars(theirs):
            if not name.startswith("__"):
                assert getattr(ours, name) is not None, name
    assert lazymem.safetensors._safetensors_rust.safe_open is lazymem.safetensors.safe_open
    assert lazymem.safetensors.__version__ == safetensors.__version__
    assert lazymem.safetensors.torch.save_file is safetensors.torch.save_file
    assert lazymem.safetensors.SafetensorError is safetensors.SafetensorError
    with pytest.raises(AttributeError):
        lazymem.safetensors.torch.nothing  # noqa: B018


def test_errors_are_both_packages_and_pickle(path: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"12345678{")
    file = OURS.safe_open(path, "np")
    for call in (
        lambda: OURS.safe_open(tmp_path / "bad.safetensors", "np"),
        lambda: OURS.safe_open(path, "xx"),
        lambda: file.get_tensor("zz"),
        lambda: file.get_slice("a")[99],
        lambda: file.__exit__(None, None, None) or file.keys(),
    ):
        with pytest.raises(safetensors.SafetensorError) as raised:
            call()
        assert isinstance(raised.value, lazymem.LazymemError)
        again = pickle.loads(pickle.dumps(raised.value))
        assert type(again) is type(raised.value)
        assert str(again) == str(raised.value)
    with pytest.raises(FileNotFoundError, match="No such file or directory: nope"):
        OURS.safe_open("nope", "np")


def test_strided_slices_are_parts_put_together(path: Path) -> None:
    for framework in ("np", "pt"):
        with OURS.safe_open(path, framework) as file:
            whole = np.arange(50, dtype=np.float32).reshape(10, 5)
            got = np.asarray(file.get_strided_slice("a", dim=0, intervals=[(4, 6), (0, 2), (0, 1)]))
            assert (got == np.concatenate([whole[4:6], whole[0:2], whole[0:1]])).all()
            got = np.asarray(file.get_strided_slice("a", 1, [(1, 3)]))
            assert (got == whole[:, 1:3]).all()
            for dim, intervals in (
                (5, [(0, 1)]),
                (0, []),
                (0, [(4, 2)]),
                (0, [(3, 3)]),
                (0, [(0, 100)]),
                (-1, [(0, 1)]),
            ):
                with pytest.raises(safetensors.SafetensorError):
                    file.get_strided_slice("a", dim=dim, intervals=intervals)
            with pytest.raises(safetensors.SafetensorError):
                file.get_strided_slice("zz", dim=0, intervals=[(0, 1)])
