# SPDX-License-Identifier: Apache-2.0
"""The pickle in a file of torch.save, read without torch and without pickle: nothing in it is ever run.

A pickle is a program (CPython's Lib/pickletools.py describes each opcode). This reader carries out those
that build plain values, and knows by name the few functions of torch._utils and others that state
dicts call (torch/_utils.py); what these get is checked and kept as a `Tensor`. Any other name, and any
opcode that could reach one, ends in `UnsupportedFormat`.

Size, number of opcodes and numbers are bounded. No tuple becomes a key: CPython hashes nested ones by
recursion without a limit.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np

from ..errors import FormatError
from .base import MAX_NDIM, damaged, unsupported

MAX_PICKLE: Final = 64 << 20
_MAX_OPCODES: Final = 8_000_000
_MAX_LINE: Final = 1024
_MAX_INT: Final = 1024  # bytes
_FIELD: Final = "data.pkl"
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


class _Type(NamedTuple):
    """The type of a storage; dtype None: untyped."""

    dtype: str | None


class _Function(NamedTuple):
    """What a global of the pickle stands for. rebuilds: it makes a tensor."""

    call: Callable[..., Any]
    rebuilds: bool = False


class _Refused(Exception):
    """What is wrong with the pickle, without its place."""


class _Unsupported(Exception):
    """What the pickle has that is not read, and what to do."""


_REMEDY: Final = (
    "nothing of it was run; save a state_dict of plain tensors, numbers and strings, or safetensors"
)


def read_pickle(url: str, data: bytes) -> Any:
    """The object: dict, list, tuple, scalars, `Tensor`, `Text`. Sets are lists.

    Raises `FormatError`, and `UnsupportedFormat` for what state dicts do not hold.
    """
    if len(data) > MAX_PICKLE:
        raise damaged(url, _FIELD, f"has {len(data)} bytes (the limit is {MAX_PICKLE})")
    machine = _Machine(data)
    try:
        return machine.run()
    except _Unsupported as error:
        found, advice = error.args
        raise unsupported(url, _FIELD, found, advice) from None
    except _Refused as error:
        raise _damaged(url, machine, str(error)) from None
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        # An opcode found another number or kind of things than it takes.
        raise _damaged(url, machine, f"{type(error).__name__}: {str(error)[:200]}") from None


def _damaged(url: str, machine: _Machine, what: str) -> FormatError:
    return damaged(url, _FIELD, f"is no pickle of a state dict at byte {machine.position} ({what})")


# ---- what globals stand for ----


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """rest: requires_grad, backward_hooks, metadata."""
    if len(rest) > 3:
        raise _Refused("a tensor of too many arguments")
    if not isinstance(storage, Storage):
        raise _Refused("a tensor without a storage")
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
        raise _Refused("a tensor without a storage or dtype")
    return _tensor(storage, dtype.text.removeprefix("torch."), offset, shape, strides, metadata)


def _tensor(storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any, metadata: Any) -> Tensor:
    if metadata:
        raise _Unsupported(
            "has a tensor that is to be conjugated or negated when it is read",
            "call .resolve_conj().resolve_neg() on it and save again",
        )
    for numbers in (shape, strides, (offset,)):
        if not isinstance(numbers, tuple) or any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers):
            raise _Refused("a tensor whose shape, strides or offset are no numbers from 0")
    if len(shape) != len(strides) or len(shape) > MAX_NDIM:
        raise _Refused("a tensor with an impossible number of dimensions")
    return Tensor(storage, dtype, offset, shape, strides)


def _rebuild_parameter(data: Any, *rest: Any) -> Tensor:
    """rest: requires_grad, backward_hooks, and attributes, which are dropped."""
    if not isinstance(data, Tensor) or len(rest) > 3:
        raise _Refused("a parameter that is no tensor")
    return data


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    if not isinstance(function, _Function) or not function.rebuilds or not isinstance(kind, _Function):
        raise _Refused("a tensor that is rebuilt by something else than a tensor's function")
    return function.call(*_arguments(arguments))


def _no_call(*arguments: Any) -> NoReturn:
    raise _Refused("a class that is called, but only named in state dicts")


def _list(*arguments: Any) -> list[Any]:
    """Sets too: nobody needs to look up in them, and a list keeps the order."""
    (values,) = arguments or ([],)
    if type(values) not in (list, tuple):
        raise _Refused("a set of something else than a list")
    return list(values)


def _dict(*arguments: Any) -> dict[Any, Any]:
    (values,) = arguments or ({},)
    if isinstance(values, dict):
        return dict(values)
    result: dict[Any, Any] = {}
    for pair in _list(values):
        key, value = pair
        _set(result, key, value)
    return result


def _set(mapping: Any, key: Any, value: Any) -> None:
    if type(mapping) is not dict:
        raise _Refused("an item that is set of something else than a dict")
    # Hashes of tuples and of big numbers are not keyed, so that a file could make all of them collide.
    if type(key) not in _KEYS or (type(key) is int and not -(1 << 63) <= key < 1 << 63):
        raise _Unsupported(f"has a key that is a {type(key).__name__}, or too large", _REMEDY)
    mapping[key] = value


def _size(*arguments: Any) -> tuple[Any, ...]:
    return tuple(_list(*arguments))


def _device(*arguments: Any) -> Text:
    if not all(isinstance(part, (str, int)) for part in arguments):
        raise _Refused("a device that is no name")
    return Text(":".join(str(part)[:100] for part in arguments[:2]))


def _encode(text: Any, encoding: Any) -> bytes:
    """How pickle's older protocols write bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _Refused("bytes in an unknown encoding")
    return text.encode("latin-1")


def _bytearray(*arguments: Any) -> bytes:
    return _encode(*arguments) if len(arguments) == 2 else bytes(*(a for a in arguments if type(a) is bytes))


def _complex(real: Any, imaginary: Any) -> complex:
    if not isinstance(real, float) or not isinstance(imaginary, float):
        raise _Refused("a complex number of something else than two numbers")
    return complex(real, imaginary)


class _NumpyDtype:
    """numpy.dtype of a scalar; its byte order comes afterwards."""

    def __init__(self, code: Any, *rest: Any) -> None:
        if not isinstance(code, str) or not _NUMPY_SCALAR.fullmatch(code):
            raise _Unsupported(f"has a numpy scalar of dtype {str(code)[:40]!r}", _REMEDY)
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, _NumpyDtype) or type(data) is not bytes or len(data) != dtype.dtype.itemsize:
        raise _Refused("a numpy scalar of an impossible size")
    return np.frombuffer(data, dtype.dtype)[0].item()


_UTILS: Final = "torch._utils"
_FUNCTIONS: Final[dict[tuple[str, str], Any]] = {
    (_UTILS, "_rebuild_tensor"): _Function(_rebuild_tensor, True),
    (_UTILS, "_rebuild_tensor_v2"): _Function(_rebuild_tensor, True),
    (_UTILS, "_rebuild_tensor_v3"): _Function(_rebuild_tensor_v3, True),
    (_UTILS, "_rebuild_parameter"): _Function(_rebuild_parameter, True),
    (_UTILS, "_rebuild_parameter_with_state"): _Function(_rebuild_parameter, True),
    ("torch._tensor", "_rebuild_from_type_v2"): _Function(_rebuild_from_type),
    ("torch", "Tensor"): _Function(_no_call),
    ("torch.nn.parameter", "Parameter"): _Function(_no_call),
    ("torch.nn.parameter", "Buffer"): _Function(_no_call),
    ("torch", "Size"): _Function(_size),
    ("torch", "device"): _Function(_device),
    ("torch.storage", "UntypedStorage"): _Type(None),
    ("torch", "UntypedStorage"): _Type(None),
    ("collections", "OrderedDict"): _Function(_dict),
    ("_codecs", "encode"): _Function(_encode),
    ("numpy", "dtype"): _Function(_NumpyDtype),
    ("numpy.core.multiarray", "scalar"): _Function(_numpy_scalar),
    ("numpy._core.multiarray", "scalar"): _Function(_numpy_scalar),
    **{
        (module, name): _Function(call)
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


def _resolve(module: Any, name: Any) -> Any:
    if not isinstance(module, str) or not isinstance(name, str):
        raise _Refused("a global whose name is no string")
    known = _FUNCTIONS.get((module, name))
    if known is not None:
        return known
    if module in ("torch", "torch.storage") and name.endswith("Storage"):
        dtype = _STORAGE_DTYPES.get(name.removesuffix("Storage"))
        if dtype is not None:
            return _Type(dtype)
        raise _Unsupported(f"has storages of type {name[:100]!r}", _REMEDY)
    if module == "torch" and _DTYPE.fullmatch(name):
        return Text(f"torch.{name}")
    if module == _UTILS and name in _KINDS:
        raise _Unsupported(
            f"has a {_KINDS[name]} tensor", "make it a plain one (.to_dense(), .dequantize()) and save again"
        )
    raise _Unsupported(f"asks for {f'{module}.{name}'[:200]!r}, which state dicts do not need", _REMEDY)


def _arguments(value: Any) -> tuple[Any, ...]:
    if type(value) is not tuple:
        raise _Refused("arguments that are no tuple")
    return value


# ---- the machine ----


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, handlers = self._data, _HANDLERS
        for _ in range(_MAX_OPCODES):
            if self.position >= len(data):
                raise _Refused("it ends before its STOP")
            code = data[self.position]
            self.position += 1
            if code == 0x2E:  # STOP
                (value,) = self._stack
                return value
            handler = handlers.get(code)
            if handler is None:
                known = _REFUSED.get(code)
                if known is not None:
                    raise _Unsupported(f"uses {known}, which state dicts do not need", _REMEDY)
                raise _Refused(f"opcode {code:#04x}")
            handler(self)
        raise _Refused(f"more than {_MAX_OPCODES} opcodes")

    def _take(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self._data):
            raise _Refused(f"{length} bytes are to follow, which it has not")
        data = self._data[self.position : end]
        self.position = end
        return data

    def _byte(self) -> int:
        value = self._data[self.position]  # half of all opcodes take one, so no slice is made of it
        self.position += 1
        return value

    def _unsigned(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _signed(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little", signed=True)

    def _line(self) -> str:
        end = self._data.find(b"\n", self.position, self.position + _MAX_LINE)
        if end < 0:
            raise _Refused("a line without end")
        line = self._data[self.position : end].decode("utf-8")
        self.position = end + 1
        return line

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marks.pop()
        return items

    # Opcodes, by pickletools' names.

    def proto(self) -> None:
        version = self._byte()
        if version > 5:
            raise _Unsupported(f"is of pickle protocol {version}", "save it with pickle_protocol=2")

    def frame(self) -> None:
        self._take(8)

    def mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def int_line(self) -> None:
        line = self._line()
        self._push({"00": False, "01": True}.get(line, int(line)))

    def long_line(self) -> None:
        self._push(int(self._line().removesuffix("L")))

    def float_line(self) -> None:
        self._push(float(self._line()))

    def long1(self) -> None:
        self._push(self._signed(self._byte()))

    def long4(self) -> None:
        length = self._signed(4)
        if not 0 <= length <= _MAX_INT:
            raise _Refused(f"a number of {length} bytes")
        self._push(self._signed(length))

    def binfloat(self) -> None:
        self._push(struct.unpack(">d", self._take(8))[0])

    def unicode_line(self) -> None:
        text = self._line().encode("ascii").decode("raw_unicode_escape")
        text.encode("utf-8")  # an escape can say what no name may hold
        self._push(text)

    def tuple_mark(self) -> None:
        items = self._pop_mark()
        self._push(tuple(items))

    def tuple_last(self, count: int) -> None:
        if len(self._stack) < count:
            raise _Refused("a tuple of more than there is")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def list_mark(self) -> None:
        self._push(self._pop_mark())

    def dict_mark(self) -> None:
        items = self._pop_mark()
        self._push({})
        self._set_items(items)

    def append(self) -> None:
        value = self._stack.pop()
        self._extend([value])

    def appends(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise _Refused("items for something else than a list")
        self._stack[-1].extend(items)

    def setitem(self) -> None:
        value = self._stack.pop()
        key = self._stack.pop()
        _set(self._stack[-1], key, value)

    def setitems(self) -> None:
        self._set_items(self._pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise _Refused("a key without a value")
        target = self._stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            _set(target, key, value)

    def get(self, number: int) -> None:
        self._push(self._memo[number])

    def put(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def global_line(self) -> None:
        module = self._line()
        self._push(_resolve(module, self._line()))

    def stack_global(self) -> None:
        name = self._stack.pop()
        module = self._stack.pop()
        self._push(_resolve(module, name))

    def inst(self) -> None:
        module = self._line()
        _resolve(module, self._line())
        raise _Unsupported("uses INST, which state dicts do not need", _REMEDY)

    def reduce(self) -> None:
        arguments = _arguments(self._stack.pop())
        function = self._stack.pop()
        if not isinstance(function, _Function):
            raise _Refused("something is called that is no function")
        self._push(function.call(*arguments))

    def build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, _NumpyDtype):
            target.build(state)
        elif type(target) is not dict and not isinstance(target, Tensor):  # theirs are attributes
            raise _Refused("attributes of something that has none")

    def binpersid(self) -> None:
        identity = self._stack.pop()
        if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
            raise _Refused("a reference to something else than a storage")
        _, kind, key, _, numel = identity
        if not isinstance(kind, _Type) or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise _Refused("a storage of an impossible type, key or size")
        self._push(Storage(key, kind.dtype, numel))


def _text(width: int) -> Callable[[_Machine], None]:
    return lambda m: m._push(m._take(m._unsigned(width)).decode("utf-8"))


def _bytes(width: int) -> Callable[[_Machine], None]:
    return lambda m: m._push(m._take(m._unsigned(width)))


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda m: m._push(value)


_HANDLERS: Final[dict[int, Callable[[_Machine], None]]] = {
    ord(code): handler
    for code, handler in {
        "\x80": _Machine.proto,
        "\x95": _Machine.frame,
        "(": _Machine.mark,
        "0": _Machine.pop,
        "1": lambda m: (m._pop_mark(), None)[1],
        "N": _constant(None),
        "\x88": _constant(True),
        "\x89": _constant(False),
        "I": _Machine.int_line,
        "L": _Machine.long_line,
        "F": _Machine.float_line,
        "J": lambda m: m._push(m._signed(4)),
        "K": lambda m: m._push(m._byte()),
        "M": lambda m: m._push(m._unsigned(2)),
        "\x8a": _Machine.long1,
        "\x8b": _Machine.long4,
        "G": _Machine.binfloat,
        "V": _Machine.unicode_line,
        "X": _text(4),
        "\x8c": _text(1),
        "\x8d": _text(8),
        "B": _bytes(4),
        "C": _bytes(1),
        "\x8e": _bytes(8),
        "\x96": _bytes(8),
        ")": _constant(()),
        "t": _Machine.tuple_mark,
        "\x85": lambda m: m.tuple_last(1),
        "\x86": lambda m: m.tuple_last(2),
        "\x87": lambda m: m.tuple_last(3),
        "]": lambda m: m._push([]),
        "\x8f": lambda m: m._push([]),  # a set
        "l": _Machine.list_mark,
        "\x91": _Machine.list_mark,  # a frozenset
        "}": lambda m: m._push({}),
        "d": _Machine.dict_mark,
        "a": _Machine.append,
        "e": _Machine.appends,
        "\x90": _Machine.appends,  # to a set
        "s": _Machine.setitem,
        "u": _Machine.setitems,
        "g": lambda m: m.get(int(m._line())),
        "h": lambda m: m.get(m._byte()),
        "j": lambda m: m.get(m._unsigned(4)),
        "p": lambda m: m.put(int(m._line())),
        "q": lambda m: m.put(m._byte()),
        "r": lambda m: m.put(m._unsigned(4)),
        "\x94": _Machine.memoize,
        "c": _Machine.global_line,
        "\x93": _Machine.stack_global,
        "i": _Machine.inst,
        "R": _Machine.reduce,
        "\x81": _Machine.reduce,  # NEWOBJ: of what is known here it means the same
        "b": _Machine.build,
        "Q": _Machine.binpersid,
    }.items()
}
_REFUSED: Final = {
    ord("o"): "OBJ",
    ord("P"): "PERSID",
    0x82: "EXT1, the extension registry",
    0x83: "EXT2, the extension registry",
    0x84: "EXT4, the extension registry",
    0x92: "NEWOBJ_EX",
    0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}
