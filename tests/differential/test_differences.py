# SPDX-License-Identifier: Apache-2.0
"""The one table of what lazymem.safetensors does otherwise than safetensors 0.8, with the reasons.

The other modules here hold everything else to be the same. Each row is a call; the test shows what
safetensors makes of it and what lazymem does.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import _is_complete, save_file

import lazymem.safetensors
from lazymem.safetensors import SafetensorError

from .comparing import OURS, THEIRS, Package, Raised, entry, make_file, outcome

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@dataclass(frozen=True)
class Difference:
    """call: of a package and a folder. theirs, ours: a kind of exception, or a check of the result."""

    name: str
    reason: str
    call: Callable[[Package, Path], Any]
    theirs: type[BaseException] | Callable[[Any], bool]
    ours: type[BaseException] | Callable[[Any], bool]


class _Panic(BaseException):
    """Stands for what safetensors' panics and false results are: not to be asked for in a test run."""


def _file(folder: Path, content: bytes) -> Path:
    path = folder / "file.safetensors"
    path.write_bytes(content)
    return path


def _weights(folder: Path) -> Path:
    path = folder / "weights.safetensors"
    if not path.exists():
        tensors = {
            "a": torch.arange(50, dtype=torch.float32).reshape(10, 5),
            "f8": torch.ones(4, dtype=torch.float8_e4m3fn),
            "bf16": torch.ones(2, 3, dtype=torch.bfloat16),
            "e": torch.zeros(0, 5),
            "f4": torch.arange(8, dtype=torch.uint8).reshape(2, 4).view(torch.float4_e2m1fn_x2),
        }
        save_file(tensors, path)
    return path


def _share(package: Package, path: Path, framework: str, backend: str) -> bool:
    with package.safe_open(path, framework, backend=backend) as file:
        first, second = file.get_tensor("a"), file.get_tensor("a")
    if framework == "np":
        return bool(np.shares_memory(first, second))
    return bool(first.data_ptr() == second.data_ptr())


def _parameter_memory(package: Package, folder: Path) -> bool:
    """Whether a parameter shows other memory after loading."""
    model = torch.nn.Linear(4, 3)
    save_file(model.state_dict(), folder / "model.safetensors")
    before = model.weight.data_ptr()
    package.load_model(model, folder / "model.safetensors")
    return model.weight.data_ptr() != before


def _load_meta(package: Package, folder: Path) -> bool:
    save_file(torch.nn.Linear(4, 3).state_dict(), folder / "model.safetensors")
    with torch.device("meta"):
        model = torch.nn.Linear(4, 3)
    package.load_model(model, folder / "model.safetensors")
    return model.weight.is_meta


def _load_flattened(package: Package, folder: Path) -> Any:
    """Parameters that are parts of one buffer, next to one another."""
    model = torch.nn.Linear(4, 3)
    save_file(model.state_dict(), folder / "model.safetensors")
    buffer = torch.zeros(15)
    model.weight.data, model.bias.data = buffer[:12].view(3, 4), buffer[12:]
    package.load_model(model, folder / "model.safetensors")
    return bool(model.weight.any())


def _truth(value: Any) -> bool:
    return value is True


def _falsehood(value: Any) -> bool:
    return value is False


def _is(*expected: Any) -> Callable[[Any], bool]:
    return lambda value: value == (expected[0] if len(expected) == 1 else expected)


_ONE = b'"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
_TWICE = b"{" + _ONE + b"," + _ONE + b"}"

DIFFERENCES = [
    Difference(
        "a folder",
        "sharded models are opened whole",
        lambda package, folder: len(package.safe_open(_weights(folder).parent, "np").keys()),
        OSError,
        _is(5),
    ),
    Difference(
        "unknown keywords",
        "newer versions add keywords, and code that passes them is to go on working",
        lambda package, folder: len(package.safe_open(_weights(folder), "np", mmap=True, whatever=1).keys()),
        TypeError,
        _is(5),
    ),
    Difference(
        "pickling a handle",
        "by reference, for workers in other processes",
        lambda package, folder: len(
            pickle.loads(pickle.dumps(package.safe_open(_weights(folder), "np"))).keys()
        ),
        TypeError,
        _is(5),
    ),
    Difference(
        "backend read_file",
        "what another version called pread",
        lambda package, folder: len(package.safe_open(_weights(folder), "np", backend="read_file").keys()),
        SafetensorError,
        _is(5),
    ),
    Difference(
        "device meta",
        "shapes and dtypes without reading anything",
        lambda package, folder: package.safe_open(_weights(folder), "pt", "meta").get_tensor("a").is_meta,
        SafetensorError,
        _truth,
    ),
    Difference(
        "torch.device",
        "torch's own functions take it, too",
        lambda package, folder: len(package.safe_open(_weights(folder), "pt", torch.device("cpu")).keys()),
        SafetensorError,
        _is(5),
    ),
    Difference(
        "numpy shares",
        "no copy, lazy; newer versions of safetensors do the same",
        lambda package, folder: _share(package, _weights(folder), "np", "mmap"),
        _falsehood,
        _truth,
    ),
    Difference(
        "pread shares",
        "read in chunks when touched, once for all who ask",
        lambda package, folder: _share(package, _weights(folder), "pt", "pread"),
        _falsehood,
        _truth,
    ),
    Difference(
        "numpy float8",
        "ml_dtypes has the dtypes that numpy lacks",
        lambda package, folder: str(package.safe_open(_weights(folder), "np").get_tensor("f8").dtype),
        AttributeError,
        _is("float8_e4m3fn"),
    ),
    Difference(
        "numpy F4",
        "the error is a SafetensorError that names the tensor, as with F6",
        lambda package, folder: package.safe_open(_weights(folder), "np").get_tensor("f4"),
        AttributeError,
        SafetensorError,
    ),
    Difference(
        "numpy.load of bfloat16",
        "load gives what load_file gives",
        lambda package, folder: str(package.load_np(_only(folder, "bf16"))["bf16"].dtype),
        KeyError,
        _is("bfloat16"),
    ),
    Difference(
        "torch.load of F4",
        "load gives what load_file gives",
        lambda package, folder: tuple(package.load(_only(folder, "f4"))["f4"].shape),
        KeyError,
        _is(2, 4),
    ),
    Difference(
        "torch F4 slice",
        "a slice counts as the tensor does",
        lambda package, folder: tuple(package.safe_open(_weights(folder), "pt").get_slice("f4")[1:].shape),
        RuntimeError,
        _is(1, 4),
    ),
    Difference(
        "torch F4 by pread",
        "a backend makes no difference to what is read",
        lambda package, folder: tuple(
            package.safe_open(_weights(folder), "pt", backend="pread").get_tensor("f4").shape
        ),
        RuntimeError,
        _is(2, 4),
    ),
    Difference(
        "empty tensor",
        "no bytes, no address",
        lambda package, folder: _is_complete(package.safe_open(_weights(folder), "pt").get_tensor("e")),
        _falsehood,
        _truth,
    ),
    Difference(
        "an impossible length behind a zero",
        "no array can have it: refused at once, not when the tensor is asked for",
        lambda package, folder: len(
            package.safe_open(_file(folder, make_file({"t": entry(shape=[0, 2**63], end=0)})), "np").keys()
        ),
        _is(1),
        SafetensorError,
    ),
    Difference(
        "a length of -0",
        "it is 0 in JSON",
        lambda package, folder: package.safe_open(
            _file(folder, make_file(b'{"t":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}')), "np"
        ).keys(),
        SafetensorError,
        lambda value: value == (list, ["t"]),
    ),
    Difference(
        "backward slice",
        "never a panic, never garbage",
        lambda package, folder: _backward(package, folder),
        _Panic,
        SafetensorError,
    ),
    Difference(
        "a key twice",
        "no guess which of the two was meant",
        lambda package, folder: len(
            package.safe_open(_file(folder, make_file(_TWICE, b"1234")), "np").keys()
        ),
        _is(1),
        SafetensorError,
    ),
    Difference(
        "a metadata key twice",
        "no guess which of the two was meant",
        lambda package, folder: package.safe_open(
            _file(folder, make_file(b'{"__metadata__":{"a":"1","a":"2"}}')), "np"
        ).metadata(),
        _is({"a": "2"}),
        SafetensorError,
    ),
    Difference(
        "a tensor as a JSON list",
        "the format says object",
        lambda package, folder: len(
            package.safe_open(_file(folder, make_file({"t": ["F32", [1], [0, 4]]}, b"1234")), "np").keys()
        ),
        _is(1),
        SafetensorError,
    ),
    Difference(
        "70 dimensions",
        "arrays have 64 at most: refused at once, not when the tensor is asked for",
        lambda package, folder: len(
            package.safe_open(_file(folder, make_file({"t": entry(shape=[1] * 70)}, b"1234")), "np").keys()
        ),
        _is(1),
        SafetensorError,
    ),
    Difference(
        "empty __metadata__",
        "a snapshot does not tell none from empty",
        lambda package, folder: package.safe_open(
            _file(folder, make_file({"__metadata__": {}})), "np"
        ).metadata(),
        _is({}),
        lambda value: value is None,
    ),
    Difference(
        "load_model replaces",
        "nothing is copied and nothing read; the parameters are the same objects",
        lambda package, folder: _parameter_memory(package, folder),
        _falsehood,
        _truth,
    ),
    Difference(
        "load_model, meta",
        "copying into a meta parameter loads nothing",
        lambda package, folder: _load_meta(package, folder),
        _truth,
        _falsehood,
    ),
    Difference(
        "load_model, parts of a buffer",
        "they do not overlap, so nothing is ambiguous; newer versions of safetensors do the same",
        lambda package, folder: _load_flattened(package, folder),
        RuntimeError,
        _truth,
    ),
]


def _only(folder: Path, name: str) -> bytes:
    with THEIRS.safe_open(_weights(folder), "pt") as file:
        save_file({name: file.get_tensor(name)}, folder / "only.safetensors")
    return (folder / "only.safetensors").read_bytes()


def _backward(package: Package, folder: Path) -> Any:
    if package is THEIRS:
        raise _Panic
    return package.safe_open(_weights(folder), "np").get_slice("a")[5:2]


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: difference.name)
def test_difference_is_as_the_table_says(difference: Difference, tmp_path: Path) -> None:
    for package, expected in ((THEIRS, difference.theirs), (OURS, difference.ours)):
        if expected is _Panic:
            continue
        found = outcome(lambda package=package: difference.call(package, tmp_path))  # type: ignore[misc]
        if isinstance(expected, type):
            assert isinstance(found, Raised), found
            assert issubclass(found.kind, expected), found
        else:
            assert expected(_value(found)), found


def _value(found: Any) -> Any:
    if isinstance(found, tuple) and len(found) == 2 and found[0] is tuple:
        return tuple(found[1])
    return found


def test_package_docstring_has_every_kind_of_difference() -> None:
    text = lazymem.safetensors.__doc__ or ""
    words = re.findall(r"[\w.]+", text)
    named = ("folder", "keywords", "torch.device", "pread", "bfloat16", "float8", "F4", "twice", "load_model")
    for word in named:
        assert word in words, word
