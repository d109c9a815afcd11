# SPDX-License-Identifier: Apache-2.0
"""What the names in a torch.save's pickle stand for: the few functions that state dicts call
(torch/_utils.py and others), storage types and dtypes. Nothing is looked up in any module; what these
functions get is checked and kept as plain values and `Tensor`s. Any other name is `Unsupported`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np

from .base import MAX_NDIM

_KEYS: Final = (str, int, float, bool, bytes, type(None))
_NUMPY_SCALAR: Final = re.compile(r"[biuf][1248]")


class Storage(NamedTuple):
    """A storage: key, the member's name below data/; dtype, torch's name, None if untyped; numel."""

    key: str
    dtype: str | None
    numel: int


class Tensor(NamedTuple):
    """A tensor or parameter. dtype: torch's name. offset, strides: in elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Text(NamedTuple):
    """A dtype or device: something with a name and no bytes."""

    text: str


class StorageType(NamedTuple):
    """The type of a storage; dtype None: untyped."""

    dtype: str | None


class Function(NamedTuple):
    """What a global of the pickle stands for. rebuilds: it makes a tensor."""

    call: Callable[..., Any]
    rebuilds: bool = False


class Refused(Exception):
    """What is wrong with the pickle, without its place."""


class Unsupported(Exception):
    """What the pickle has that is not read, and what to do."""


REMEDY: Final = (
    "nothing of it was run; save a state_dict of plain tensors, numbers and strings, or safetensors"
)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """rest: requires_grad, backward_hooks, metadata."""
    if len(rest) > 3:
        raise Refused("a tensor of too many arguments")
    if not isinstance(storage, Storage):
        raise Refused("a tensor without a storage")
    return _tensor(
        storage, storage.dtype or "uint8", offset, shape, strides, rest[2] if len(rest) > 2 else None
    )


def _rebuild_tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, Text):
        raise Refused("a tensor without a storage or dtype")
    return _tensor(storage, dtype.text.removeprefix("torch."), offset, shape, strides, metadata)


def _tensor(storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any, metadata: Any) -> Tensor:
    if metadata:
        raise Unsupported(
            "has a tensor that is to be conjugated or negated when it is read",
            "call .resolve_conj().resolve_neg() on it and save again",
        )
    for numbers in (shape, strides, (offset,)):
        if not isinstance(numbers, tuple) or any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers):
            raise Refused("a tensor whose shape, strides or offset are no numbers from 0")
    if len(shape) != len(strides) or len(shape) > MAX_NDIM:
        raise Refused("a tensor with an impossible number of dimensions")
    return Tensor(storage, dtype, offset, shape, strides)


def _rebuild_parameter(data: Any, *rest: Any) -> Tensor:
    """rest: requires_grad, backward_hooks, and attributes, which are dropped."""
    if not isinstance(data, Tensor) or len(rest) > 3:
        raise Refused("a parameter that is no tensor")
    return data


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    if not isinstance(function, Function) or not function.rebuilds or not isinstance(kind, Function):
        raise Refused("a tensor that is rebuilt by something else than a tensor's function")
    return function.call(*check_arguments(arguments))


def _no_call(*arguments: Any) -> NoReturn:
    raise Refused("a class that is called, but only named in state dicts")


def _list(*arguments: Any) -> list[Any]:
    """Sets too: nobody needs to look up in them, and a list keeps the order."""
    (values,) = arguments or ([],)
    if type(values) not in (list, tuple):
        raise Refused("a set of something else than a list")
    return list(values)


def _dict(*arguments: Any) -> dict[Any, Any]:
    (values,) = arguments or ({},)
    if isinstance(values, dict):
        return dict(values)
    result: dict[Any, Any] = {}
    for pair in _list(values):
        key, value = pair
        set_item(result, key, value)
    return result


def set_item(mapping: Any, key: Any, value: Any) -> None:
    if type(mapping) is not dict:
        raise Refused("an item that is set of something else than a dict")
    # Hashes of tuples and of big numbers are not keyed, so that a file could make all of them collide.
    if type(key) not in _KEYS or (type(key) is int and not -(1 << 63) <= key < 1 << 63):
        raise Unsupported(f"has a key that is a {type(key).__name__}, or too large", REMEDY)
    mapping[key] = value


def _size(*arguments: Any) -> tuple[Any, ...]:
    return tuple(_list(*arguments))


def _device(*arguments: Any) -> Text:
    if not all(isinstance(part, (str, int)) for part in arguments):
        raise Refused("a device that is no name")
    return Text(":".join(str(part)[:100] for part in arguments[:2]))


def _encode(text: Any, encoding: Any) -> bytes:
    """How pickle's older protocols write bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused("bytes in an unknown encoding")
    return text.encode("latin-1")


def _bytearray(*arguments: Any) -> bytes:
    return _encode(*arguments) if len(arguments) == 2 else bytes(*(a for a in arguments if type(a) is bytes))


def _complex(real: Any, imaginary: Any) -> complex:
    if not isinstance(real, float) or not isinstance(imaginary, float):
        raise Refused("a complex number of something else than two numbers")
    return complex(real, imaginary)


class NumpyDtype:
    """numpy.dtype of a scalar; its byte order comes afterwards."""

    def __init__(self, code: Any, *rest: Any) -> None:
        if not isinstance(code, str) or not _NUMPY_SCALAR.fullmatch(code):
            raise Unsupported(f"has a numpy scalar of dtype {str(code)[:40]!r}", REMEDY)
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, NumpyDtype) or type(data) is not bytes or len(data) != dtype.dtype.itemsize:
        raise Refused("a numpy scalar of an impossible size")
    return np.frombuffer(data, dtype.dtype)[0].item()


_UTILS: Final = "torch._utils"
_FUNCTIONS: Final[dict[tuple[str, str], Any]] = {
    (_UTILS, "_rebuild_tensor"): Function(_rebuild_tensor, True),
    (_UTILS, "_rebuild_tensor_v2"): Function(_rebuild_tensor, True),
    (_UTILS, "_rebuild_tensor_v3"): Function(_rebuild_tensor_v3, True),
    (_UTILS, "_rebuild_parameter"): Function(_rebuild_parameter, True),
    (_UTILS, "_rebuild_parameter_with_state"): Function(_rebuild_parameter, True),
    ("torch._tensor", "_rebuild_from_type_v2"): Function(_rebuild_from_type),
    ("torch", "Tensor"): Function(_no_call),
    ("torch.nn.parameter", "Parameter"): Function(_no_call),
    ("torch.nn.parameter", "Buffer"): Function(_no_call),
    ("torch", "Size"): Function(_size),
    ("torch", "device"): Function(_device),
    ("torch.storage", "UntypedStorage"): StorageType(None),
    ("torch", "UntypedStorage"): StorageType(None),
    ("collections", "OrderedDict"): Function(_dict),
    ("_codecs", "encode"): Function(_encode),
    ("numpy", "dtype"): Function(NumpyDtype),
    ("numpy.core.multiarray", "scalar"): Function(_numpy_scalar),
    ("numpy._core.multiarray", "scalar"): Function(_numpy_scalar),
    **{
        (module, name): Function(call)
        for module in ("builtins", "__builtin__")
        for name, call in (
            ("set", _list),
            ("frozenset", _list),
            ("bytearray", _bytearray),
            ("complex", _complex),
        )
    },
}
_STORAGE_DTYPES: Final = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "ComplexDouble": "complex128",
    "ComplexFloat": "complex64",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
}
_DTYPE: Final = re.compile(
    r"(bfloat|float|complex|u?int|q?u?int|bits)\d+[a-z0-9_]*|bool|float|double|half|long|int"
)
#: What torch can save and numpy cannot show, by the function that rebuilds it.
_KINDS: Final = {
    "_rebuild_qtensor": "quantized",
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_sparse_csr_tensor": "sparse",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_meta_tensor_no_storage": "meta",
    "_rebuild_wrapper_subclass": "wrapped",
}


def resolve(module: Any, name: Any) -> Any:
    if not isinstance(module, str) or not isinstance(name, str):
        raise Refused("a global whose name is no string")
    known = _FUNCTIONS.get((module, name))
    if known is not None:
        return known
    if module in ("torch", "torch.storage") and name.endswith("Storage"):
        dtype = _STORAGE_DTYPES.get(name.removesuffix("Storage"))
        if dtype is not None:
            return StorageType(dtype)
        raise Unsupported(f"has storages of type {name[:100]!r}", REMEDY)
    if module == "torch" and _DTYPE.fullmatch(name):
        return Text(f"torch.{name}")
    if module == _UTILS and name in _KINDS:
        raise Unsupported(
            f"has a {_KINDS[name]} tensor", "make it a plain one (.to_dense(), .dequantize()) and save again"
        )
    raise Unsupported(f"asks for {f'{module}.{name}'[:200]!r}, which state dicts do not need", REMEDY)


def check_arguments(value: Any) -> tuple[Any, ...]:
    if type(value) is not tuple:
        raise Refused("arguments that are no tuple")
    return value
